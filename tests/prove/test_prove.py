"""The runner of proofs on made-up arms whose numbers are known."""

import json
import multiprocessing
import re
import signal
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck import Method, Optim, Roles, Update
from limbeck.convert.slicing import Slice
from limbeck.core.errors import RunError, UsageError
from limbeck.core.stages import Convert, Train
from limbeck.data import Data, TensorSource
from limbeck.evaluate.budget import Passes
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, load_proof, prove

METHOD = """
    from dataclasses import dataclass
    from limbeck import Method

    @dataclass(frozen=True)
    class Own(Method):
        pass
"""
HEAD = """
    import os
    import signal
    from pathlib import Path
    from limbeck.evaluate.budget import Passes
    from limbeck.prove import Arm, Comparison, Proof, Trial

    CALLS, TRAP = Path(__file__).with_name("calls"), Path(__file__).with_name("trap")

    def trial(seed, value, test, forward=10, name="", validation=None):
        if TRAP.exists() and (name, value) == ("b", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        with CALLS.open("a") as file:
            file.write(f"{name}/{seed}/{value}\\n")
        validation = -abs(value - 2) if validation is None else validation
        return Trial(validation, test, {"student": Passes(forward, 10, 100)}, {"value": value})
"""
BODY = """
    PROOF = Proof(
        claim="b beats a [and c]", task="numbers", metric="score",
        arms={
            "a": Arm(lambda seed, v: trial(seed, v, 50 + seed, name="a"), "lr", (1, 2, 3)),
            "b": Arm(lambda seed, v: trial(seed, v, 52 + seed + 0.1 * seed * v, name="b"), "tau", (1, 2, 3)),
        },
        comparisons=[Comparison("b", "a"), Comparison("a", "b", margin=5.0, asserted=False)],
    )
"""


@pytest.fixture
def own(tmp_path):
    """Writes a method of one's own with a proof; returns its name."""

    def write(body=BODY, folder="own"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "own.py").write_text(textwrap.dedent(METHOD))
        (tmp_path / folder / "proof.py").write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
        return f"{tmp_path}/{folder}/own.py:Own"

    return write


def test_numbers_choices_intervals_and_verdict(own, tmp_path, capsys):
    result = prove(own(), seeds=3, out=tmp_path / "out")
    assert result["verdict"] == "shown"
    assert result["seeds"] == [0, 1, 2]
    assert result["arms"] == {"a": [50, 51, 52], "b": pytest.approx([52, 53.2, 54.4])}
    assert result["tuning"]["b"]["chosen"] == [2, 2, 2]
    assert result["tuning"]["b"]["also"] == {"value": [2, 2, 2]}
    assert result["tuning"]["b"]["test_by_value"]["3"] == pytest.approx([52, 53.3, 54.6])
    assert result["summary"]["a"] == {"mean": 51, "deviation": 1}
    better, reported = result["comparisons"]
    # Differences 2, 2.2, 2.4: mean 2.2, deviation 0.2, t(0.975, 2) = 4.3027.
    assert better["mean"] == pytest.approx(2.2)
    assert better["low"] == pytest.approx(2.2 - 4.3027 * 0.2 / 3**0.5, abs=1e-4)
    assert better["holds"]
    assert better["asserted"]
    assert reported["holds"]
    assert not reported["asserted"]
    assert result["cost"]["trials"] == 18
    assert result["cost"]["passes_per_trial"]["a"]["student"] == {"forward": 10, "backward": 10, "examples": 100}
    assert json.loads((tmp_path / "out" / "proof.json").read_text()) == result
    assert (tmp_path / "out" / "proof.svg").read_text().startswith("<svg")
    table = capsys.readouterr().out
    assert "verdict: shown" in table
    assert "b beats a [and c]" in table


