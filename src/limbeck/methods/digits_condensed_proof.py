"""What the proofs of trajectory matching share: digits, a small network, experts, and what a set is judged by."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.embedded import digits
from limbeck.evaluate.budget import Passes
from limbeck.evaluate.condensation import Training, accuracy, fresh, train_on
from limbeck.nn.mlp import mlp
from limbeck.prove import fit, seeded
from limbeck.teachers.trajectories import ExpertTraining, Segments, Trajectories, train_experts

ITERATIONS, TRAININGS = 250, 3
INSIDE = "network, steps inside"
JUDGE = Training(
    steps=300, optim=Optim("sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(0.5,))
)


def network() -> nn.Module:
    """64 pixels, 64 hidden units, 10 classes."""
    return nn.Sequential(nn.Flatten(), mlp(64, 64, 10))


@lru_cache(maxsize=2)
def splits(seed: int) -> Any:
    """The digits, divided anew for each seed."""
    return digits(seed)


@lru_cache(maxsize=8)
def experts(seed: int, training: ExpertTraining) -> Trajectories:
    """Experts for a seed, in a folder that goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="limbeck-experts-")
    net = seeded(seed, network)
    training = replace(training, seed=seed)
    train_experts(net, splits(seed).train, folder.name, training)
    found = Trajectories(folder.name, net, training)
    found._folder = folder  # type: ignore[attr-defined]  # kept as long as they are
    return found


def condense(
    seed: int, lr: float, method: Any, known: Trajectories, small: Condensed, matching: int
) -> tuple[Condensed, Any]:
    """A set under a method's step: `matching` experts, the given rate of the samples; and the passes, of steps inside too."""
    m = Roles(teacher=seeded(seed, network), student=small)
    optim = Optim("sgd", lr=lr, momentum=0.5, lr_multipliers={"step_size": method.step_size_lr / lr})
    step = partial(method.follow, known)
    passes = fit(
        step, m, Segments(matching, method.starts), {"student": optim}, steps=ITERATIONS, batch_size=1, seed=seed
    )
    return small, {"student": passes["student"], INSIDE: passes["teacher"]}


def unchanged() -> dict[str, Passes]:
    """The passes of as many iterations that change nothing: real samples need none, and no steps inside."""
    return {"student": Passes(ITERATIONS, ITERATIONS, 0), INSIDE: Passes()}


def planned(method: Any) -> dict[str, Passes]:
    """The passes of a trial that ends before its time: those that it had been given."""
    steps = ITERATIONS * method.student_steps
    return {"student": Passes(ITERATIONS, ITERATIONS, 0), INSIDE: Passes(steps, steps, 10 * steps)}


def begun(seed: int, step_size: float, rows: Tensor | None = None) -> Condensed:
    """One real sample of each class, or the rows given."""
    if rows is None:
        real = from_source(splits(seed).train, 1, seed)
        return Condensed(real.x, real.y, step_size=step_size, learn=("x", "step_size"))
    batch = splits(seed).train.batch(rows, 0)
    return Condensed(batch.x, batch.y, step_size=step_size, learn=("x", "step_size"))


def judged(seed: int, small: Condensed) -> tuple[float, float]:
    """The mean accuracy in per cent of networks trained on a set from scratch, on validation and test digits."""
    scores = []
    for k in range(TRAININGS):
        trained = train_on(small, fresh(network(), 100 * seed + k), JUDGE, k)
        scores.append([100 * accuracy(trained, splits(seed)[split]) for split in ("validation", "test")])
    validation, test = (sum(column) / len(column) for column in zip(*scores, strict=True))
    return validation, test
