"""Claims that run: a method against its baselines, with one budget and equally large grids, paired over seeds."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import limbeck
from limbeck.core import registry
from limbeck.core.errors import RunError, UsageError
from limbeck.core.files import write_text
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Stage, Step, Train
from limbeck.data import Data
from limbeck.engine.run import execute
from limbeck.engine.settings import Engine
from limbeck.evaluate.budget import Passes, as_dict, count_role_passes
from limbeck.evaluate.compare import mean_deviation, paired_interval
from limbeck.evaluate.metrics import topk_accuracy
from limbeck.evaluate.tasks import predict
from limbeck.models.specs import import_object


@dataclass(frozen=True)
class Trial:
    """What one arm gave for one seed and one value of its hyper-parameter.

    Args:
        validation: The metric that the value is chosen by.
        test: The metric that is reported.
        passes: Passes through each model, as `fit` returns them; all arms must have equally many of the student, and
            what teachers and other roles are asked beside it is reported.
        also: Other numbers of the test, by name: nothing is chosen or asserted by them, and they are reported.
    """

    validation: float
    test: float
    passes: Mapping[str, Passes]
    also: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to get a student, with the hyper-parameter that it is tuned in.

    Args:
        run: Called with a seed and a value; everything random follows from the seed.
        tunes: The hyper-parameter's name.
        grid: Its values; equally many in all arms.
    """

    run: Callable[[int, Any], Trial]
    tunes: str
    grid: Sequence[float | str]


@dataclass(frozen=True)
class Comparison:
    """Whether an arm is better than a baseline: the whole interval of the paired difference lies beyond the margin.

    Args:
        arm: Name of an arm.
        baseline: Name of another.
        margin: How much worse it may be, in the metric's unit; 0 asks for better.
        asserted: Whether the verdict depends on it; False only reports it.
    """

    arm: str
    baseline: str
    margin: float = 0.0
    asserted: bool = True


