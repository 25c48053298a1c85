"""Digits of which a fifth is labelled wrongly: do generations that are guided by these labels beat one long fit to them?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.core.update import Update
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.engine.settings import Engine
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.methods.kd.method import KD
from limbeck.methods.self_distillation.kernel import distill_duals, optimal_label_weight
from limbeck.methods.self_distillation.method import SelfDistillation
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

SIZES = {"train": 500, "validation": 500, "test": 797}
NOISE, GENERATIONS = 0.2, 3
FITS = 2 * GENERATIONS + 1  # that a chain with estimated weights has; all arms have as many passes
EPOCHS, BATCH = 40, 50
OPTIM = Optim("adamw", lr=0.005, schedule="cosine")
DECAYS = (0.03, 0.3, 1.0)


@lru_cache(maxsize=1)
def task(seed: int) -> Data:
    """500 images to train on and 500 to tune and estimate on, of both a fifth with a wrong label; 797 to test, all right."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    g = torch.Generator().manual_seed(seed)
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=g)
    wrong = torch.rand(len(x), generator=g) < NOISE
    wrong[order[-SIZES["test"] :]] = False
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=g)) % 10, y)
    images, cuts = TensorSource(x, y), order.split(list(SIZES.values()))
    return Data(**{name: images.subset(rows) for name, rows in zip(SIZES, cuts, strict=True)})


@dataclass(frozen=True)
class Counted(SelfDistillation):
    """The method, with a count of its passes through the student, which is a new module again and again."""

    passes: Passes = field(default_factory=Passes)

    def step(self, m: Roles, batch: Batch, **fields: Any) -> Iterator[Update]:  # type: ignore[override]
        """One update of the student."""
        with count_passes(student=m.student.module) as found:
            yield super().step(m, batch, **fields)
        add(self.passes, found["student"])


def add(total: Passes, passes: Passes) -> None:
    """Add a count to another."""
    for name, value in vars(passes).items():
        setattr(total, name, getattr(total, name) + value)


def student(seed: int, fit: int = 0) -> Roles:
    """A student before training."""
    return Roles(student=seeded(1000 + 10 * seed + fit, lambda: mlp(64, 64, 10)))


def judged(seed: int, m: Roles, passes: Passes) -> Trial:
    """The numbers of a student."""
    return Trial(accuracy(m, task(seed).validation), accuracy(m, task(seed).test), {"student": passes})


def learn(seed: int, m: Roles, step: Step, decay: float, fits: int) -> Passes:
    """Train a student by one step program for as long as so many fits take."""
    optim = {"student": replace(OPTIM, weight_decay=decay)}
    return fit(step, m, task(seed).train, optim, epochs=fits * EPOCHS, batch_size=BATCH, seed=seed)["student"]


def long(seed: int, decay: float) -> Trial:
    """One fit to the labels with all the passes."""
    return judged(seed, m := student(seed), learn(seed, m, supervised, decay, FITS))


def best(seed: int, decay: float) -> Trial:
    """As many fits to the labels as there are passes for, of which validation data choose one."""
    total, trials = Passes(), list[Trial]()
    for i in range(FITS):
        add(total, learn(seed, m := student(seed, i), supervised, decay, 1))
        trials.append(judged(seed, m, total))
    return max(trials, key=lambda trial: trial.validation)


