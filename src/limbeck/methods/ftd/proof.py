"""One digit of each class: do flat experts let a student go its own way for longer?"""

from functools import partial

import torch

from limbeck.data.condensed import Condensed
from limbeck.methods.digits_condensed_proof import begun, condense, experts, network, unchanged
from limbeck.methods.ftd.method import FTD
from limbeck.optim.unroll import unroll
from limbeck.prove import Arm, Comparison, Proof, Trial, seeded
from limbeck.teachers.trajectories import Trajectories

MATCHED, RATES, SEGMENTS = 4, (0.15, 0.5, 1.0, 2.0, 4.0, 8.0), 5
BASE = FTD(
    radius=0.0, experts=6, epochs=14, expert_lr=0.05, expert_batch_size=64, student_steps=10, starts=10, step_size=0.02,
    step_size_lr=1e-4, ema=0.0, form="full",
)  # fmt: skip
FLAT = FTD(**{**vars(BASE), "radius": 0.03})


def accumulated(method: FTD, known: Trajectories, small: Condensed, expert: int) -> float:
    """`||w - w*|| / ||w* - w_0||` where the student, from `w_0` on, has gone through five segments without being put back."""
    net = seeded(0, network)
    w = known(expert, 0).detach()
    assert small.step_size is not None
    size = small.step_size.detach()
    inner = method.following.inner(net, small.y, torch.tensor([0]))
    with torch.no_grad():
        for _ in range(SEGMENTS):
            (w,) = unroll(inner, w, small(), size, method.student_steps)
            w = w.detach()
    target = known(expert, SEGMENTS * method.expert_epochs)
    return float((w - target).norm() / (target - known(expert, 0)).norm())


def run(method: FTD, matched: bool, seed: int, lr: float) -> Trial:
    """A set, followed along two experts that were not matched: one to choose by, one to report."""
    known, small = experts(seed, method.expert_training), begun(seed, method.step_size)
    passes = unchanged()
    if matched:
        small, passes = condense(seed, lr, method, known, small, MATCHED)
    else:
        assert small.step_size is not None
        small.step_size.data *= lr / RATES[1]
    validation, test = (accumulated(method, known, small, expert) for expert in (4, 5))
    return Trial(validation, test, passes)


PROOF = Proof(
    claim="Experts that are trained along flat valleys are followed with less accumulated error than plain ones, by sets of the "
    "same size (Du et al. 2023)",
    task="8x8 digits, 1 sample of each class, 64-64-10 MLP, 4 experts of 14 epochs matched, 250 iterations of N = 10, M = 2; "
    "the student then goes through five segments on its own, along experts that were not matched",
    metric="accumulated trajectory error, the distance to the expert over the way it went",
    arms={
        "real samples": Arm(partial(run, BASE, False), "factor of the step size", RATES),
        "mtt": Arm(partial(run, BASE, True), "lr", RATES),
        "ftd": Arm(partial(run, FLAT, True), "lr", RATES),
    },
    comparisons=[
        Comparison("ftd", "mtt"),
        Comparison("ftd", "real samples"),
        Comparison("mtt", "real samples", asserted=False),
    ],
    better="lower",
)
