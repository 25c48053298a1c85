"""Soft targets as regularisers: a student that sees a tenth of the digits, with the teacher's probabilities or without."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import TensorSource
from limbeck.evaluate.metrics import topk_accuracy
from limbeck.methods.kd.method import KD
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

SEEN, VALIDATION = 100, 300
OPTIM = Optim("adamw", lr=3e-3, schedule="cosine")


class Task(NamedTuple):
    """The digits of one seed, and a teacher that has seen all training images."""

    seen: TensorSource
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    teacher: nn.Module


def mlp(width: int) -> nn.Module:
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@lru_cache(maxsize=1)
def task(seed: int) -> Task:
    """1797 images: 899 to train, of which the student sees 100; 300 to tune, 598 to test."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    half = len(x) // 2 + 1
    cuts = [half, VALIDATION, len(x) - half - VALIDATION]
    (train_x, *held_x), (train_y, *held_y) = x.split(cuts), y.split(cuts)
    teacher = seeded(seed, lambda: mlp(256))
    train = TensorSource(train_x, train_y)
    fit(supervised, Roles(student=teacher), train, {"student": OPTIM}, epochs=30, batch_size=64, seed=seed)
    return Task(train.subset(range(SEEN)), (held_x[0], held_y[0]), (held_x[1], held_y[1]), teacher)


def supervised(m: Roles, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels alone."""
    return F.cross_entropy(m.student(batch), batch.y, label_smoothing=smoothing)


def train(seed: int, step: Step, optim: Optim = OPTIM) -> Trial:
    """A student trained by one step program."""
    data = task(seed)
    m = Roles(student=seeded(1000 + seed, lambda: mlp(32)), teacher=data.teacher)
    passes = fit(step, m, data.seen, {"student": optim}, epochs=60, batch_size=20, seed=seed)
    return Trial(accuracy(m, *data.validation), accuracy(m, *data.test), passes)


@torch.no_grad()
def accuracy(m: Roles, x: Tensor, y: Tensor) -> float:
    """Share of right answers of the student, in per cent."""
    return 100 * topk_accuracy(m.student(x), y).item()
