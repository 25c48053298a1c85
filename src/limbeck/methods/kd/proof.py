"""Soft targets as regularisers: a student that sees a tenth of the digits, with the teacher's probabilities or without."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Step
from limbeck.data import TensorSource
from limbeck.evaluate.metrics import topk_accuracy
from limbeck.methods.kd.method import KD
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

OPTIM = Optim("adamw", lr=0.01, schedule="cosine")


class Task(NamedTuple):
    """The digits of one seed, and a teacher that has seen all training images."""

    seen: Source
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    teacher: nn.Module


def mlp(width: int) -> nn.Module:
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@lru_cache(maxsize=1)
def task(seed: int) -> Task:
    """1797 images: 899 for the teacher, of which the student sees the first 100; 300 to tune on, 598 to test."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    train = TensorSource(x[:899], y[:899])
    teacher = seeded(seed, lambda: mlp(256))
    fit(supervised, Roles(student=teacher), train, {"student": OPTIM}, epochs=30, batch_size=64, seed=seed)
    return Task(train.subset(range(100)), (x[899:1199], y[899:1199]), (x[1199:], y[1199:]), teacher)


def supervised(m: Roles, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels alone."""
    return F.cross_entropy(m.student(batch), batch.y, label_smoothing=smoothing)


def student(seed: int, step: Step, lr: float = OPTIM.lr) -> Trial:
    """A student trained by one step program."""
    data = task(seed)
    m = Roles(student=seeded(1000 + seed, lambda: mlp(32)), teacher=data.teacher)
    passes = fit(step, m, data.seen, {"student": replace(OPTIM, lr=lr)}, epochs=150, batch_size=20, seed=seed)
    return Trial(accuracy(m, *data.validation), accuracy(m, *data.test), passes)


@torch.no_grad()
def accuracy(m: Roles, x: Tensor, y: Tensor) -> float:
    """Share of right answers of the student, in per cent."""
    return 100 * topk_accuracy(m.student(x), y).item()


PROOF = Proof(
    claim="Soft targets of a teacher that has seen all the data let a student learn from a tenth of it what hard or smoothed "
    "labels do not teach (Hinton, Vinyals and Dean 2015, section 6)",
    task="scikit-learn's digits; teacher MLP 64-256-10 trained on 899 images, student MLP 64-32-10 trained on 100 of them for "
    "750 steps of 20; 300 images to tune on, 598 to test",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: student(seed, supervised, lr), "lr", (0.001, 0.003, 0.01, 0.03)),
        "label smoothing": Arm(
            lambda seed, s: student(seed, partial(supervised, smoothing=s)), "smoothing", (0.05, 0.1, 0.2, 0.4)
        ),
        "kd": Arm(lambda seed, tau: student(seed, KD(temperature=tau).step), "temperature", (1.0, 2.0, 4.0, 8.0)),
    },
    comparisons=[Comparison("kd", "labels alone"), Comparison("kd", "label smoothing")],
)
