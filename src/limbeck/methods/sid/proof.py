"""A ring of eight modes under an exact teacher: one step and four, by the identity and by distribution matching."""

from collections.abc import Iterator
from functools import partial

import torch

from limbeck.convert.steps import ToSampler
from limbeck.core.batch import Batch
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.core.update import Update
from limbeck.data.noise import Noise
from limbeck.diffusion import Draws, surrogate
from limbeck.diffusion.scores import denoising_loss, matching_gradient
from limbeck.methods.mixture_proof import begun, coverage, denoise, distance, distil, drawn, truth
from limbeck.methods.sid.method import SiD
from limbeck.prove import Arm, Comparison, Proof, Trial

STEPS, BATCH, RATES, KIND = 600, 128, (1e-3, 3e-3, 1e-2), "ring"


def matching(m: Roles, batch: Batch) -> Iterator[Update]:
    """Distribution matching of one step (DMD)."""
    draws = Draws(m, batch)
    z = draws.normal("fake noise", batch.x)
    with torch.no_grad():
        x = m.student(z)
    yield Update("fake", denoising_loss(m, "fake", draws, x, times=(0.001, 1.0)))
    x = m.student(batch.x)
    yield Update("student", surrogate(x, matching_gradient(m, draws, x), "sum"))


def run(program: Step, steps: int, fake: bool, seed: int, lr: float) -> Trial:
    """A student under one program; on the ring."""
    times = [1 - i / steps for i in range(steps)]
    m = Roles(teacher=truth(KIND), student=ToSampler(times)(begun(seed, KIND))[0])
    rates = {"student": lr}
    if fake:
        m.fake, rates["fake"] = begun(seed, KIND), 3e-3
    data = Noise((2,), 64 * BATCH, seed=seed) if fake else drawn(seed, KIND)
    passes = distil(program, m, data, rates, STEPS, BATCH, seed)
    also = {"energy distance x 100": distance(m.student, KIND, 3000 + seed), **coverage(m.student, KIND, 3000 + seed)}
    also.pop("on_mode")
    return Trial(
        coverage(m.student, KIND, 2000 + seed)["on_mode"],
        coverage(m.student, KIND, 3000 + seed)["on_mode"],
        passes,
        also,
    )


def arm(alpha: float, steps: int) -> Arm:
    """The method at three rates of the student."""
    return Arm(partial(run, SiD(steps=steps, alpha=alpha).step, steps, True), "lr", RATES)


PROOF = Proof(
    claim="Score identity distillation makes a generator of one step out of a diffusion model, and one network trained on the "
    "mixture of its steps makes a better one of four (Zhou et al. 2024, 2025)",
    task=f"8 Gaussians on a ring, the teacher exact; networks of 3 x 64 trained on samples of it before; "
    f"{STEPS} steps of {BATCH}",
    metric="samples within 4.2 standard deviations of a mode (%)",
    arms={
        "more denoising": Arm(partial(run, denoise, 1, False), "lr", RATES),
        "more denoising, 4 steps": Arm(partial(run, denoise, 4, False), "lr", RATES),
        "dmd": Arm(partial(run, matching, 1, True), "lr", RATES),
        "sid, alpha 0.5": arm(0.5, 1),
        "sid, alpha 1.2": arm(1.2, 1),
        "sid": arm(1.0, 1),
        "sid, 4 steps": arm(1.0, 4),
    },
    comparisons=[
        Comparison("sid", "more denoising"),
        Comparison("sid, 4 steps", "sid"),
        Comparison("sid, 4 steps", "more denoising, 4 steps"),
        Comparison("sid", "dmd", asserted=False),
        Comparison("sid", "sid, alpha 0.5", asserted=False),
        Comparison("sid", "sid, alpha 1.2", asserted=False),
    ],
    budget="updates",
)