def kd(seed: int, decay: float) -> Trial:
    """A teacher that has a part of the passes, and a student of the same architecture that has the others."""
    first, m = student(seed, 1), student(seed)
    total = learn(seed, first, supervised, decay, FITS // 2)
    m.teacher = first.student.module
    add(total, learn(seed, m, KD(label_weight=0.5).step, decay, FITS - FITS // 2))
    return judged(seed, m, total)


def chain(label_weight: float | str) -> Arm:
    """Generations after a first fit; where there are fewer trainings, each is longer."""

    def trial(seed: int, decay: float) -> Trial:
        method = Counted(generations=GENERATIONS, label_weight=label_weight)  # type: ignore[arg-type]
        epochs = EPOCHS if label_weight == "estimate" else EPOCHS * FITS / (GENERATIONS + 1)
        engine = Engine(epochs=epochs, batch_size=BATCH, seed=seed, device="cpu", evaluate_every=0)
        data = Data(train=task(seed).train, validation=task(seed).validation)
        result = execute(method, student(seed), data, engine, optim={"student": replace(OPTIM, weight_decay=decay)})
        return judged(seed, result.roles, method.passes)

    return Arm(trial, "weight_decay", DECAYS)


PROOF = Proof(
    claim="A network that is refitted on its own outputs and on the labels, mixed as held-out data ask, is better than one "
    "that is fitted to the labels (Borup and Andersen 2021, in direction)",
    task="scikit-learn's digits, a fifth of the labels of 500 images to train on and 500 to tune and estimate on replaced by "
    "wrong ones; MLP 64-64-10, 7 fits of 40 epochs for each arm (the fits of shorter chains are longer); 797 images to test",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(long, "weight_decay", DECAYS),
        "labels, best of 7": Arm(best, "weight_decay", DECAYS),
        "kd": Arm(kd, "weight_decay", DECAYS),
        "mse, labels alone": chain(1.0),
        "no labels": chain(0.0),
        "half": chain(0.5),
        "self_distillation": chain("estimate"),
    },
    comparisons=[
        Comparison("self_distillation", "labels alone"),
        Comparison("self_distillation", "mse, labels alone"),
        Comparison("self_distillation", "labels, best of 7", asserted=False),
        Comparison("self_distillation", "kd", asserted=False),
        Comparison("self_distillation", "no labels", asserted=False),
        Comparison("self_distillation", "half", asserted=False),
    ],
)


# The theory, on the data that it is about


@dataclass(frozen=True)
class Ridge:
    """Kernel ridge regression, self-distilled: means over splits.

    Args:
        unguided: Squared error on test data after each step at a label weight of 0; the first is the ordinary fit.
        guided: The same with estimated label weights.
        weights: Mean of the estimated label weights of the steps after the first.
        first: Squared error at step 2 with the estimated label weight, of each split.
        searched: The same with the best of 11 label weights by validation data.
    """

    unguided: tuple[float, ...]
    guided: tuple[float, ...]
    weights: tuple[float, ...]
    first: tuple[float, ...]
    searched: tuple[float, ...]


def ridge(
    penalties: Sequence[float] = (0.03, 0.1, 0.3, 1.0), splits: int = 20, steps: int = 4
) -> Mapping[float, Ridge]:
    """Self-distilled kernel ridge regression on scikit-learn's diabetes data, standardised, kernel exp(-0.05 |x - x'|^2).

    Args:
        penalties: Of the fit.
        splits: Random splits into 200 points to train on, 100 to estimate on, and 142 to test.
        steps: Number of fits.

    Returns:
        What each penalty gives.

    Example:
        >>> found = ridge(penalties=[1.0], splits=2)[1.0]
        >>> found.unguided[0] == found.guided[0], len(found.weights)
        (True, 3)
    """
    runs = {penalty: [_split(penalty, seed, steps) for seed in range(splits)] for penalty in penalties}
    found = {}
    for penalty, rows in runs.items():
        unguided, guided, weights, searched = (np.array(part) for part in zip(*rows, strict=True))
        means = [tuple(part.mean(0).tolist()) for part in (unguided, guided, weights)]
        found[penalty] = Ridge(means[0], means[1], means[2], tuple(guided[:, 1].tolist()), tuple(searched.tolist()))
    return found


def _split(penalty: float, seed: int, steps: int) -> tuple[list[float], list[float], list[float], float]:
    """One split: errors without labels, with estimated weights, these weights, and the error of the searched weight."""
    x, y = require("sklearn.datasets", extra="vision").load_diabetes(return_X_y=True, scaled=False)
    train, held, test = np.split(np.random.default_rng(seed).permutation(len(x)), [200, 300])
    x, y = (x - x[train].mean(0)) / x[train].std(0), (y - y[train].mean()) / y[train].std()

    def kernel(rows: Any) -> Any:
        return np.exp(-0.05 * ((x[rows, None] - x[train]) ** 2).sum(-1))

    gram, to_held, to_test = kernel(train), kernel(held), kernel(test)

    def duals(*weights: float) -> Any:
        return distill_duals(gram, y[train], alpha=penalty, label_weight=weights, steps=len(weights) + 1)

    def error(to: Any, rows: Any, c: Any) -> float:
        return float(((to @ c - y[rows]) ** 2).mean())

    weights = list[float]()
    for _ in range(steps - 1):
        alone = duals(*weights, 0.0)
        weights.append(optimal_label_weight(y[held], to_held @ alone[0], to_held @ alone[-1]))
    grid = [duals(w)[1] for w in np.linspace(0, 1, 11)]
    searched = min(grid, key=lambda c: error(to_held, held, c))
    unguided, guided = ([error(to_test, test, c) for c in duals(*ws)] for ws in ([0.0] * (steps - 1), weights))
    return unguided, guided, weights, error(to_test, test, searched)
