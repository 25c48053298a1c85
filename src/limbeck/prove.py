"""Claims that run: a method against its baselines, with one budget and equally large grids, paired over seeds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import limbeck
from limbeck.core import registry
from limbeck.core.batch import Batch
from limbeck.core.errors import RunError, UsageError
from limbeck.core.method import updates
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.evaluate.budget import Passes, as_dict, count_passes
from limbeck.evaluate.compare import mean_deviation, paired_interval


@dataclass(frozen=True)
class Trial:
    """What one arm gave for one seed and one value of its hyper-parameter.

    Args:
        validation: The metric that the value is chosen by.
        test: The metric that is reported.
        passes: Passes through each model, as `fit` returns them; those of the student must be equal in all arms.
    """

    validation: float
    test: float
    passes: Mapping[str, Passes]


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
    grid: Sequence[Any]


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
    """

    claim: str
    task: str
    metric: str
    arms: Mapping[str, Arm]
    comparisons: Sequence[Comparison]
    better: Literal["higher", "lower"] = "higher"

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
    if seeds < 2:
        raise UsageError("a proof needs a spread", where="seeds", found=seeds, expected="2 or more")
    proof = load_proof(method)
    folder = Path(out or Path("runs") / f"proof-{method.rpartition(':')[2].lower()}")
    folder.mkdir(parents=True, exist_ok=True)
    trials = _Trials(folder / "trials.jsonl", _fingerprint(method))
    _run(proof, range(seeds), trials, method)
    result = {"method": method, **_judge(proof, list(range(seeds)), trials), **_lineage()}
    _write(folder / "proof.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    from limbeck.report.figures import proof_svg

    _write(folder / "proof.svg", proof_svg(result))
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
    kind = registry.find(method)
    if ":" in method:
        path = Path(method.rpartition(":")[0]).with_name("proof.py")
        if not path.is_file():
            raise UsageError("this method has no proof", where=path, fix="write one; limbeck/methods/kd/proof.py is short")
        module = registry._module_at(path)
    else:
        module = import_module(f"{kind.__module__.rpartition('.')[0]}.proof")
    proof: Proof = module.PROOF
    return proof


def fit(
    step: Step, m: Roles, data: Batch, *, epochs: int, batch_size: int, seed: int, optim: Mapping[str, Optim]
) -> dict[str, Passes]:
    """Train roles in a plain loop over a batch that holds all data; what the engine does, without files.

    Args:
        step: A method's step.
        m: The roles; those without an optimizer are frozen.
        data: All samples.
        epochs: Passes over the data.
        batch_size: Samples per step; an incomplete last batch is left out.
        seed: Of the order.
        optim: Optimizer of each role that learns.

    Returns:
        The passes through each role.

    Example:
        >>> from limbeck.methods.kd.method import KD
        >>> m = Roles(teacher=nn.Linear(4, 3), student=nn.Linear(4, 3))
        >>> data = Batch(x=torch.eye(4), y=torch.tensor([0, 1, 2, 0]))
        >>> fit(KD().step, m, data, epochs=3, batch_size=2, seed=0, optim={"student": Optim()})["student"].backward
        6
    """
    m.freeze(*(name for name in m if name not in optim))
    optimizers = {role: spec.build(m[role].module) for role, spec in optim.items()}
    params = {role: [p for g in o.param_groups for p in g["params"]] for role, o in optimizers.items()}
    order = torch.Generator().manual_seed(seed)
    m.seed, m.step, m.total = seed, 0, epochs * (len(data) // batch_size)
    schedules = {
        role: torch.optim.lr_scheduler.LambdaLR(o, lambda _, spec=optim[role]: spec.factor(m.step, m.total))
        for role, o in optimizers.items()
    }
    sole = next(iter(optim)) if len(optim) == 1 else None
    with count_passes(**{name: role.module for name, role in m.items()}) as passes:
        for m.epoch in range(epochs):
            rows = torch.randperm(len(data), generator=order)
            for part in rows[: len(rows) // batch_size * batch_size].split(batch_size):
                for update in updates(step, m, data[part], sole):
                    update.loss.backward(inputs=params[update.role])
                    if update.apply:
                        optimizers[update.role].step()
                        optimizers[update.role].zero_grad()
                m.step += 1
                for schedule in schedules.values():
                    schedule.step()
    return passes


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
            _write(path, json.dumps(head) + "\n")
            return
        for line in lines[1:]:
            if (row := _parse(line)) is not None:  # the last line may have been cut short by a kill
                self.rows[row["arm"], row["seed"], row["value"]] = row
        _write(path, "".join(json.dumps(row) + "\n" for row in (head, *self.rows.values())))

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["arm"], row["seed"], row["value"]] = row


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