@dataclass(frozen=True)
class Proof:
    """What `proof.py` of a method declares under the name `PROOF`.

    Args:
        claim: The paper's claim in one sentence, as it is tried here.
        task: The data, the models and the budget in one sentence.
        metric: Name of what `Trial` holds, with its unit.
        arms: By name; the method itself last.
        comparisons: What is asserted and what is reported.
        better: Which direction of the metric is the better one.
        budget: What all arms must have equally many of: `passes` through the student, forward and backward; or `updates`,
            backward passes alone, where arms differ by design in how many steps a generator takes. All are reported.
    """

    claim: str
    task: str
    metric: str
    arms: Mapping[str, Arm]
    comparisons: Sequence[Comparison]
    better: Literal["higher", "lower"] = "higher"
    budget: Literal["passes", "updates"] = "passes"

    def __post_init__(self) -> None:
        sizes = {name: len(arm.grid) for name, arm in self.arms.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise UsageError("the arms of a proof need grids of one size", where="arms", found=sizes)
        named = [name for c in self.comparisons for name in (c.arm, c.baseline)]
        if missing := [name for name in named if name not in self.arms]:
            raise UsageError("a comparison names an arm that there is not", found=missing[0], expected=", ".join(sizes))
        if not any(c.asserted for c in self.comparisons):
            raise UsageError("a proof asserts nothing", where="comparisons", expected="one with asserted=True")


def prove(method: str, seeds: int = 5, out: str | Path | None = None) -> dict[str, Any]:
    """Run the proof of a method, print its table, and write `proof.json` and `proof.svg`.

    Each seed is an experiment of its own: each arm is tuned on that seed's validation data and reported on its test data,
    and arms are compared by Student's t interval (95 %) of the paired differences over seeds. The verdict is "shown" if all
    asserted comparisons hold. Finished trials are kept in `trials.jsonl`: killed and started again, a proof goes on.

    Args:
        method: A name in the registry, or `file.py:Class` with a `proof.py` beside the file.
        seeds: Number of seeds, at least 2; they are 0, 1, ...
        out: Folder for the results. Default: `runs/proof-METHOD`.

    Returns:
        What `proof.json` holds.

    Raises:
        UsageError: There is no such method, it has no proof, or there are too few seeds.
        RunError: The arms had different budgets, or an arm's result is not finite.
    """
    proof = load_proof(method)
    folder = Path(out or Path("runs") / f"proof-{method.rpartition(':')[2].lower()}")
    return run_proof(proof, method, seeds, folder, Path(method.rpartition(":")[0]).parent if ":" in method else None)


def run_proof(proof: Proof, name: str, seeds: int, folder: Path, code: Path | None = None) -> dict[str, Any]:
    """As `prove`, for a proof that belongs to no method.

    Args:
        proof: The proof.
        name: What it is called.
        seeds: Number of seeds, at least 2.
        folder: Folder for the results.
        code: Folder of Python files that trials depend on beside Limbeck; when they change, trials are done again.

    Raises:
        UsageError: There are too few seeds.
        RunError: The arms had different budgets, or an arm's result is not finite.
    """
    if seeds < 2:
        raise UsageError("a proof needs a spread", where="seeds", found=seeds, expected="2 or more")
    folder.mkdir(parents=True, exist_ok=True)
    trials = _Trials(folder / "trials.jsonl", _fingerprint(name, code))
    _run(proof, range(seeds), trials, name)
    result = {"method": name, **_judge(proof, list(range(seeds)), trials), **_lineage()}
    write_text(folder / "proof.json", _json(result))
    from limbeck.report.figures import proof_svg

    write_text(folder / "proof.svg", proof_svg(result))
    _show(result)
    return result


def load_proof(method: str) -> Proof:
    """The proof that lies beside a method.

    Raises:
        UsageError: There is no such method, or it has no proof.

    Example:
        >>> load_proof("kd").metric
        'accuracy (%)'
    """
    path = Path(inspect.getfile(registry.find(method))).with_name("proof.py")
    if not path.is_file():
        raise UsageError("this method has no proof", where=path, fix="write one; that of kd is a short example")
    proof: Proof = import_object(f"{path}:PROOF")
    return proof


def fit(
    program: Step | Method, m: Roles, data: Source | Data, optim: Mapping[str, OptimSpec], **engine: Any
) -> dict[str, Passes]:
    """Train roles with the engine on the CPU and leave nothing on disk.

    Args:
        program: A method's step, or a function that returns the loss of the only role that learns; or a whole method.
        m: The roles; for a step, those without an optimizer are frozen.
        data: The training data; for a whole method, its splits.
        optim: Optimizer of each role that learns.
        **engine: Fields of `Engine`, such as `epochs`, `batch_size` and `seed`.

    Returns:
        The passes through each role, of those too that the program makes; of a whole method's learning roles, only those in
        training mode.

    Example:
        >>> from limbeck import Optim
        >>> from limbeck.data import TensorSource
        >>> from limbeck.methods.kd.method import KD
        >>> m = Roles(teacher=nn.Linear(4, 3), student=nn.Linear(4, 3))
        >>> source = TensorSource(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> fit(KD().step, m, source, {"student": Optim()}, epochs=3, batch_size=2)["student"].backward
        6
    """
    settings = Engine(**{"device": "cpu", "evaluate_every": 0, **engine})
    if isinstance(program, Method):
        method, whole = program, True
    else:
        frozen = [name for name in m if name not in optim]
        method, whole = _OneStage(Train(program, roles=optim, frozen=frozen, data=data)), False
    with count_role_passes(m, optim if whole else ()) as passes:
        execute(method, m, data, settings, optim=optim)
    return passes


@dataclass(frozen=True, eq=False)
class _OneStage(Method):
    stage: Train

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        yield self.stage


def accuracy(m: Roles, source: Source, role: str = "student") -> float:
    """Share of right answers of a role, in per cent.

    Example:
        >>> from limbeck.data import TensorSource
        >>> accuracy(Roles(student=nn.Identity()), TensorSource(torch.eye(4), torch.tensor([0, 1, 2, 0])))
        75.0
    """
    scores, labels = predict(m[role], source)
    assert labels is not None, "accuracy needs labels"
    return 100 * topk_accuracy(scores, labels).item()


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose first weights follow from the seed; the global generator stays as it was.

    Example:
        >>> a, b = (seeded(3, lambda: nn.Linear(2, 1)) for _ in range(2))
        >>> bool((a.weight == b.weight).all())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class _Trials:
    """Finished trials by (arm, seed, value), kept in a file; those of other code are dropped."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.rows = path, {}
        head = {"fingerprint": fingerprint}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines or _parse(lines[0]) != head:
            write_text(path, json.dumps(head) + "\n")
            return
        for line in lines[1:]:
            if (row := _parse(line)) is not None:  # the last line may have been cut short by a kill
                self.rows[row["arm"], row["seed"], row["value"]] = row
        write_text(path, "".join(json.dumps(row) + "\n" for row in (head, *self.rows.values())))

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["arm"], row["seed"], row["value"]] = row


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _run(proof: Proof, seeds: Sequence[int], trials: _Trials, method: str) -> None:
    """Do the trials that are not done yet; seeds outermost, so that what arms share is made once."""
    from rich.console import Console
    from rich.progress import track

    keys = [(name, seed, value) for seed in seeds for name, arm in proof.arms.items() for value in arm.grid]
    left = [key for key in keys if key not in trials.rows]
    for name, seed, value in track(left, f"proof of {method}", console=Console(stderr=True), transient=True):
        start = time.perf_counter()
        trial = proof.arms[name].run(seed, value)
        seconds = round(time.perf_counter() - start, 3)
        row = {"arm": name, "seed": seed, "value": value, "validation": round(trial.validation, 6)}
        row |= {"test": round(trial.test, 6), "seconds": seconds, "passes": as_dict(dict(trial.passes))}
        trials.add(row | ({"also": {k: round(v, 6) for k, v in trial.also.items()}} if trial.also else {}))


def _judge(proof: Proof, seeds: list[int], trials: _Trials) -> dict[str, Any]:
    """Everything that follows from the trials."""
    arms = {name: _tune(proof, name, seeds, trials) for name in proof.arms}
    _same_budget(proof, arms)
    tests = {name: arm["test"] for name, arm in arms.items()}
    comparisons = [_compare(proof, c, tests) for c in proof.comparisons]
    holds = all(c["holds"] for c in comparisons if c["asserted"])
    return {
        "claim": proof.claim,
        "task": proof.task,
        "metric": proof.metric,
        "better": proof.better,
        "verdict": "shown" if holds else "not shown",
        "seeds": seeds,
        "arms": tests,
        "summary": {n: dict(zip(("mean", "deviation"), mean_deviation(v), strict=True)) for n, v in tests.items()},
        "comparisons": comparisons,
        "tuning": {name: {k: v for k, v in arm.items() if k not in ("test", "passes")} for name, arm in arms.items()},
        "cost": {
            "trials": len(seeds) * sum(len(arm.grid) for arm in proof.arms.values()),
            "seconds": round(sum(arm["seconds"] for arm in arms.values()), 1),
            "passes_per_trial": {name: arm["passes"] for name, arm in arms.items()},
        },
    }


def _tune(proof: Proof, name: str, seeds: Sequence[int], trials: _Trials) -> dict[str, Any]:
    """The trials of an arm: what was chosen for each seed by validation, and what it gave in the test."""
    arm, sign = proof.arms[name], 1 if proof.better == "higher" else -1
    table = [[trials.rows[name, seed, value] for value in arm.grid] for seed in seeds]
    # The first of equals; a diverged trial is never chosen.
    score = [[sign * r["validation"] if math.isfinite(r["validation"]) else -math.inf for r in row] for row in table]
    best = [max(range(len(arm.grid)), key=s.__getitem__) for s in score]
    test = [row[i]["test"] for row, i in zip(table, best, strict=True)]
    if not all(math.isfinite(v) for v in test):
        raise RunError("an arm of the proof has no finite result", where=name, found=test)
    chosen = [row[i].get("also", {}) for row, i in zip(table, best, strict=True)]
    also = {name: [row[name] for row in chosen] for name in chosen[0]}
    passes = [r["passes"] for row in table for r in row]
    counted = {json.dumps(p if proof.budget == "passes" else p["student"]["backward"], sort_keys=True) for p in passes}
    if len(counted) != 1:
        raise RunError("the trials of an arm had different budgets", where=name, found=sorted(counted))
    return {
        "tunes": arm.tunes,
        "grid": list(arm.grid),
        "chosen": [arm.grid[i] for i in best],
        "validation": [row[i]["validation"] for row, i in zip(table, best, strict=True)],
        "test": test,
        "test_by_value": {str(value): [row[i]["test"] for row in table] for i, value in enumerate(arm.grid)},
        "seconds": round(sum(r["seconds"] for row in table for r in row), 1),
        "passes": passes[0],
        **({"also": also} if also else {}),
    }


def _same_budget(proof: Proof, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Equally many forward and backward passes, or of the latter alone.

    The last batches of epochs may differ, by a tenth of the samples at most.
    """
    budgets = {name: arm["passes"].get("student") for name, arm in arms.items()}
    found = [budget for budget in budgets.values() if budget is not None]
    forward = proof.budget == "passes"
    steps = {(budget["forward"] if forward else 0, budget["backward"]) for budget in found}
    samples = [budget["examples"] if forward else 1 for budget in found]
    if len(found) < len(budgets) or len(steps) != 1 or min(samples) < 0.9 * max(samples):
        raise RunError("the arms of the proof had different budgets", where="passes through the student", found=budgets)


def _compare(proof: Proof, c: Comparison, tests: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    difference = paired_interval(tests[c.arm], tests[c.baseline])
    holds = difference.above(-c.margin) if proof.better == "higher" else difference.below(c.margin)
    return {**asdict(c), **asdict(difference), "holds": holds}


def _fingerprint(name: str, code: Path | None) -> str:
    """A hash of the code that trials depend on: the package, the folder of other code and torch."""
    folders = [Path(limbeck.__file__).parent, *([] if code is None else [code])]
    digest = hashlib.sha256(f"{name} {torch.__version__}".encode())
    for path in (p for folder in folders for p in sorted(folder.rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _lineage() -> dict[str, Any]:
    versions = {"limbeck": limbeck.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "environment": {**versions, "cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()},
        "commit": _commit(Path(limbeck.__file__).parent),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit(package: Path) -> str | None:
    """The commit of the checkout that the package lies in, `-dirty` with changes; None where it is installed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _json(result: Mapping[str, Any]) -> str:
    """JSON with one list of numbers or words a line."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return (
        re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n"
    )


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    arms = Table("arm", "mean ± deviation", "per seed", "tuned", title=result["metric"], title_justify="left")
    for name, values in result["arms"].items():
        summary, tuning = result["summary"][name], result["tuning"][name]
        spread = f"{summary['mean']:.2f} ± {summary['deviation']:.2f}"
        arms.add_row(name, spread, " ".join(f"{v:.1f}" for v in values), f"{tuning['tunes']} {tuning['chosen']}")
    columns = ("comparison", "mean", "interval", "asked", "holds")
    differences = Table(*columns, title="paired differences, 95 % intervals", title_justify="left")
    for c in result["comparisons"]:
        asked = f"not worse by {c['margin']:g}" if c["margin"] else "better"
        asked += "" if c["asserted"] else " (reported)"
        ends = f"[{c['low']:+.2f}, {c['high']:+.2f}]"
        holds = "yes" if c["holds"] else "no"
        differences.add_row(f"{c['arm']} - {c['baseline']}", f"{c['mean']:+.2f}", ends, asked, holds)
    console.print(arms, differences)
    console.print(f"{result['claim']}\nverdict: {result['verdict']}", markup=False, highlight=False)
