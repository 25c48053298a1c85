"""A step of each method of the classify family over a step of distillation: the same networks, taking turns in one run.

    python benchmarks/steps.py --out benchmarks/results/steps.json

ResNet-20 teaches ResNet-8 on images of 32 pixels, 100 classes, batches of 32; for LELP there are 2 classes. A step is both
forward passes, the backward pass and the optimizer. Times are of the process's CPU, on one thread.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, options, report, spread
from torch import nn

from limbeck import Method, Roles
from limbeck.core.method import updates
from limbeck.data import TensorSource
from limbeck.methods.kd.method import KD
from limbeck.methods.kd3.method import KD3
from limbeck.methods.kd3.student import BorrowClassifier
from limbeck.methods.lelp.method import LELP
from limbeck.methods.meal_v2.method import MEALV2
from limbeck.methods.pld.method import PLD
from limbeck.methods.ssld.method import SSLD
from limbeck.models.specs import import_object
from limbeck.nn.discriminator import LogitDiscriminator
from limbeck.prove import seeded
from limbeck.teachers import Ensemble

resnet: Callable[[int, int], nn.Module] = import_object(f"{Path(__file__).parents[1] / 'recipes' / 'cifar.py'}:resnet")


def images(classes: int, count: int = 128) -> TensorSource:
    """Noise, in equally many images of each class."""
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorSource(x, torch.arange(count) % classes, ids=torch.arange(count))


def stepper(method: Method, source: TensorSource, classes: int, teachers: int = 1) -> Callable[[], None]:
    """One whole step of a method, with roles of its own."""
    above = [seeded(i, partial(resnet, 3, classes)) for i in range(teachers)]
    m = Roles(teacher=above[0] if teachers == 1 else Ensemble(above), student=seeded(9, partial(resnet, 1, classes)))
    m.freeze("teacher")
    batch = source.batch(torch.arange(32), 0)
    if isinstance(method, LELP):
        method.prepare(m, source)
    if isinstance(method, KD3):
        embed = method.embed_dim if method.contrastive_weight else 0
        m.convert("student", BorrowClassifier.between(m.teacher, m.student, batch, embed))
    learning = {"student"}
    if isinstance(method, MEALV2) and method.variant != "off":
        m.discriminator = LogitDiscriminator(classes, method.variant == "code")
        learning.add("discriminator")
    optimizers = {
        name: torch.optim.SGD([p for p in m[name].parameters() if p.requires_grad], lr=1e-3) for name in learning
    }

    def step() -> None:
        for update in updates(method.step, m, batch, "student"):
            update.backward(m)
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()

    return step


def compare(methods: dict[str, Callable[[], None]], rounds: int, steps: int = 2) -> dict[str, Any]:
    """Time of a step of each, and over that of `kd`, by rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 2):  # two to warm up
        for name, step in methods.items():
            start = time.process_time()
            for _ in range(steps):
                step()
            times[name].append(1e3 * (time.process_time() - start) / steps)
    times = {name: values[2:] for name, values in times.items()}
    ratios = {
        name: spread([a / b for a, b in zip(values, times["kd"], strict=True)])
        for name, values in times.items()
        if name != "kd"
    }
    return {"step_ms": {name: spread(values) for name, values in times.items()}, "over_kd": ratios}


def main() -> None:
    """Measure and report."""
    given = options(__doc__ or "", rounds=25)
    torch.set_num_threads(1)
    many: tuple[TensorSource, int] = (images(100), 100)
    few: tuple[TensorSource, int] = (images(2), 2)
    plain: dict[str, Method] = {
        "kd": KD(), "pld": PLD(), "ssld": SSLD(), "kd3": KD3(), "kd3, no contrast": KD3(contrastive_weight=0.0)
    }  # fmt: skip
    hundred = {name: stepper(method, *many) for name, method in plain.items()}
    hundred["meal_v2, one teacher"] = stepper(MEALV2(), *many)
    hundred["meal_v2, one teacher, code"] = stepper(MEALV2(variant="code"), *many)
    hundred["meal_v2, three teachers"] = stepper(MEALV2(), *many, teachers=3)
    two = {"kd": stepper(KD(label_weight=0.0), *few), "lelp": stepper(LELP(), *few)}
    found = {"100 classes": compare(hundred, given.rounds), "2 classes": compare(two, given.rounds)}
    report({**found, "machine": machine()}, given.out)


if __name__ == "__main__":
    main()
