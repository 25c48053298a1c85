"""What holds for every method, whatever it does; exceptions are in `cases.py`, by name and with a reason."""

import math
import multiprocessing
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import CASES, INPUTS, METHODS, SGD, bits, data, rows, run, run_killed, stages_of
from torch._subclasses import FakeTensorMode

from limbeck import Batch, Convert, Engine, Train
from limbeck.convert.record import load_student, save_student
from limbeck.core import registry
from limbeck.core.method import updates
from limbeck.core.recipe import Recipe
from limbeck.core.roles import Role
from limbeck.data.condensed import Condensed
from limbeck.data.condensed_graphs import CondensedGraphs
from limbeck.engine.checkpoint import Checkpoints
from limbeck.engine.run import execute
from limbeck.export.onnx import to_onnx


def applies_to(check, cases=CASES):
    return pytest.mark.parametrize("name", [name for name, case in cases.items() if check not in case.exceptions])


@cache
def whole(name):
    """The run that was never killed: weights, history, seconds and what the frozen roles were before."""
    case = CASES[name]
    start = time.perf_counter()
    result = run(case)
    return result, bits(case.roles()), time.perf_counter() - start


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_exceptions_name_a_check_and_a_reason():
    checks = {"falls", "own_loop", "no_wait", "other_seed", "micro_batches", "processes"}
    for case in CASES.values():
        assert case.exceptions.keys() <= checks
        assert all(case.exceptions.values())


@applies_to("every")
def test_a_tiny_run_ends_soon_with_finite_numbers(name):
    result, _, seconds = whole(name)
    assert seconds < 10
    values = [v for row in result.history for k, v in row.items() if k.startswith("train/")]
    assert all(map(math.isfinite, values))
    assert all(v.isfinite().all() for v in bits(result.roles).values())


@applies_to("falls")
def test_the_loss_falls(name):
    history = whole(name)[0].history
    for stage in {row["stage"] for row in history}:
        losses = [row["train/loss/student"] for row in history if row["stage"] == stage and "train/loss/student" in row]
        third = max(1, len(losses) // 3)
        assert not losses or sum(losses[-third:]) < 0.95 * sum(losses[:third])


@applies_to("every")
def test_frozen_roles_do_not_change(name):
    result, before, _ = whole(name)
    stages = stages_of(CASES[name])
    trained = {role for stage in stages if isinstance(stage, Train) for role in stage.roles}
    trained |= {stage.role for stage in stages if isinstance(stage, Convert)}
    frozen = {key for key in before if key.split(".")[0] not in trained}
    assert frozen or name in ("alternating", "fair_latent", "mirage")  # all of whose roles learn, or are made
    assert_same({k: v for k, v in bits(result.roles).items() if k in frozen}, {k: before[k] for k in frozen})


@applies_to("every")
def test_what_learns_has_changed(name):
    before, after = whole(name)[1], bits(whole(name)[0].roles)
    assert any(key not in before or not torch.equal(before[key], value) for key, value in after.items())


@applies_to("every")
def test_the_same_seed_gives_the_same_bits(name):
    result = whole(name)[0]
    torch.manual_seed(99)  # the run's own seed counts, not what was drawn before it
    again = run(CASES[name])
    assert_same(bits(again.roles), bits(result.roles))
    assert rows(again) == rows(result)


@applies_to("other_seed")
def test_another_seed_gives_other_bits(name):
    other = bits(run(CASES[name], seed=1).roles)
    assert any(not torch.equal(other[key], value) for key, value in bits(whole(name)[0].roles).items())


@applies_to("every")
def test_a_method_holds_no_state(name):
    case = CASES[name]
    method = case.method()
    before = dict(vars(method))
    execute(method, case.roles(), case.data(), Engine(steps=2, batch_size=16, device="cpu"))
    assert vars(method) == before == vars(case.method())


@applies_to("micro_batches")
def test_micro_batches_equal_one_batch(name):
    result = whole(name)[0]
    parts = run(CASES[name], micro_batches=4)
    for key, value in bits(result.roles).items():
        torch.testing.assert_close(bits(parts.roles)[key], value, rtol=0, atol=1e-6)
    for row, expected in zip(rows(parts), rows(result), strict=True):
        for key in expected.keys() & {"train/loss/student", "train/loss/critic", "train/loss/generator"}:
            assert row[key] == pytest.approx(expected[key], abs=1e-5)


# Resuming

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["limbeck.prove", "limbeck.convert.layers", "torch._dynamo"])  # what a run imports


def deaths():
    """In every stage (before the first checkpoint and after it, or in its only work) and after every stage."""
    for name, case in CASES.items():
        for index, stage in enumerate(stages_of(case)):
            for call in (2, 5, None) if isinstance(stage, Train) else (1, None):
                yield pytest.param(
                    name, index, call, id=f"{name}-{stage.name if hasattr(stage, 'name') else index}-{call}"
                )


