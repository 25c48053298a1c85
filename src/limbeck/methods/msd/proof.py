"""Eight classes of three modes, and students too small for all of them."""

from functools import partial

from torch import nn

from limbeck.convert.steps import ToExperts
from limbeck.core.roles import Roles
from limbeck.data.noise import Noise
from limbeck.methods.mixture_proof import CLASSES, begun, distance, distil, network, truth
from limbeck.methods.msd.method import MSD, share_out
from limbeck.prove import Arm, Comparison, Proof, Trial, seeded

STEPS, BATCH, RATES, KIND, SMALL = 1000, 64, (1e-3, 3e-3, 1e-2), "many", 10


def run(students: int, batch: int, matched: bool, seed: int, lr: float) -> Trial:
    """Students trained together; the mean distance over all classes."""

    def small() -> nn.Module:
        return begun(seed, KIND, SMALL) if matched else seeded(seed, lambda: network(KIND, SMALL))

    owners = share_out(CLASSES[KIND], students)
    m = Roles(
        teacher=truth(KIND),
        student=ToExperts(owners=owners)(small())[0],
        fake=ToExperts(owners=owners)(begun(seed, KIND, 48))[0],
    )
    data = Noise((2,), 64 * batch, CLASSES[KIND], seed=seed)
    passes = distil(MSD(students).step, m, data, {"student": lr, "fake": 3e-3}, STEPS, batch, seed)
    return Trial(distance(m.student, KIND, 2000 + seed, 500), distance(m.student, KIND, 3000 + seed, 500), passes)


PROOF = Proof(
    claim="Several one-step students, each for a part of the classes, are nearer to the teacher than one for all, with as many "
    "samples for each (Song et al. 2025)",
    task=f"24 Gaussians in 8 classes, the teacher exact; students of 3 x {SMALL}, each with a fake of 3 x 48; {STEPS} steps of "
    f"{BATCH} samples for each student",
    metric="energy distance times 100, mean over the classes",
    arms={
        "1 student": Arm(partial(run, 1, BATCH, True), "lr", RATES),
        "1 student, 4 times the batch": Arm(partial(run, 1, 4 * BATCH, True), "lr", RATES),
        "2 students": Arm(partial(run, 2, 2 * BATCH, True), "lr", RATES),
        "4 students, from random weights": Arm(partial(run, 4, 4 * BATCH, False), "lr", RATES),
        "4 students": Arm(partial(run, 4, 4 * BATCH, True), "lr", RATES),
    },
    comparisons=[
        Comparison("4 students", "1 student"),
        Comparison("4 students", "4 students, from random weights"),
        Comparison("2 students", "1 student", asserted=False),
        Comparison("4 students", "1 student, 4 times the batch", asserted=False),
    ],
    better="lower",
    budget="updates",
)
