"""Soft targets as regularisers: a student that sees a ninth of the digits, with the teacher's probabilities or without."""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import nn

from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import Data, TensorSource
from limbeck.evaluate.baselines import supervised
from limbeck.methods.kd.method import KD
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

OPTIM = Optim("adamw", lr=0.01, schedule="cosine")


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module]:
    """1797 images: 899 for the teacher, of which the student sees the first 100; 300 to tune on, 598 to test."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    images = TensorSource(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    m = Roles(student=seeded(seed, lambda: mlp(64, 256, 10)))
    fit(supervised, m, images.subset(order[:899]), {"student": OPTIM}, epochs=30, seed=seed)
    cuts = {"train": order[:100], "validation": order[899:1199], "test": order[1199:]}
    return Data(**{name: images.subset(rows) for name, rows in cuts.items()}), m.student.module


def student(seed: int, step: Step, lr: float = OPTIM.lr) -> Trial:
    """A student trained by one step program."""
    data, teacher = task(seed)
    m = Roles(student=seeded(1000 + seed, lambda: mlp(64, 32, 10)), teacher=teacher)
    passes = fit(step, m, data.train, {"student": replace(OPTIM, lr=lr)}, epochs=150, batch_size=20, seed=seed)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), passes)


PROOF = Proof(
    claim="Soft targets of a teacher that has seen all the data let a student learn from a ninth of it what hard or smoothed "
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
