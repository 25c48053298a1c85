"""Digits whose training data are gone, and a pool in which most images are no digits: does choosing from it help?"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.method import Method, updates
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.core.update import Update
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.engine.settings import Engine
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.losses import kl
from limbeck.methods.kd3.method import KD3
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

OPTIM = Optim("adamw", lr=0.03, schedule="cosine")
EPOCHS, BATCH = 20, 50
SIZES = {"private": 500, "test": 500, "validation": 297, "digits": 500}
STRANGERS = 1250


def network(width: int) -> nn.Module:
    """Three convolutions with batch normalisation, the mean over places, a linear classifier."""
    body: list[nn.Module] = []
    for a, b, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        body += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def blobs(count: int, g: torch.Generator) -> Tensor:
    """Smooth random images `[count, 1, 8, 8]` in [0, 1]."""
    x = nn.functional.interpolate(torch.rand(count, 1, 3, 3, generator=g), size=8, mode="bicubic", align_corners=True)
    return x.clamp(0, 1)


def halves(digits: Tensor, g: torch.Generator) -> Tensor:
    """The upper half of each digit over the lower half of another, turned upside down."""
    other = digits[torch.randperm(len(digits), generator=g)]
    return torch.cat([digits[:, :, :4], other[:, :, :4]], dim=2)


def restyled(x: Tensor, g: torch.Generator) -> Tensor:
    """With contrast, brightness and noise of each image's own."""
    contrast = 0.5 + torch.rand(len(x), 1, 1, 1, generator=g)
    brightness = 0.4 * torch.rand(len(x), 1, 1, 1, generator=g) - 0.2
    return contrast * x + brightness + 0.1 * torch.randn(x.shape, generator=g)


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module]:
    """The teacher's 500 digits, 297 to tune on, 500 to test; the pool of 500 digits and 1250 other images; the teacher."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    y, g = torch.tensor(digits.target), torch.Generator().manual_seed(seed)
    parts = dict(zip(SIZES, torch.randperm(len(x), generator=g).split(list(SIZES.values())), strict=True))
    half = STRANGERS // 2
    swapped = halves(x[parts["digits"].repeat(2)], g)[:half]
    pool = restyled(torch.cat([x[parts["digits"]], blobs(STRANGERS - half, g), swapped]), g)
    found = {name: TensorSource(x[rows], y[rows]) for name, rows in parts.items() if name != "digits"}
    m = Roles(student=seeded(seed, lambda: network(24)))
    fit(supervised, m, found["private"], {"student": replace(OPTIM, lr=0.01)}, epochs=40, batch_size=BATCH, seed=seed)
    return Data(**found, unlabelled=TensorSource(pool)), m.student.module


@dataclass(frozen=True)
class Plain(Method):
    """One step program as a method."""

    program: Step

    def step(self, m: Roles, batch: Batch) -> Tensor:
        """The loss of the student."""
        return self.program(m, batch)  # type: ignore[return-value]


def unlabelled_kd(m: Roles, batch: Batch, temperature: float) -> Tensor:
    """Distillation by softened probabilities alone."""
    with torch.no_grad():
        teacher = m.teacher(batch)
    return kl(m.student(batch), teacher, temperature=temperature)


def counted(method: Method, passes: Passes) -> Method:
    """The method, whose training steps add their passes through the student; what it looks at to choose is not training."""

    class Counted(type(method)):  # type: ignore[misc]
        def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
            whole: Any = m.student.module  # of a student that has borrowed, the part whose maps the loss reads
            body = whole.backbone.get_submodule(whole.maps) if hasattr(whole, "maps") else whole
            with count_passes(student=body) as found:
                yield from updates(super().step, m, batch, "student")
            for name, value in vars(found["student"]).items():
                setattr(passes, name, getattr(passes, name) + value)

    return Counted(**vars(method))


def student(seed: int, method: Method, split: str = "unlabelled", lr: float = OPTIM.lr, views: int = 1) -> Trial:
    """A student trained by one method; where each step looks at two views, there are half as many."""
    data, teacher = task(seed)
    m = Roles(teacher=teacher, student=seeded(1000 + seed, lambda: network(4)))
    epochs = EPOCHS * len(data.unlabelled) // len(data[split]) // views
    engine = Engine(epochs=epochs, batch_size=BATCH, seed=seed, device="cpu", evaluate_every=0)
    passes, optim = Passes(), {"student": replace(OPTIM, lr=lr)}
    execute(counted(method, passes), m, Data(train=data[split]), engine, optim=optim)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), {"student": passes})


RATES = (0.003, 0.01, 0.03, 0.1)
CUTOFFS = (0.5, 0.8, 0.95, 0.99)
WHOLE = KD3(cutoff=0.0, weighted=False, contrastive_weight=0.0)

PROOF = Proof(
    claim="A student that borrows the teacher's classifier and learns from the images that teacher and student are sure about "
    "is better than with all images of the pool, and than by distillation on the pool (Tang et al. 2023, ablation)",
    task="scikit-learn's digits: a teacher of width 24 trained on 500; a pool of 500 others in random styles and 1250 images "
    "that are no digits; students of width 4, 700 passes of 50 images; 297 digits to tune on, 500 to test. 'labels alone' "
    "sees the teacher's own labelled digits, which no other arm has; 'kd3' has two passes, and so half as many steps",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: student(seed, Plain(supervised), "private", lr), "lr", RATES),
        "kd": Arm(
            lambda seed, tau: student(seed, Plain(partial(unlabelled_kd, temperature=tau))),
            "temperature",
            (1.0, 2.0, 4.0, 8.0),
        ),
        "shared classifier": Arm(lambda seed, lr: student(seed, WHOLE, lr=lr), "lr", RATES),
        "selection": Arm(lambda seed, cutoff: student(seed, replace(WHOLE, cutoff=cutoff)), "cutoff", CUTOFFS),
        "kd3": Arm(lambda seed, cutoff: student(seed, KD3(cutoff=cutoff), views=2), "cutoff", CUTOFFS),
    },
    comparisons=[
        Comparison("selection", "kd"),
        Comparison("selection", "shared classifier"),
        Comparison("shared classifier", "kd", asserted=False),
        Comparison("kd3", "selection", asserted=False),
        Comparison("kd3", "kd", asserted=False),
        Comparison("selection", "labels alone", asserted=False),
    ],
)
