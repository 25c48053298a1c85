"""Digits somewhere on a noisy canvas, batches of 17: labels by the batch's statistics, images by a committee."""

from dataclasses import replace
from functools import lru_cache, partial

from limbeck.methods.canvas_proof import committee, judged, made, members, real
from limbeck.methods.cv_dd.method import CVDD
from limbeck.prove import Arm, Comparison, Proof, Trial
from limbeck.teachers.relabel import epoch_labels, mean_logits, with_labels

RATES = (0.03,)
WHOLE = CVDD(
    init="real",
    operations=("roll",),
    bn_weight=0.05,
    label_epochs=30,
    label_batch_size=17,
    label_operations=("roll",),
    temperature=10.0,
)


@lru_cache(maxsize=2)
def priors(seed: int) -> tuple[float, ...]:
    """What a network of each kind learns from the images and labels of that member alone, on validation images."""
    alone = replace(WHOLE, members=1, priors=None)
    found = [made(alone, seed, RATES[0], net) for net in committee(seed)]
    return tuple(judged(seed, small, kind)[0] for kind, small in enumerate(found))


def run(method: CVDD | None, seed: int, lr: float) -> Trial:
    """A set, and what networks of a kind that the committee does not have learn from it."""
    whole = replace(method or WHOLE, priors=priors(seed))
    if method is not None:
        small = made(whole, seed, lr, *committee(seed))
    else:
        m, small, views = members(seed), real(seed), whole.views(seed)
        assert views is not None
        roles = list(m.teachers.values())
        soft = epoch_labels(small, mean_logits(roles, whole.weights(m)), views, whole.label_epochs, roles)
        small = with_labels(small, soft, views, whole.temperature)
    validation, test, passes = judged(seed, small)
    return Trial(validation, test, passes, {"accuracy of a member's kind (%)": judged(seed, small, 0)[1]})


PROOF = Proof(
    claim="Labels by the statistics of the batch that will be seen teach more than those by running statistics, and images that "
    "a committee votes on are worth more than real ones or those of its best member (Cui et al. 2025)",
    task="8x8 digits at random places of a noisy 12x12 canvas, 5 images of each class from as many real ones, 100 iterations; "
    "three networks with batch normalisation vote in pairs and give all labels, by votes of measured priors; a network of a "
    "fourth kind is trained from scratch for 200 steps of 17, twice",
    metric="accuracy (%)",
    arms={
        "real images": Arm(partial(run, None), "lr", RATES),
        "best member alone": Arm(partial(run, replace(WHOLE, members=1, choice="best")), "lr", RATES),
        "running statistics": Arm(partial(run, replace(WHOLE, label_statistics="running")), "lr", RATES),
        "cv_dd": Arm(partial(run, WHOLE), "lr", RATES),
    },
    comparisons=[
        Comparison("cv_dd", "running statistics"),
        Comparison("cv_dd", "real images"),
        Comparison("cv_dd", "best member alone", asserted=False),
    ],
)
