"""What the proofs of recovery from batch statistics share: digits, networks that remember them, and what a set is judged by."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.embedded import digits
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.evaluate.condensation import Training, accuracy, train_on
from limbeck.nn.convnet import ConvNet
from limbeck.prove import fit, seeded

ITERATIONS, TRAININGS, EACH = 100, 1, 5
JUDGE = Training(steps=200, optim=Optim("adamw", lr=0.01, weight_decay=0.01, schedule="cosine"))
KINDS = ((32, 3), (24, 2), (16, 3), (32, 2))  # width and blocks


@lru_cache(maxsize=2)
def splits(seed: int) -> Any:
    """The digits, divided anew for each seed."""
    return digits(seed)


def network(kind: int = 0) -> ConvNet:
    """A convolutional network with batch normalisation."""
    width, depth = KINDS[kind]
    return ConvNet(10, channels=1, size=8, width=width, depth=depth, norm="batch")


@lru_cache(maxsize=16)
def teacher(seed: int, kind: int = 0, number: int = 0) -> ConvNet:
    """A network trained on the digits."""
    m = Roles(student=seeded(1000 * number + seed, lambda: network(kind)))
    optim = {"student": Optim("adamw", lr=0.01, schedule="cosine")}
    fit(supervised, m, splits(seed).train, optim, epochs=8, batch_size=64, seed=seed)
    trained: Any = m.student.module.eval()
    return trained


def made(method: Method, seed: int, lr: float, small: Condensed, *teachers: nn.Module) -> Condensed:
    """What a method makes of a set."""
    names = ["teacher"] if len(teachers) == 1 else [f"teacher_{i}" for i in range(len(teachers))]
    m = Roles(**dict(zip(names, teachers, strict=True)), student=small)
    optim = {"student": Optim("adam", lr=lr, betas=(0.5, 0.9), schedule="cosine")}
    fit(method, m, splits(seed), optim, steps=ITERATIONS, seed=seed)
    found: Any = m.student.module
    return found


def real(seed: int, each: int = EACH) -> Condensed:
    """Random real images of each class."""
    return from_source(splits(seed).train, each, seed)


def judged(seed: int, small: Condensed, kind: int = 0) -> tuple[float, float, dict[str, Passes]]:
    """The mean accuracy in per cent of networks of a kind trained on a set, on validation and test images; the passes."""
    scores, passes = [], Passes()
    for k in range(TRAININGS):
        net = seeded(100 * seed + k, lambda: network(kind))
        with count_passes(learning=True, student=net) as counts:
            train_on(small, net.train(), JUDGE, k)
        passes = Passes(*(a + b for a, b in zip(vars(passes).values(), vars(counts["student"]).values(), strict=True)))
        scores.append([100 * accuracy(net, splits(seed)[split]) for split in ("validation", "test")])
    validation, test = (sum(column) / TRAININGS for column in zip(*scores, strict=True))
    return validation, test, {"student": passes}


@torch.no_grad()
def diversity(net: ConvNet, x: Tensor, y: Tensor) -> float:
    """The mean cosine distance between a network's features of two images of one class, times 100."""
    features = F.normalize(net.features(x), dim=1)
    distances = []
    for c in y.unique():
        own = features[y == c]
        n = len(own)
        distances.append((1 - own @ own.T).sum() / (n * (n - 1)))
    return 100 * float(torch.stack(distances).mean())