@pytest.mark.parametrize(("name", "index", "call"), deaths())
def test_killed_and_started_again_it_ends_in_the_same_bits(name, index, call, tmp_path):
    child = PROCESSES.Process(target=run_killed, args=(name, tmp_path, index, call))
    child.start()
    child.join(60)
    assert child.exitcode == -9
    resumed = run(CASES[name], tmp_path)
    assert_same(bits(resumed.roles), bits(whole(name)[0].roles))
    assert rows(resumed) == rows(whole(name)[0])


@applies_to("every")
def test_a_finished_run_is_read_and_not_done_again(name, tmp_path):
    first = run(CASES[name], tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*.*")}
    again = run(CASES[name], tmp_path)
    assert_same(bits(again.roles), bits(first.roles))
    assert rows(again) == rows(first)
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*.*")}


@applies_to("every")
def test_the_last_checkpoint_holds_the_result(name, tmp_path):
    result = run(CASES[name], tmp_path)
    _, states, _ = Checkpoints(tmp_path / "checkpoints", 2).latest(pytest.fail)
    saved = {f"{role}.{key}": value for role, state in states.items() for key, value in state.items()}
    assert saved
    assert_same(saved, {key: bits(result.roles)[key] for key in saved})


# Out of the engine


@applies_to("own_loop")
def test_a_loop_of_ones_own_equals_the_engine(name, monkeypatch):
    case = CASES[name]
    method, batches = case.method(), []
    program = method.step

    def recorded(self, m, batch):
        batches.append(batch)
        return program(m, batch)

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "step", recorded)
        engine = run(case)
    m = case.roles()
    m.freeze(*method.frozen)
    optimizers = {role: SGD.build(m[role].module) for role in method.trains}
    sole = method.trains[0] if len(method.trains) == 1 else None
    for batch in batches:
        for update in updates(method.step, m, batch, sole):
            update.backward(m)
            if update.apply:
                optimizers[update.role].step()
                optimizers[update.role].zero_grad()
        m.step += 1
    assert_same(bits(m), bits(engine.roles))


@applies_to("no_wait")
def test_a_step_never_waits_for_the_device(name):
    case = CASES[name]
    with FakeTensorMode():  # where reading a number from a tensor raises
        m = case.roles()
        batch = Batch(x=torch.zeros(8, INPUTS), y=torch.zeros(8, dtype=torch.int64), id=torch.arange(8))
        for update in updates(case.method().step, m, batch, "student"):
            update.loss.backward()


@pytest.mark.parametrize("name", [n for n in CASES if n != "alternating"])
def test_the_student_is_saved_and_loaded(name, tmp_path):
    student, lineage = student_of(name)
    save_student(tmp_path, student, lineage["records"])
    loaded = load_student(tmp_path, CASES[name].roles()[lineage["base"]].module, trust=True)
    x = (
        None
        if isinstance(student, Condensed | CondensedGraphs)
        else CASES[name].data().train.batch(torch.arange(8), 0).x
    )
    outputs = []
    for role in (Role("loaded", loaded), Role("student", student)):
        torch.manual_seed(0)  # of noise between the steps of a sampler
        outputs.append(role(x))
    assert torch.equal(*outputs)


def test_a_converted_and_trained_student_is_exported(tmp_path):
    x = data().train.batch(torch.arange(8), 0).x
    report = to_onnx(student_of("staged")[0], (x,), tmp_path / "student.onnx")
    assert report.max_abs_error < 1e-5


def student_of(name):
    m = whole(name)[0].roles
    return m.student.module.eval(), m.lineage.get("student", {"base": "student", "records": []})


# Several processes


@pytest.mark.processes
def test_two_processes_equal_one(tmp_path):
    pytest.importorskip("lightning")
    names = [name for name, case in CASES.items() if "processes" not in case.exceptions]
    script = Path(__file__).with_name("together.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(tmp_path), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        expected, history = bits(whole(name)[0].roles), rows(whole(name)[0])
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found["bits"].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found["bits"][key], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for row, other in zip(found["rows"], history, strict=True):
            assert row == pytest.approx(other, abs=1e-4)


# Recipes


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_comes_back_as_it_went(name, tmp_path):
    tree = {"student": "layers:2", "teacher": "a", "data": "digits", "method": name, "engine": {"epochs": 3}}
    fields = {f"method.{k}={v / 2 or 0.25}" for k, v in vars(registry.find(name)()).items() if isinstance(v, float)}
    recipe = Recipe.parse(tree, fields)
    assert recipe.method != registry.find(name)()
    assert Recipe.parse(recipe.dump()) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.yaml())
    assert Recipe.load(tmp_path / "recipe.yaml").method == recipe.method
