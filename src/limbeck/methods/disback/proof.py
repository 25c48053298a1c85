"""A student that begins far from the data: straight to the teacher, and back along the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.update import Update
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.disback.method import DisBack
from limbeck.methods.mixture_proof import begun, truth
from limbeck.prove import Arm, Comparison, Proof, Trial, fit

STEPS, BATCH, RATES, KIND, NEAR, EVERY = 400, 128, (3e-4, 6e-4, 1e-3), "ring", 0.05, 20
# Chosen on seed 100: the rate of fake, at which straight was fastest, and the marks and steps, at which going back was.
FAKE, NODES, SWITCH, OFF = 1e-2, (2, 5, 12, 30, 250), 10, 6.0


class Watch:
    """The student's distance to the data every so many steps, on noise to choose by and on noise to report."""

    def __init__(self, seed: int) -> None:
        self.seed, self.count, self.near = seed, 0, [STEPS, STEPS]

    @torch.no_grad()
    def __call__(self, m: Roles) -> None:
        """Look, if it is time."""
        if self.count % EVERY == 0:
            for k, first in enumerate((2000, 3000)):
                g = torch.Generator().manual_seed(first + self.seed)
                x = m.student.module.forward(torch.randn(1000, 2, generator=g))  # no call that is counted
                if self.near[k] == STEPS and energy_distance(x, truth(KIND).sample(1000, g)) <= NEAR:
                    self.near[k] = self.count
        self.count += 1


@dataclass(frozen=True)
class Watched(DisBack):
    """The method, looked at in every step of the student."""

    watch: Callable[[Roles], None] | Any = None

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """As the method's."""
        self.watch(m)
        yield from super().step(m, batch)


def run(nodes: tuple[int, ...], off: float, seed: int, lr: float) -> Trial:
    """Steps until the student is near, from `off` units away."""
    student: Any = begun(seed, KIND)
    watch = Watch(seed)
    student.net.last[1].bias.data -= off  # the network gives the velocity: noise less sample
    m = Roles(teacher=begun(seed, KIND), student=student)
    method = Watched(nodes, SWITCH, times=(0.02, 0.6), watch=watch)
    optim = {"student": Optim("adam", lr=lr), "fake": Optim("adam", lr=FAKE)}
    data = Data(train=Noise((2,), 64 * BATCH, seed=seed))
    passes = fit(method, m, data, optim, steps=STEPS, batch_size=BATCH, seed=seed)
    validation, test = map(float, watch.near)
    return Trial(validation, test, passes)


PROOF = Proof(
    claim="A student that begins far from the data is led back faster along the distributions that a network went through on "
    "the way to it than straight to the teacher (Zhang et al. 2025)",
    task="8 Gaussians on a ring; teacher, student and fake begin as networks of 3 x 64 trained on samples, the student's "
    f"samples {OFF:g} units off in both numbers, judged at noise levels up to 0.6; {STEPS} steps of {BATCH}; fake has "
    f"{NODES[-1]} steps more where it is warm",
    metric=f"steps of the student until its energy distance is {NEAR:g} ({STEPS} if never)",
    arms={
        "direct": Arm(partial(run, (), OFF), "lr", RATES),
        "direct, warm fake": Arm(partial(run, NODES[-1:], OFF), "lr", RATES),
        "direct, near": Arm(partial(run, (), 0.0), "lr", RATES),
        "disback, near": Arm(partial(run, NODES, 0.0), "lr", RATES),
        "disback": Arm(partial(run, NODES, OFF), "lr", RATES),
    },
    comparisons=[
        Comparison("disback", "direct"),
        Comparison("disback", "direct, warm fake"),
        Comparison("disback, near", "direct, near", asserted=False),
    ],
    better="lower",
)
