"""Eight classes of three modes, and students too small for all of them."""

from functools import partial

from torch import nn

from limbeck.convert.steps import ToExperts
from limbeck.core.roles import Roles
from limbeck.data.noise import Noise
from limbeck.evaluate.budget import total_passes
from limbeck.methods.mixture_proof import CLASSES, begun, distance, distil, drawn, network, truth
from limbeck.methods.msd.method import MSD
from limbeck.prove import Arm, Comparison, Proof, Trial, seeded

MATCH, STEPS, BATCH, RATES, KIND, SMALL = 150, 350, 64, (1e-3, 3e-3, 1e-2), "many", 8
FAKE, MATCHING = 3e-3, 1e-2  # rates: of what follows, and of students that match the teacher


def run(students: int, batch: int, match: int, seed: int, lr: float) -> Trial:
    """Students trained together; the mean distance over all classes."""
    method = MSD(students, match_steps=match)
    parts = ToExperts(owners=method.parts(CLASSES[KIND]))
    small: nn.Module = seeded(seed, lambda: network(KIND, SMALL))
    m = Roles(teacher=truth(KIND), student=parts(small)[0], fake=parts(begun(seed, KIND, 48))[0])
    passes = []
    if match:
        rates = {"student": MATCHING}
        passes.append(distil(method.match, m, drawn(seed, KIND), rates, match, batch, seed))
        m.student.module.train()
    data = Noise((2,), 64 * batch, CLASSES[KIND], seed=seed)
    rates = {"student": lr, "fake": FAKE}
    passes.append(distil(MSD(students).step, m, data, rates, MATCH + STEPS - match, batch, seed))
    validation, test = (distance(m.student, KIND, first + seed, 500) for first in (2000, 3000))
    return Trial(validation, test, total_passes(passes))


PROOF = Proof(
    claim="Several one-step students, each for a part of the classes, are nearer to the teacher than one for all, with as many "
    "samples for each, and score matching is a better start for small ones than random weights (Song et al. 2025)",
    task=f"24 Gaussians in 8 classes, the teacher exact; students of 3 x {SMALL} from random weights, each with a fake of 3 x 48 "
    f"trained on samples before; {MATCH} steps of teacher score matching and {STEPS} of distribution matching, or as many of "
    f"the latter alone, {BATCH} samples for each student in a step",
    metric="energy distance times 100, mean over the classes",
    arms={
        "1 student": Arm(partial(run, 1, BATCH, MATCH), "lr", RATES),
        "1 student, 4 times the batch": Arm(partial(run, 1, 4 * BATCH, MATCH), "lr", RATES),
        "2 students": Arm(partial(run, 2, 2 * BATCH, MATCH), "lr", RATES),
        "8 students": Arm(partial(run, 8, 8 * BATCH, MATCH), "lr", RATES),
        "4 students, no matching": Arm(partial(run, 4, 4 * BATCH, 0), "lr", RATES),
        "4 students": Arm(partial(run, 4, 4 * BATCH, MATCH), "lr", RATES),
    },
    comparisons=[
        Comparison("4 students", "1 student"),
        Comparison("4 students", "4 students, no matching"),
        Comparison("2 students", "1 student", asserted=False),
        Comparison("8 students", "4 students", asserted=False),
        Comparison("4 students", "1 student, 4 times the batch", asserted=False),
    ],
    better="lower",
    budget="updates",
)
