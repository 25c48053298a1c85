"""SiD's scales of guidance on a conditional mixture: long guidance, Zero-CFG, and Zero-CFG with real samples and a discriminator.

    python benchmarks/sid_guidance.py --out benchmarks/results/sid-guidance.json

Trials are kept in `runs/sid-guidance`: stopped and started again, it goes on.
"""

from functools import partial
from pathlib import Path

import torch
from measuring import options, report

from limbeck.convert.steps import ToSampler
from limbeck.core.roles import Role, Roles
from limbeck.data.noise import Noise
from limbeck.evaluate.samples import density_and_coverage
from limbeck.methods.mixture_proof import CLASSES, begun, distance, distil, drawn, samples, truth
from limbeck.methods.sid.method import SiD
from limbeck.prove import Arm, Comparison, Proof, Trial, run_proof

FOLDER = Path("runs/sid-guidance")
STEPS, BATCH, RATES, KIND, COUNT = 400, 128, (3e-4, 1e-3, 3e-3), "classes", 1000


def judged(student: Role, seed: int) -> dict[str, float]:
    """By class: how often the nearest mode is one of the class, and how much of the real samples is near generated ones."""
    known, right, covered = truth(KIND), 0.0, 0.0
    for c in range(CLASSES[KIND]):
        y = torch.full((COUNT,), c)
        x = samples(student, seed, COUNT, y)
        real = known.sample(COUNT, torch.Generator().manual_seed(seed + 1), y)
        right += float((torch.cdist(x, known.means).argmin(1) % CLASSES[KIND] == c).float().mean())
        covered += density_and_coverage(real, x)["coverage"]
    return {"class accuracy": 100 * right / CLASSES[KIND], "coverage": 100 * covered / CLASSES[KIND]}


def run(method: SiD, seed: int, lr: float) -> Trial:
    """A student of one step at one rate."""
    m = Roles(teacher=truth(KIND), student=ToSampler((1.0,))(begun(seed, KIND))[0], fake=begun(seed, KIND))
    noise = Noise((2,), 64 * BATCH, classes=CLASSES[KIND], seed=seed)
    data = drawn(seed, KIND) if method.gan_weight else noise
    passes = distil(method.step, m, data, {"student": lr, "fake": 3e-3}, STEPS, BATCH, seed)
    tests = distance(m.student, KIND, 3000 + seed)
    return Trial(distance(m.student, KIND, 2000 + seed), tests, passes, judged(m.student, 3000 + seed))


def arm(**fields: float | str) -> Arm:
    """The method at three rates of the student."""
    return Arm(partial(run, SiD(steps=1, **fields)), "lr", RATES)  # type: ignore[arg-type]


ZERO = {"guidance": 1.0, "fake_guidance": 0.0}

PROOF = Proof(
    claim="With real samples and a discriminator, Zero-CFG comes closer to the classes' data than long guidance does "
    "(Zhou et al. 2025)",
    task=f"8 Gaussians on a ring in 4 classes, the teacher exact; networks of 3 x 64 trained on samples of it before; one "
    f"step; {STEPS} updates of {BATCH}; the discriminator's weight of 0.1 was set beforehand",
    metric="energy distance to the samples of a class (times 100)",
    arms={
        "unguided": arm(guidance=1.0),
        "lsg 4.5": arm(guidance=4.5),
        "zero-cfg": arm(**ZERO),
        "zero-cfg + gan": arm(**ZERO, gan_weight=0.1, discriminator="net.body"),
    },
    comparisons=[
        Comparison("zero-cfg + gan", "lsg 4.5"),
        Comparison("zero-cfg", "lsg 4.5", asserted=False),
        Comparison("zero-cfg + gan", "zero-cfg", asserted=False),
        Comparison("unguided", "lsg 4.5", asserted=False),
        Comparison("unguided", "zero-cfg + gan", asserted=False),
    ],
    better="lower",
)


def main() -> None:
    """Run the comparison and write its result."""
    given = options(__doc__ or "", seeds=5)
    report(run_proof(PROOF, "scales of sid", given.seeds, FOLDER, Path(__file__).parent), given.out)


if __name__ == "__main__":
    main()
