"""Digits and a tower of residual blocks: when should sub-networks join the training, at equal cost?"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import Data, TensorSource
from limbeck.evaluate.budget import Passes
from limbeck.evaluate.recalibrate import recalibrate
from limbeck.methods.deps.method import DepS
from limbeck.nn.elastic import Elastic
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

BATCH, PASSES = 50, 1932
RATES = (0.01, 0.03, 0.1)
OPTIM = Optim("sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, schedule="cosine", clip=5.0)
METHOD = DepS(expand=(8 / 96, 24 / 96, 1.0), depth=(1, 2, 4), ramp=5 / 60)
JUDGED = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 2))  # places of width and depth among their choices: least, between, most


class Block(nn.Module):
    """`x + fc2(relu(bn(fc1(x))))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """The output `[B, D]`."""
        return x + self.fc2(self.bn(self.fc1(x)).relu())


class Noisy(TensorSource):
    """Samples with Gaussian noise that is drawn anew for every view."""

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows`."""
        batch = super().batch(rows, view)
        noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(7919 * view + int(rows.sum())))
        return batch.replace(x=batch.x + 0.35 * noise)


def tower() -> nn.Module:
    """A stem, four blocks and a head."""
    return nn.Sequential(nn.Linear(64, 32), nn.Sequential(*(Block(32, 96) for _ in range(4))), nn.Linear(32, 10))


@lru_cache(maxsize=1)
def task(seed: int) -> Data:
    """400 digits to train on, 400 to tune on, 997 to test."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, validation, test = order.split([400, 400, 997])
    held = {"validation": TensorSource(x[validation], y[validation]), "test": TensorSource(x[test], y[test])}
    return Data(train=Noisy(x[train], y[train]), **held)


def steps_for(method: DepS) -> int:
    """The steps in which a method passes PASSES batches through the student: one each before sub-networks join, then all."""
    start = max(0.0, method.delay - method.ramp)
    for steps in range(PASSES // method.subnets, PASSES + 1):
        if method.subnets * steps - (method.subnets - 1) * round(start * steps) == PASSES:
            return steps
    raise ValueError(f"no number of steps gives {PASSES} passes at {start}")


@lru_cache(maxsize=256)
def trained(seed: int, method: DepS, lr: float) -> tuple[list[float], list[float], Passes]:
    """Accuracy of the judged sub-networks on validation and test data, each with statistics of its own."""
    data, m = task(seed), Roles(student=seeded(seed, tower))
    optim = {"student": replace(OPTIM, lr=lr)}
    passes = fit(method, m, data, optim, steps=steps_for(method), batch_size=BATCH, seed=seed)
    elastic = m.student.module
    assert isinstance(elastic, Elastic)
    inputs = [data.train.batch(rows, 100_000).x for rows in torch.arange(400).split(200)]
    scores: tuple[list[float], list[float]] = ([], [])
    for width, depth in JUDGED:
        arch = {name: sizes[depth if name == "1" else width] for name, sizes in elastic.space.choices.items()}
        small = Roles(student=recalibrate(elastic.extract(arch), inputs))
        for found, split in zip(scores, ("validation", "test"), strict=True):
            found.append(accuracy(small, data[split]))
    return *scores, passes["student"]


def mean(seed: int, method: DepS, lr: float) -> Trial:
    """The mean over the judged sub-networks."""
    validation, test, passes = trained(seed, method, lr)
    return Trial(sum(validation) / len(validation), sum(test) / len(test), {"student": passes})


def one(place: int, seed: int, method: DepS, lr: float) -> Trial:
    """One of them, of the training that is best in the mean."""
    validation, test, passes = trained(seed, method, lr)
    return Trial(sum(validation) / len(validation), test[place], {"student": passes})


EARLY, QUARTER, LATE = (replace(METHOD, delay=delay) for delay in (0.0, 0.25, 0.75))
ABRUPT = replace(METHOD, delay=METHOD.delay - METHOD.ramp, ramp=0.0)

PROOF = Proof(
    claim="Sub-networks that join when the whole network is half trained end better, on the whole, than those that train from "
    "the start at equal cost, and joining later costs the smallest (Annavajjala et al. 2024)",
    task="scikit-learn's digits with noise of 0.35: 400 to train on, 400 to tune on, 997 to test; a stem, 4 residual blocks of "
    "96 hidden units with batch norm, sub-networks have 1, 2 or 4 with 8, 24 or 96; 1932 passes of 50 samples",
    metric="accuracy (%), mean of five sub-networks; 'smallest' and 'largest': of that one alone",
    arms={
        "early": Arm(lambda seed, lr: mean(seed, replace(EARLY, ramp=0.0), lr), "lr", RATES),
        "deps, 25 %": Arm(lambda seed, lr: mean(seed, QUARTER, lr), "lr", RATES),
        "deps": Arm(lambda seed, lr: mean(seed, METHOD, lr), "lr", RATES),
        "deps, 75 %": Arm(lambda seed, lr: mean(seed, LATE, lr), "lr", RATES),
        "deps, no ramp": Arm(lambda seed, lr: mean(seed, ABRUPT, lr), "lr", RATES),
        "early, smallest": Arm(lambda seed, lr: one(0, seed, replace(EARLY, ramp=0.0), lr), "lr", RATES),
        "deps, smallest": Arm(lambda seed, lr: one(0, seed, METHOD, lr), "lr", RATES),
        "75 %, smallest": Arm(lambda seed, lr: one(0, seed, LATE, lr), "lr", RATES),
        "early, largest": Arm(lambda seed, lr: one(4, seed, replace(EARLY, ramp=0.0), lr), "lr", RATES),
        "deps, largest": Arm(lambda seed, lr: one(4, seed, METHOD, lr), "lr", RATES),
        "75 %, largest": Arm(lambda seed, lr: one(4, seed, LATE, lr), "lr", RATES),
    },
    comparisons=[
        Comparison("deps", "early"),
        Comparison("deps, smallest", "75 %, smallest"),
        Comparison("deps", "deps, 75 %", asserted=False),
        Comparison("deps", "deps, 25 %", asserted=False),
        Comparison("deps", "deps, no ramp", asserted=False),
        Comparison("deps, smallest", "early, smallest", asserted=False),
        Comparison("deps, largest", "early, largest", asserted=False),
        Comparison("75 %, largest", "deps, largest", asserted=False),
    ],
)
