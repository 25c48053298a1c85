"""Digits with one weight of eight: is a mask that training prepares worth more than one that is imposed?"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import nn

from limbeck.convert.parametrized import Finalise, Parametrize, under
from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data import Data, TensorSource
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes
from limbeck.methods.cast.method import CAST
from limbeck.methods.kd.method import KD
from limbeck.nn.mlp import mlp
from limbeck.nn.nm import MaskedNM
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

BATCH, EPOCHS = 50, 80
OPTIM = Optim("adam", lr=2e-3, schedule="cosine", final=0.1, warmup=0.05)
N, M = 1, 8
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
DECAYS = (3e-3, 1e-2, 3e-2, 1e-1)
SR_DECAYS = (2e-4, 2e-3, 2e-2, 2e-1)


@dataclass(frozen=True)
class Masked(Method):
    """The same losses under a mask that is imposed: from the start (fixed or chosen anew), or at the end (one-shot)."""

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    when: str = "start"
    fixed: bool = False
    decay: float = 0.0

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Mask and train, or train and mask."""
        arguments = {"n": N, "m": M, "dense_gradient": not self.fixed}
        mask = Convert("student", Parametrize("limbeck.nn.nm:MaskedNM", arguments))
        train = Train(self.step, roles={"student": None}, frozen=self.frozen, data=data.train)
        first, second = (mask, train) if self.when == "start" else (train, mask)
        yield first
        yield second
        yield Convert("student", Finalise())

    def step(self, m: Roles, batch: Batch) -> Generator[Update, None, None]:
        """CAST's loss, and SR-STE's decay of what the mask leaves out."""
        (update,) = KD(temperature=1.0, label_weight=2 / 3).step(m, batch)
        assert update.loss is not None
        decay = torch.zeros(())
        for weight, made in under(m.student.module, MaskedNM):
            if not self.fixed:
                made.refresh(weight)
            decay = decay + (weight * ~made.mask).square().sum() / 2
        yield replace(update, loss=update.loss + self.decay * decay)


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module]:
    """Half of the digits to train on, a third of the rest to tune on; a dense network of 40 epochs."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, validation, test = (TensorSource(x, y).subset(rows) for rows in order.split([898, 300, 599]))
    dense = seeded(seed, lambda: mlp(64, 32, 32, 10))
    m = Roles(student=dense)
    fit(supervised, m, train, {"student": Optim("adam", lr=2e-3)}, epochs=40, batch_size=BATCH, seed=seed)
    return Data(train=train, validation=validation, test=test), dense


def roles(seed: int) -> Roles:
    """The dense network, frozen, and a copy."""
    dense = task(seed)[1]
    copy = mlp(64, 32, 32, 10)
    copy.load_state_dict(dense.state_dict())
    return Roles(teacher=dense, student=copy)


def trained(seed: int, method: Method, lr: float = OPTIM.lr) -> tuple[Data, Roles, Passes]:
    """The roles after a method, and the student's passes."""
    data, m = task(seed)[0], roles(seed)
    optim = {"student": replace(OPTIM, lr=lr)}
    passes = fit(method, m, data, optim, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    return data, m, passes["student"]


def trial(seed: int, method: Method, lr: float = OPTIM.lr) -> Trial:
    """The accuracy after folding."""
    data, m, passes = trained(seed, method, lr)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), {"student": passes})


class Unfolded(CAST):
    """The method up to the last moment before weights are masked."""

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """All stages but the last."""
        program, answer = super().stages(m, data), None
        while not isinstance(stage := program.send(answer), Convert) or stage.name == "sparsify":
            answer = yield stage


@lru_cache(maxsize=64)
def both(seed: int, method: Unfolded) -> tuple[Trial, Trial]:
    """One training, judged after folding and before; both are tuned by what is seen after it."""
    data, m, passes = trained(seed, method)
    before = accuracy(m, data.test)
    m.convert("student", Finalise())
    validation = accuracy(m, data.validation)
    found = {"student": passes}
    return Trial(validation, accuracy(m, data.test), found), Trial(validation, before, found)


def cast(seed: int, decay: float, folded: bool = True, **fields: Any) -> Trial:
    """The method."""
    return both(seed, Unfolded(n=N, m=M, decay=decay, **fields))[0 if folded else 1]


PROOF = Proof(
    claim="Weights that an optimizer drives to zero while the mask settles end better than weights under an imposed mask, and "
    "masking them at the end costs nothing (Huang et al. 2025)",
    task="scikit-learn's digits: an MLP 64-32-32-10 trained for 40 epochs on 898 images, then 80 towards 1:8 in both hidden "
    "layers with the dense network as teacher; 300 images to tune on, 599 to test",
    metric="accuracy (%)",
    arms={
        "dense": Arm(lambda seed, lr: trial(seed, KD(temperature=1.0, label_weight=2 / 3), lr), "lr", RATES),
        "one-shot": Arm(lambda seed, lr: trial(seed, Masked("end"), lr), "lr", RATES),
        "fixed mask": Arm(lambda seed, lr: trial(seed, Masked(fixed=True), lr), "lr", RATES),
        "SR-STE": Arm(lambda seed, decay: trial(seed, Masked(decay=decay)), "decay", SR_DECAYS),
        "cast": Arm(cast, "decay", DECAYS),
        "cast, unfolded": Arm(partial(cast, folded=False), "decay", DECAYS),
        "cast, labels alone": Arm(partial(cast, label_weight=1.0), "decay", DECAYS),
        "cast, no scaling": Arm(partial(cast, scale_blocks=0), "decay", DECAYS),
    },
    comparisons=[
        Comparison("cast", "SR-STE"),
        Comparison("cast", "fixed mask", margin=0.5),
        Comparison("cast", "cast, unfolded", margin=0.5),
        Comparison("cast", "one-shot"),
        Comparison("cast", "cast, labels alone", asserted=False),
        Comparison("cast", "cast, no scaling", asserted=False),
        Comparison("cast", "dense", asserted=False),
    ],
)
