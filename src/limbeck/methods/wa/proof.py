"""Twenty classes in five groups: does the newest group drown the older ones, and does weight aligning prevent it?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.update import Update
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.engine.settings import Engine
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.evaluate.tasks import predict
from limbeck.methods.wa.method import WA
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

CLASSES, GROUPS, LATENT, INPUTS = 20, 5, 20, 40
SIZES = {"train": 150, "validation": 50, "test": 50}
OPTIM = Optim("sgd", lr=0.05, momentum=0.9)
RATES = (0.003, 0.01, 0.03, 0.1, 0.2)
EPOCHS, BATCH, MEMORY = 20, 64, 60


@lru_cache(maxsize=1)
def task(seed: int) -> Data:
    """20 Gaussian classes in 20 dimensions, seen through a random layer: 150 of each to train, 50 to tune, 50 to test."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, LATENT, generator=g)
    mixing = torch.randn(LATENT, INPUTS, generator=g) / math.sqrt(LATENT)

    def draw(each: int) -> TensorSource:
        y = torch.arange(CLASSES).repeat_interleave(each)
        z: Tensor = centres[y] + 0.8 * torch.randn(len(y), LATENT, generator=g)  # [N, 20]
        return TensorSource(torch.tanh(1.5 * z @ mixing), y)

    return Data(**{name: draw(each) for name, each in SIZES.items()})


@dataclass(frozen=True)
class Counted(WA):
    """The method, with a count of its passes through the student and the old model, which are new modules again and again."""

    passes: dict[str, Passes] = field(default_factory=lambda: {"student": Passes(), "old": Passes()})

    def step(self, m: Roles, batch: Batch, increment: int = 1) -> Iterator[Update]:
        """One update of the student."""
        models: dict[str, Any] = {name: m[name].module for name in self.passes if name in m}
        with count_passes(**models) as found:
            yield from super().step(m, batch, increment)
        for name, one in found.items():
            for count, value in vars(one).items():
                setattr(self.passes[name], count, getattr(self.passes[name], count) + value)


def learn(seed: int, lr: float, **fields: Any) -> tuple[Roles, dict[str, Passes]]:
    """A student after all increments; it never sees what it is judged on."""
    method = Counted(increments=GROUPS, memory=MEMORY, order_seed=None, **fields)
    m = Roles(student=seeded(1000 + seed, lambda: mlp(INPUTS, 128, 64, CLASSES)))
    engine = Engine(epochs=EPOCHS, batch_size=BATCH, seed=seed, device="cpu", evaluate_every=0)
    execute(method, m, Data(train=task(seed).train), engine, optim={"student": replace(OPTIM, lr=lr)})
    return m, method.passes


def arm(**fields: Any) -> Arm:
    """The method with some of its parts, tuned in the learning rate."""

    def trial(seed: int, lr: float) -> Trial:
        m, passes = learn(seed, lr, **fields)
        return Trial(accuracy(m, task(seed).validation), accuracy(m, task(seed).test), passes)

    return Arm(trial, "lr", RATES)


def newest_share(seed: int, lr: float, **fields: Any) -> float:
    """How many of the test images, in per cent, are taken for one of the newest group; 20 would be right."""
    m, _ = learn(seed, lr, **fields)
    answers, _ = predict(m.student, task(seed).test)
    return 100 * (answers.argmax(1) >= CLASSES - CLASSES // GROUPS).float().mean().item()


def jointly(seed: int, lr: float) -> float:
    """Test accuracy with the data of all classes at once, for as many steps: what groups cost."""
    m = Roles(student=seeded(1000 + seed, lambda: mlp(INPUTS, 128, 64, CLASSES)))
    steps = sum(-(-n // BATCH) for n in (600, *[600 + MEMORY] * (GROUPS - 1))) * EPOCHS
    optim = {"student": replace(OPTIM, lr=lr)}
    fit(supervised, m, task(seed).train, optim, steps=steps, batch_size=BATCH, seed=seed)
    return accuracy(m, task(seed).test)


PROOF = Proof(
    claim="A student that learns classes in groups by distillation from its former self takes old images for new classes; with "
    "clipped and aligned weights of the head it does so less and ends more accurate (Zhao et al. 2020)",
    task="20 Gaussian classes in five groups of 4, 40 inputs, 150 samples of each to train on and 60 of all to remember; MLP "
    "40-128-64-20, 20 epochs for each group in batches of 64; judged on all classes, 50 of each to tune on and 50 to test",
    metric="accuracy (%)",
    arms={
        "labels alone": arm(label_weight=1.0, clip=False, align=False),
        "wa without kd": arm(label_weight=1.0),
        "kd": arm(clip=False, align=False),
        "kd, aligned": arm(clip=False),
        "kd, clipped": arm(align=False),
        "wa": arm(),
    },
    comparisons=[
        Comparison("wa", "labels alone"),
        Comparison("wa", "kd"),
        Comparison("wa", "kd, clipped"),
        Comparison("wa", "wa without kd", asserted=False),
        Comparison("wa", "kd, aligned", asserted=False),
        Comparison("wa without kd", "labels alone", asserted=False),
        Comparison("kd, clipped", "kd", asserted=False),
    ],
)
