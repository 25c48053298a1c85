"""Digits somewhere on a noisy canvas, batches of 17: labels by the batch's statistics, images by a committee."""

from dataclasses import replace
from functools import lru_cache, partial

from limbeck.data.condensed import Condensed
from limbeck.methods.canvas_proof import committee, judged, made, members, real, splits
from limbeck.methods.cv_dd.method import CVDD
from limbeck.prove import Arm, Comparison, Proof, Trial
from limbeck.teachers.relabel import epoch_labels, mean_logits, with_labels

RATES, PRIOR_RATE = (0.03, 0.1, 0.3, 1.0), 0.03
WHOLE = CVDD(
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
    found = [made(alone, seed, PRIOR_RATE, net) for net in committee(seed)]
    return tuple(judged(seed, small, kind)[0] for kind, small in enumerate(found))


@lru_cache(maxsize=4)
def untouched(seed: int, init: str) -> Trial:
    """Real images, or mosaics of them, with the labels of `WHOLE`: there is no rate."""
    whole, m, small = replace(WHOLE, priors=priors(seed)), members(seed), real(seed)
    roles, views = list(m.teachers.values()), whole.views(seed)
    assert views is not None
    if init == "mosaics":
        m.student = small
        small = Condensed(whole.mosaics(splits(seed).train, m, None), small.y, info=small.info)
    soft = epoch_labels(small, mean_logits(roles, whole.weights(m)), views, whole.label_epochs, roles)
    return tested(with_labels(small, soft, views, whole.temperature), seed)


def run(method: CVDD, seed: int, lr: float) -> Trial:
    """A set, and what networks learn from it."""
    return tested(made(replace(method, priors=priors(seed)), seed, lr, *committee(seed)), seed)


def tested(small: Condensed, seed: int) -> Trial:
    """What networks of a kind that the committee does not have learn from a set; those of a member's kind are reported."""
    validation, test, passes = judged(seed, small)
    return Trial(validation, test, passes, {"accuracy of a member's kind (%)": judged(seed, small, 0)[1]})


PROOF = Proof(
    claim="Labels by the statistics of the batch that will be seen teach more than those by running statistics, and images that "
    "a committee votes on are worth more than real ones or those of its best member (Cui et al. 2025)",
    task="8x8 digits at random places of a noisy 12x12 canvas, 5 images of each class that begin as mosaics of patches, 100 "
    "iterations; three networks with batch normalisation vote in pairs and give all labels, by votes of measured priors; a "
    "network of a fourth kind is trained from scratch for 200 steps of 17, twice",
    metric="accuracy (%)",
    arms={
        "real images": Arm(lambda seed, lr: untouched(seed, "real"), "lr", RATES),
        "mosaics": Arm(lambda seed, lr: untouched(seed, "mosaics"), "lr", RATES),
        "best member alone": Arm(partial(run, replace(WHOLE, members=1, choice="best")), "lr", RATES),
        "running statistics": Arm(partial(run, replace(WHOLE, label_statistics="running")), "lr", RATES),
        "cv_dd": Arm(partial(run, WHOLE), "lr", RATES),
    },
    comparisons=[
        Comparison("cv_dd", "running statistics"),
        Comparison("cv_dd", "real images"),
        Comparison("cv_dd", "best member alone", asserted=False),
        Comparison("cv_dd", "mosaics", asserted=False),
    ],
)
