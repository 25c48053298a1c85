"""Digits somewhere on a noisy canvas, one label for each: is storage worth more as compensators than as images?"""

from dataclasses import replace
from functools import partial

import torch

from limbeck.data.condensed import Condensed
from limbeck.methods.canvas_proof import committee, judged, made, members, real, splits
from limbeck.methods.dwa.method import DWA
from limbeck.methods.infer.method import INFER
from limbeck.prove import Arm, Comparison, Proof, Trial
from limbeck.teachers.relabel import epoch_labels, mean_logits, static_labels, with_labels
from limbeck.teachers.statistics import Recovery

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
METHOD = INFER(bn_weight=0.05, label_operations=("roll",), label_batch_size=25, temperature=10.0)
SRE2L = DWA(rho=0.0, variance_weight=1.0, bn_weight=0.05, label_epochs=0)


def transfer(seed: int, small: Condensed) -> float:
    """How much compensators lower, on the mean, what they were made to lower on test images that they have never seen."""
    source, m, u = splits(seed).test, members(seed), small.compensators
    assert u is not None
    slots = torch.stack([(source.labels == c).nonzero()[:4, 0] for c in range(10)], 1)
    gains = []
    for rows in slots:
        batch = source.batch(rows, 0)
        for unit, added in enumerate(u):
            role, recovery = m[f"teacher_{unit % len(m.teachers)}"], Recovery(METHOD.bn_weight)
            gains.append(recovery(role, batch.x, batch.y) - recovery(role, (batch.x + added).clamp(0, 1), batch.y))
    return float(torch.stack(gains).mean().detach())


def run(method: INFER | DWA | None, dynamic: bool, seed: int, lr: float) -> Trial:
    """A set, and what networks of a kind that gave no labels learn from it."""
    also: dict[str, float] = {}
    if method is None:
        small = real(seed)
    elif isinstance(method, DWA):
        small = made(method, seed, lr, committee(seed)[0])
    else:
        small = made(method, seed, lr, *committee(seed))
        also["loss that compensators take from other images"] = transfer(seed, small)
    answer = mean_logits(list(members(seed).teachers.values()))
    if dynamic:
        views = replace(METHOD, label_epochs=40).views(seed)
        assert views is not None
        small = with_labels(small, epoch_labels(small, answer, views, 40), views, METHOD.temperature)
    else:
        small = with_labels(small, static_labels(small, answer), None, METHOD.temperature)
    also["bytes of images and compensators"] = sum(v for k, v in small.bytes().items() if k in ("x", "compensators"))
    return Trial(*judged(seed, small), also)


PROOF = Proof(
    claim="With one table of labels, real images with compensators are worth more than as many bytes of real images or of images "
    "recovered by one network (Zhang et al. 2025)",
    task="8x8 digits at random places of a noisy 12x12 canvas, a budget of 5 images of each class: 3 real ones and 9 "
    "compensators of three networks with batch normalisation, 100 iterations; all sets are labelled by the three; networks of a "
    "fourth kind are trained from scratch for 200 steps, twice",
    metric="accuracy (%)",
    arms={
        "real images": Arm(partial(run, None, False), "lr", RATES),
        "sre2l": Arm(partial(run, SRE2L, False), "lr", RATES),
        "labels of every view": Arm(partial(run, METHOD, True), "lr", RATES),
        "infer": Arm(partial(run, METHOD, False), "lr", RATES),
    },
    budget="updates",  # batches are whole sets, which differ in size
    comparisons=[
        Comparison("infer", "sre2l"),
        Comparison("infer", "real images"),
        Comparison("labels of every view", "infer", asserted=False),
    ],
)
