"""Forty classes in eight families: does the teacher's order of the classes, weighted by its confidence, teach more?"""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import Data
from limbeck.data.procedural import superclasses
from limbeck.evaluate.baselines import plain_kd, supervised
from limbeck.losses import list_mle
from limbeck.methods.pld.method import PLD
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

OPTIM = Optim("adamw", lr=0.03, schedule="cosine")
RATES = (0.003, 0.01, 0.03, 0.1)


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module]:
    """40 classes in 8 families, 60 samples of each to train, 60 to tune and 200 to test; and a teacher."""
    drawn = superclasses(seed, per_class=200)
    few = torch.arange(40 * 200).view(40, 200)[:, :60].flatten()
    data = Data(train=drawn.train.subset(few), validation=drawn.validation.subset(few), test=drawn.test)
    m = Roles(student=seeded(seed, lambda: mlp(48, 256, 256, 40)))
    optim = {"student": replace(OPTIM, lr=0.002, weight_decay=0.1)}
    fit(supervised, m, data.train, optim, epochs=15, batch_size=100, seed=seed)
    return data, m.student.module


def uniform(m: Roles, batch: Batch) -> Tensor:
    """The same ranking with equal weights: ListMLE, divided by the number of classes."""
    with torch.no_grad():
        teacher = m.teacher(batch)
    return list_mle(m.student(batch), teacher, batch.y) / teacher.shape[-1]


def student(seed: int, step: Step, lr: float = OPTIM.lr) -> Trial:
    """A student trained by one step program."""
    data, teacher = task(seed)
    m = Roles(student=seeded(1000 + seed, lambda: mlp(48, 12, 40)), teacher=teacher)
    passes = fit(step, m, data.train, {"student": replace(OPTIM, lr=lr)}, epochs=30, batch_size=100, seed=seed)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), passes)


PROOF = Proof(
    claim="A choice-theoretic list-wise loss, weighted by the teacher's confidence, teaches more than the labels or the ranking "
    "alone and no less than distillation by KL (Bassam, Zhu and Bian 2025, section 5)",
    task="40 classes in 8 families, 48 inputs; teacher MLP 48-256-256-40, student MLP 48-12-40, both trained on 60 samples per "
    "class, the student for 720 steps of 100; 60 per class to tune on, 200 to test",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: student(seed, supervised, lr), "lr", RATES),
        "uniform ListMLE": Arm(lambda seed, lr: student(seed, uniform, lr), "lr", RATES),
        "kd": Arm(
            lambda seed, tau: student(seed, partial(plain_kd, temperature=tau)), "temperature", (1.0, 2.0, 4.0, 8.0)
        ),
        "pld": Arm(lambda seed, tau: student(seed, PLD(temperature=tau).step), "temperature", (0.5, 1.0, 2.0, 4.0)),
    },
    comparisons=[
        Comparison("pld", "labels alone"),
        Comparison("pld", "uniform ListMLE"),
        Comparison("pld", "kd", margin=0.5),
    ],
)