@pytest.mark.parametrize(
    ("gain", "margin", "better", "verdict"),
    [
        (2.0, 0.0, "higher", "shown"),
        (2.0, 0.0, "lower", "not shown"),
        (-2.0, 0.0, "lower", "shown"),
        (0.1, 0.0, "higher", "not shown"),  # better on average, but the interval holds 0
        (0.1, 3.0, "higher", "shown"),
        (-0.1, 3.0, "higher", "shown"),
        (0.1, 3.0, "lower", "shown"),
        (-4.0, 3.0, "higher", "not shown"),
        (4.0, 3.0, "lower", "not shown"),
    ],
)
def test_verdicts(own, tmp_path, gain, margin, better, verdict):
    body = f"""
    PROOF = Proof(
        claim="c", task="t", metric="score", better="{better}",
        arms={{
            "a": Arm(lambda seed, v: trial(seed, v, seed), "v", (1, 2)),
            "b": Arm(lambda seed, v: trial(seed, v, seed + {gain} + (seed - 1) * 0.3), "v", (1, 2)),
        }},
        comparisons=[Comparison("b", "a", margin={margin}), Comparison("a", "b", asserted=False)],
    )
    """
    assert prove(own(body), seeds=3, out=tmp_path / "out")["verdict"] == verdict


def test_where_lower_is_better_the_lowest_is_chosen(own, tmp_path):
    body = BODY.replace('metric="score"', 'metric="loss", better="lower"')
    assert prove(own(body), seeds=2, out=tmp_path / "out")["tuning"]["b"]["chosen"] == [1, 1]  # the first of equals


def test_a_diverged_value_is_not_chosen(own, tmp_path):
    body = BODY.replace("50 + seed, name", "50 + seed, validation=float('nan') if v == 2 else 1.0, name")
    assert prove(own(body), seeds=2, out=tmp_path / "out")["tuning"]["a"]["chosen"] == [1, 1]


def test_a_diverged_arm_stops_the_proof(own, tmp_path):
    with pytest.raises(RunError, match="no finite result") as error:
        prove(own(BODY.replace("50 + seed, name", "float('nan'), name")), seeds=2, out=tmp_path / "out")
    assert error.value.where == "a"


def test_unequal_budgets_stop_the_proof(own, tmp_path):
    method = own(BODY.replace('50 + seed, name="a"', '50 + seed, forward=11, name="a"'))
    with pytest.raises(RunError, match="different budgets") as error:
        prove(method, seeds=2, out=tmp_path / "out")
    assert "'forward': 11" in str(error.value)
    assert not (tmp_path / "out" / "proof.json").exists()


def test_arms_whose_generators_take_several_steps_have_equal_updates(own, tmp_path):
    body = BODY.replace('50 + seed, name="a"', '50 + seed, forward=11 + seed, name="a"')
    method = own(body.replace("Proof(", 'Proof(budget="updates", '))
    assert prove(method, seeds=2, out=tmp_path / "out")["cost"]["passes_per_trial"]["a"]["student"]["forward"] == 11


def test_a_killed_proof_goes_on(own, tmp_path):
    method, calls, trap = own(), tmp_path / "own" / "calls", tmp_path / "own" / "trap"
    whole = prove(method, seeds=2, out=tmp_path / "whole")
    calls.unlink()
    trap.touch()
    child = multiprocessing.get_context("fork").Process(target=prove, args=(method, 2, tmp_path / "out"))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert calls.read_text().split() == ["a/0/1", "a/0/2", "a/0/3", "b/0/1"]
    with (tmp_path / "out" / "trials.jsonl").open("a") as file:
        file.write('{"arm": "b", "se')  # a line that the kill cut short
    trap.unlink()
    result = prove(method, seeds=2, out=tmp_path / "out")
    assert sorted(calls.read_text().split()) == sorted(f"{a}/{s}/{v}" for a in "ab" for s in (0, 1) for v in (1, 2, 3))
    for key in ("arms", "comparisons", "verdict"):
        assert result[key] == whole[key]


def test_more_seeds_keep_the_trials_and_other_code_drops_them(own, tmp_path):
    method, calls = own(), tmp_path / "own" / "calls"
    prove(method, seeds=2, out=tmp_path / "out")
    prove(method, seeds=3, out=tmp_path / "out")
    assert len(calls.read_text().split()) == 18
    own(BODY + "\n    CHANGED = True\n")
    assert prove(method, seeds=2, out=tmp_path / "out")["seeds"] == [0, 1]
    assert len(calls.read_text().split()) == 30


