"""Forty classes in eight families: does the teacher's order of the classes, weighted by its confidence, teach more?"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import TensorSource
from limbeck.evaluate.metrics import topk_accuracy
from limbeck.losses import kl, list_mle
from limbeck.methods.pld.method import PLD
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

OPTIM = Optim("adamw", lr=0.01, schedule="cosine")


class Task(NamedTuple):
    """The samples of one seed, and a teacher."""

    train: TensorSource
    validation: TensorSource
    test: TensorSource
    teacher: nn.Module


def mlp(*widths: int) -> nn.Module:
    """A network of linear layers with ReLU between them."""
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.ReLU(), nn.Linear(a, b))]
    return nn.Sequential(*layers[1:])


@lru_cache(maxsize=1)
def task(seed: int) -> Task:
    """Classes scattered about 8 centres in 24 dimensions, bent into 48; per class 60 samples to train, 60 to tune, 200 to test."""
    rng = torch.Generator().manual_seed(seed)
    families = torch.randn(8, 1, 24, generator=rng)
    centres = (families + 0.55 * torch.randn(8, 5, 24, generator=rng)).flatten(0, 1)  # [40, 24]
    bend = torch.randn(24, 24, generator=rng) / 24**0.5

    def draw(count: int) -> TensorSource:
        z = centres + 0.75 * torch.randn(count, 40, 24, generator=rng)
        x = torch.cat([(z @ bend).tanh(), z.sin()], -1)
        return TensorSource(x.flatten(0, 1), torch.arange(40).repeat(count))

    train, validation, test = draw(60), draw(60), draw(200)
    teacher = seeded(seed, lambda: mlp(48, 256, 256, 40))
    optim = {"student": replace(OPTIM, lr=0.002, weight_decay=0.1)}
    fit(supervised, Roles(student=teacher), train, optim, epochs=15, batch_size=100, seed=seed)
    return Task(train, validation, test, teacher)


def supervised(m: Roles, batch: Batch) -> Tensor:
    """Cross-entropy with the labels alone."""
    return F.cross_entropy(m.student(batch), batch.y)


@torch.no_grad()
def accuracy(m: Roles, source: TensorSource) -> float:
    """Share of right answers of the student, in per cent."""
    assert source.y is not None
    return 100 * topk_accuracy(m.student(source.x), source.y).item()
