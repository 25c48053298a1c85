"""Twenty classes in five families: does an ensemble improve a student that is trained already?"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import Data, TensorSource
from limbeck.evaluate.baselines import plain_kd, supervised
from limbeck.evaluate.budget import Passes
from limbeck.methods.meal_v2.method import MEALV2
from limbeck.nn.discriminator import LogitDiscriminator
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded
from limbeck.teachers import Ensemble

OPTIM = Optim("adam", lr=0.003, schedule="cosine")
CLASSES, EPOCHS, BATCH, WIDTHS = 20, 30, 50, (192, 256, 320)
RATES = (0.0003, 0.001, 0.003, 0.01)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def draw(seed: int) -> Data:
    """40 samples per class to train, 100 to tune, 300 to test; 24 dimensions shown as 48."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 24, generator=g).repeat_interleave(4, 0) + 0.55 * torch.randn(CLASSES, 24, generator=g)
    mixing = torch.randn(24, 24, generator=g) / math.sqrt(24)

    def sample(count: int) -> TensorSource:
        y = torch.arange(CLASSES).repeat_interleave(count)
        z = centres[y] + 0.85 * torch.randn(len(y), 24, generator=g)
        return TensorSource(torch.cat([torch.tanh(z @ mixing), torch.sin(z)], 1), y)

    return Data(train=sample(40), validation=sample(100), test=sample(300))


def noisy(step: Step) -> Step:
    """The same step on inputs with noise of standard deviation 0.3, which teachers and student both see."""

    def program(m: Roles, batch: Batch) -> object:
        return step(m, batch.replace(x=batch.x + 0.3 * torch.randn(batch.x.shape, generator=m.rng("noise"))))

    return program  # type: ignore[return-value]


def trained(
    seed: int, module: nn.Module, data: Data, step: Step, lr: float, **roles: nn.Module
) -> tuple[Roles, dict[str, Passes]]:
    """A model after 30 epochs of one step program."""
    m = Roles(student=module, **roles)
    optim = {"student": replace(OPTIM, lr=lr)}
    if "discriminator" in roles:
        optim["discriminator"] = Optim("adam", lr=1e-3)
    return m, fit(noisy(step), m, data.train, optim, epochs=EPOCHS, batch_size=BATCH, seed=seed)


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, tuple[nn.Module, ...], nn.Module]:
    """The data, three teachers, and a student that labels have trained."""
    data = draw(seed)
    teachers = [
        trained(seed, seeded(10 * seed + i, partial(mlp, 48, w, CLASSES)), data, supervised, 0.003)[0].student.module
        for i, w in enumerate(WIDTHS)
    ]
    base, _ = trained(seed, seeded(1000 + seed, lambda: mlp(48, 12, CLASSES)), data, supervised, 0.01)
    return data, tuple(teachers), base.student.module


def student(
    seed: int, step: Step, lr: float = 0.003, members: int = 3, start: str = "base", **roles: nn.Module
) -> Trial:
    """30 epochs more of the base student, or of a fresh one."""
    data, teachers, base = task(seed)
    module = seeded(1000 + seed, lambda: mlp(48, 12, CLASSES))
    if start == "base":
        module.load_state_dict(base.state_dict())
    m, passes = trained(seed, module, data, step, lr, teacher=Ensemble(list(teachers[-members:])), **roles)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), passes)


def told_apart(seed: int, lr: float, variant: str) -> Trial:
    """With a discriminator of logits."""
    last = variant == "code"
    discriminator = LogitDiscriminator(CLASSES, last, torch.Generator().manual_seed(seed))
    return student(seed, MEALV2(variant=variant).step, lr, discriminator=discriminator)  # type: ignore[arg-type]


def hard_too(m: Roles, batch: Batch) -> Tensor:
    """Half of the soft loss, half of the labels'."""
    loss = next(iter(MEALV2(label_weight=0.5).step(m, batch))).loss
    assert loss is not None
    return loss


PROOF = Proof(
    claim="Soft labels of an ensemble improve a student that labels have trained, more than going on with labels and more than "
    "from a random start (Shen and Savvides 2020)",
    task="20 classes in 5 families, 48 inputs; three teachers MLP 48-192/256/320-20; a student MLP 48-12-20 that 30 epochs with "
    "labels have trained, and 30 epochs more of each arm ('from scratch' starts at random and has these 30 only); 40 samples "
    "per class to train, 100 to tune, 300 to test",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: student(seed, supervised, lr), "lr", RATES),
        "kd": Arm(lambda seed, tau: student(seed, partial(plain_kd, temperature=tau)), "temperature", TEMPERATURES),
        "one teacher": Arm(lambda seed, lr: student(seed, MEALV2().step, lr, members=1), "lr", RATES),
        "from scratch": Arm(lambda seed, lr: student(seed, MEALV2().step, lr, start="scratch"), "lr", RATES),
        "labels too": Arm(lambda seed, lr: student(seed, hard_too, lr), "lr", RATES),
        "code": Arm(lambda seed, lr: told_apart(seed, lr, "code"), "lr", RATES),
        "paper": Arm(lambda seed, lr: told_apart(seed, lr, "paper"), "lr", RATES),
        "meal_v2": Arm(lambda seed, lr: student(seed, MEALV2().step, lr), "lr", RATES),
    },
    comparisons=[
        Comparison("meal_v2", "labels alone"),
        Comparison("meal_v2", "from scratch"),
        Comparison("meal_v2", "kd", asserted=False),
        Comparison("meal_v2", "one teacher", asserted=False),
        Comparison("meal_v2", "labels too", asserted=False),
        Comparison("code", "meal_v2", asserted=False),
        Comparison("paper", "meal_v2", asserted=False),
    ],
)