def test_mistakes_are_found_before_any_trial(own, tmp_path):
    with pytest.raises(UsageError, match="needs a spread"):
        prove(own(), seeds=1, out=tmp_path / "out")
    with pytest.raises(UsageError, match="unknown method"):
        prove("kdd", out=tmp_path / "out")
    method = own()
    (tmp_path / "own" / "proof.py").unlink()
    with pytest.raises(UsageError, match="has no proof"):
        prove(method, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trial(seed, value):
    return Trial(0.0, 0.0, {"student": Passes()})


@pytest.mark.parametrize(
    ("sizes", "comparisons", "words"),
    [
        ((2, 3), [Comparison("b", "a")], "grids of one size"),
        ((0, 0), [Comparison("b", "a")], "grids of one size"),
        ((2, 2), [Comparison("b", "c")], "an arm that there is not"),
        ((2, 2), [Comparison("b", "a", asserted=False)], "asserts nothing"),
    ],
)
def test_unfair_or_empty_proofs_are_refused(sizes, comparisons, words):
    arms = {name: Arm(trial, "v", range(size)) for name, size in zip("ab", sizes, strict=True)}
    with pytest.raises(UsageError, match=words):
        Proof("c", "t", "m", arms, comparisons)


def test_fit_counts_what_it_did():
    m = Roles(student=nn.Linear(3, 2), teacher=nn.Linear(3, 2))
    source = TensorSource(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)))

    def step(m, batch):
        with torch.no_grad():
            target = m.teacher(batch)
        return (m.student(batch) - target).square().mean()

    before = [p.clone() for p in m.teacher.parameters()]
    passes = fit(step, m, source, {"student": Optim("sgd", lr=0.1)}, epochs=2, batch_size=4)
    assert passes == {"student": Passes(6, 6, 20), "teacher": Passes(6, 0, 20)}
    assert all(torch.equal(a, b) for a, b in zip(before, m.teacher.parameters(), strict=True))


def test_fit_counts_roles_that_the_program_makes_and_not_copies_as_their_origin():
    class Copying(Method):
        def stages(self, m, data):
            yield Convert("fake", Slice({}), of="teacher", name="copy the teacher")
            yield Train(self.step, roles={"student": None, "fake": None}, frozen=["teacher"], data=data.train)

        def step(self, m, batch):
            yield Update("fake", m.fake(batch).square().mean())
            with torch.no_grad():
                target = m.teacher(batch)
            yield Update("student", (m.student(batch) - target).square().mean())

    m = Roles(student=nn.Linear(3, 2), teacher=nn.Linear(3, 2))
    data = Data(train=TensorSource(torch.randn(8, 3)))
    optim = {name: Optim("sgd", lr=0.1) for name in ("student", "fake")}
    passes = fit(Copying(), m, data, optim, steps=2, batch_size=4)
    assert passes == {"student": Passes(2, 2, 8), "teacher": Passes(2, 0, 8), "fake": Passes(2, 2, 8)}


# The proofs that are shipped

FOLDER = Path(load_proof.__code__.co_filename).parent / "methods"
SHIPPED = sorted(path.parent.name for path in FOLDER.glob("*/proof.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_result_is_that_of_the_shipped_proof(name):
    result, proof = json.loads((FOLDER / name / "proof.json").read_text()), load_proof(name)
    assert (result["method"], result["claim"], result["task"]) == (name, proof.claim, proof.task)
    assert list(result["arms"]) == list(proof.arms)
    assert len(result["seeds"]) >= 5
    assert [[c[k] for k in ("arm", "baseline", "margin", "asserted")] for c in result["comparisons"]] == [
        [c.arm, c.baseline, c.margin, c.asserted] for c in proof.comparisons
    ]
    for arm, tuning in result["tuning"].items():
        assert tuning["grid"] == list(proof.arms[arm].grid)
    assert result["verdict"] == (
        "shown" if all(c["holds"] for c in result["comparisons"] if c["asserted"]) else "not shown"
    )
    assert not re.search(r"(^|[\s\"'])/\w", json.dumps(result))  # no path of the machine it ran on


@pytest.mark.parametrize("name", [n for n in SHIPPED if n in ("kd", "pld")])
def test_a_trial_of_a_shipped_proof_gives_the_shipped_number(name):
    """One trial again, on whatever machine this is: the same up to what other rounding may change."""
    result, proof = json.loads((FOLDER / name / "proof.json").read_text()), load_proof(name)
    value = proof.arms[name].grid[1]
    found = proof.arms[name].run(0, value)
    assert found.test == pytest.approx(result["tuning"][name]["test_by_value"][str(value)][0], abs=1.5)
    assert {k: vars(v) for k, v in found.passes.items()} == result["cost"]["passes_per_trial"][name]
