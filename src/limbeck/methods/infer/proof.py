"""Compensators of three real digits of each class: do they also help images that they were not made with?"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from limbeck.core.roles import Roles
from limbeck.data.condensed import Condensed
from limbeck.methods.digits_recovered_proof import judged, made, real, splits, teacher
from limbeck.methods.infer.method import INFER
from limbeck.prove import Arm, Comparison, Proof, Trial
from limbeck.teachers.relabel import epoch_labels, mean_logits, with_labels
from limbeck.teachers.statistics import Recovery

TEACHERS, RATES = 3, (0.01, 0.03)
METHOD = INFER(label_operations=(), label_batch_size=50, temperature=10.0)


def objective(m: Roles, small: Condensed, seed: int, split: str) -> float:
    """The mean of what compensators were made to lower, on slots of a split, images that they have never seen."""
    source, u = splits(seed)[split], small.compensators
    assert u is not None
    labels = source.labels
    slots = torch.stack([(labels == c).nonzero()[:8, 0] for c in range(10)], 1)  # 8 images of each class
    losses = []
    for rows in slots:
        batch = source.batch(rows, 0)
        for unit, added in enumerate(u):
            x = (batch.x + added).clamp(0, 1)
            losses.append(Recovery(METHOD.bn_weight)(m[f"teacher_{unit % TEACHERS}"], x, batch.y))
    return float(torch.stack(losses).mean())


def run(kind: Literal["none", "disordered", "made"], seed: int, lr: float) -> Trial:
    """Compensators, and what networks learn from the set with labels of one table and of every view."""
    nets = [teacher(seed, k) for k in range(TEACHERS)]
    budget = real(seed)
    m = Roles(**{f"teacher_{i}": net for i, net in enumerate(nets)})
    roles = list(m.teachers.values())
    small = made(METHOD, seed, lr, budget, *nets)
    assert small.compensators is not None
    with torch.no_grad():
        if kind == "none":
            small.compensators.zero_()
        elif kind == "disordered":
            order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
            small.compensators.copy_(small.compensators.flatten(1)[:, order].view_as(small.compensators))
        found = [objective(m, small, seed, split) for split in ("validation", "test")]
    trained = budget if kind == "none" else small  # as much storage
    answer = mean_logits(roles)
    with torch.no_grad():
        one = with_labels(trained, answer(trained().detach()), None, METHOD.temperature)
    views = replace(METHOD, label_epochs=20).views(seed)
    assert views is not None
    every = with_labels(trained, epoch_labels(trained, answer, views, 20), views, METHOD.temperature)
    _, static, _ = judged(seed, one)
    _, dynamic, passes = judged(seed, every)
    also = {"accuracy, one table of labels (%)": static, "accuracy, labels of every view (%)": dynamic}
    return Trial(found[0], found[1], passes, also)


PROOF = Proof(
    claim="What a network's compensator does for the images that it was made with, it does for other images of all classes: they come "
    "nearer to what the network remembers (Zhang et al. 2025)",
    task="8x8 digits, a budget of 5 images of each class: 3 real ones and 9 compensators of three networks with batch "
    "normalisation, 100 iterations; the mean loss of 8 slots of test images with each compensator, by its network",
    metric="cross-entropy and distance of statistics",
    arms={
        "real images": Arm(partial(run, "none"), "lr", RATES),
        "pixels in disorder": Arm(partial(run, "disordered"), "lr", RATES),
        "infer": Arm(partial(run, "made"), "lr", RATES),
    },
    comparisons=[
        Comparison("infer", "real images"),
        Comparison("infer", "pixels in disorder"),
        Comparison("pixels in disorder", "real images", asserted=False),
    ],
    better="lower",
)
