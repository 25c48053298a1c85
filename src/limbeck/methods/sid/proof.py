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

STEPS, BATCH, RATES = 600, 128, (3e-4, 1e-3, 3e-3)


def matching(m: Roles, batch: Batch) -> Iterator[Update]:
    """Distribution matching of one step (DMD)."""
    draws = Draws(m, batch)
    z = draws.normal("fake noise", batch.x)
    with torch.no_grad():
        x = m.student(z)
    yield Update("fake", denoising_loss(m, "fake", draws, x, times=(0.001, 1.0)))
    x = m.student(batch.x)
    yield Update("student", surrogate(x, matching_gradient(m, draws, x), "sum"))


def run(program: Step, steps: int, fake: bool, kind: str, seed: int, lr: float) -> Trial:
    """A student under one program."""
    times = [1 - i / steps for i in range(steps)]
    m = Roles(teacher=truth(kind), student=ToSampler(times)(begun(seed, kind))[0])
    rates = {"student": lr}
    if fake:
        m.fake, rates["fake"] = begun(seed, kind), 3e-3
    data = Noise((2,), 64 * BATCH, seed=seed) if fake else drawn(seed, kind)
    passes = distil(program, m, data, rates, STEPS, BATCH, seed)
    validation, test = (coverage(m.student, kind, first + seed) for first in (2000, 3000))
    also = {"energy distance x 100": distance(m.student, kind, 3000 + seed), "weights": test["weights"]}
    return Trial(validation["on_mode"], test["on_mode"], passes, also)


def on(kind: str, about: str) -> Proof:
    """The proof on one of the mixtures, its arms at three rates of the student."""

    def arm(program: Step, steps: int = 1, fake: bool = True) -> Arm:
        return Arm(partial(run, program, steps, fake, kind), "lr", RATES)

    return Proof(
        claim="Score identity distillation makes a generator of one step out of a diffusion model, and one network trained on "
        "the mixture of its steps makes a better one of four (Zhou et al. 2024, 2025)",
        task=f"{about}, the teacher exact; networks of 3 x 64 trained on samples of it before; {STEPS} steps of {BATCH}",
        metric="samples within 3 standard deviations of a mode (%)",
        arms={
            "more denoising": arm(denoise, fake=False),
            "dmd": arm(matching),
            "sid, alpha 0.5": arm(SiD(steps=1, alpha=0.5).step),
            "sid, alpha 1.2": arm(SiD(steps=1, alpha=1.2).step),
            "sid": arm(SiD(steps=1).step),
            "sid, 4 steps": arm(SiD(steps=4).step, 4),
        },
        comparisons=[
            Comparison("sid", "more denoising"),
            Comparison("sid, 4 steps", "sid"),
            Comparison("sid, 4 steps", "more denoising"),
            Comparison("sid", "dmd", asserted=False),
            Comparison("sid", "sid, alpha 0.5", asserted=False),
            Comparison("sid", "sid, alpha 1.2", asserted=False),
        ],
        budget="updates",
    )


PROOF = on("ring", "8 Gaussians on a ring")
