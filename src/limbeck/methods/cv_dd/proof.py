"""Digits somewhere on a noisy canvas, batches of 17: labels by the batch's statistics, images by a committee."""

from dataclasses import replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import Data, TensorSource
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.embedded import digits
from limbeck.data.ids import mix, normals, uniforms
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.evaluate.condensation import accuracy, train_on
from limbeck.methods.cv_dd.method import CVDD
from limbeck.methods.digits_recovered_proof import EACH, ITERATIONS, JUDGE
from limbeck.nn.convnet import ConvNet
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded
from limbeck.teachers.relabel import epoch_labels, mean_logits, with_labels

SIDE, UNSEEN = 12, 3
KINDS = ((24, 2), (16, 3), (16, 2), (32, 3))  # width and blocks; the last is not in the committee
LR = 0.03


@lru_cache(maxsize=2)
def splits(seed: int) -> Data:
    """The digits, each at a place of its own on a canvas of 12 x 12, with noise."""
    found = {}
    for name, source in digits(seed).items():
        batch = source.batch(torch.arange(len(source)), 0)
        u = (uniforms(mix(batch.id), 2) * (SIDE - 8 + 1)).long()
        noise = normals(mix(batch.id + 1), SIDE * SIDE).view(-1, 1, SIDE, SIDE).float()
        x = torch.stack([_placed(image, *place) for image, place in zip(batch.x, u.tolist(), strict=True)])
        found[name] = TensorSource((x + 0.2 * noise).clamp(0, 1), batch.y, batch.id, classes=source.classes)
    return Data(**found)


def _placed(image: Tensor, top: int, left: int) -> Tensor:
    return F.pad(image, (left, SIDE - 8 - left, top, SIDE - 8 - top))


def network(kind: int) -> ConvNet:
    """A convolutional network with batch normalisation."""
    width, depth = KINDS[kind]
    return ConvNet(10, channels=1, size=SIDE, width=width, depth=depth, norm="batch")


@lru_cache(maxsize=2)
def committee(seed: int) -> tuple[ConvNet, ...]:
    """Three networks of three kinds, trained on the digits."""
    found = []
    for kind in range(UNSEEN):
        m = Roles(student=seeded(seed, partial(network, kind)))
        optim = {"student": Optim("adamw", lr=0.01, schedule="cosine")}
        fit(supervised, m, splits(seed).train, optim, epochs=8, batch_size=64, seed=seed)
        found.append(m.student.module.eval())
    return tuple(found)  # type: ignore[arg-type]


def made(method: CVDD, seed: int, *teachers: ConvNet) -> Condensed:
    """What a method makes of real images."""
    m = Roles(
        **{f"teacher_{i}": net for i, net in enumerate(teachers)}, student=from_source(splits(seed).train, EACH, seed)
    )
    optim = {"student": Optim("adam", lr=LR, betas=(0.5, 0.9), schedule="cosine")}
    fit(method, m, splits(seed), optim, steps=ITERATIONS, seed=seed)
    return m.student.module  # type: ignore[return-value]


def judged(seed: int, small: Condensed, kind: int, split: str) -> tuple[float, Passes]:
    """The accuracy in per cent of a network of a kind that was trained on a set; the passes."""
    net = seeded(100 * seed, partial(network, kind))
    with count_passes(learning=True, student=net) as counts:
        train_on(small, net.train(), JUDGE, seed)
    return 100 * accuracy(net, splits(seed)[split]), counts["student"]


@lru_cache(maxsize=2)
def priors(seed: int) -> tuple[float, ...]:
    """What a network of each kind learns from the images and labels of that member alone, on validation images."""
    alone = replace(WHOLE, members=1, priors=None)
    found = (made(alone, seed, net) for net in committee(seed))
    return tuple(judged(seed, small, kind, "validation")[0] for kind, small in enumerate(found))


WHOLE = CVDD(
    operations=("roll",),
    bn_weight=0.05,
    label_epochs=30,
    label_batch_size=17,
    label_operations=("roll",),
    temperature=10.0,
)


def run(method: CVDD | None, seed: int, lr: float) -> Trial:
    """A set, and what a network of a kind that the committee does not have learns from it."""
    nets = committee(seed)
    whole = replace(method or WHOLE, priors=priors(seed))
    if method is None:
        m = Roles(**{f"teacher_{i}": net.eval() for i, net in enumerate(nets)})
        roles, small = list(m.teachers.values()), from_source(splits(seed).train, EACH, seed)
        views = whole.views(seed)
        assert views is not None
        answer = mean_logits(roles, whole.weights(m))
        small = with_labels(
            small, epoch_labels(small, answer, views, whole.label_epochs, roles), views, whole.temperature
        )
    else:
        small = made(whole, seed, *nets)
    validation = judged(seed, small, UNSEEN, "validation")[0]
    test, passes = judged(seed, small, UNSEEN, "test")
    same = judged(seed, small, 0, "test")[0]
    return Trial(validation, test, {"student": passes}, {"accuracy of a member's kind (%)": same})


PROOF = Proof(
    claim="Labels by the statistics of the batch that will be seen teach more than those by running statistics, and images that a "
    "committee votes on are worth more than real ones or those of its best member (Cui et al. 2025)",
    task="8x8 digits at random places of a noisy 12x12 canvas, 5 images of each class from as many real ones, 100 iterations; "
    "three networks with batch normalisation vote in pairs and give all labels, by votes of measured priors; a network of a "
    "fourth kind is trained from scratch for 200 steps of 17",
    metric="accuracy (%)",
    arms={
        "real images": Arm(partial(run, None), "lr", (LR,)),
        "best member alone": Arm(partial(run, replace(WHOLE, members=1, choice="best")), "lr", (LR,)),
        "running statistics": Arm(partial(run, replace(WHOLE, label_statistics="running")), "lr", (LR,)),
        "cv_dd": Arm(partial(run, WHOLE), "lr", (LR,)),
    },
    comparisons=[
        Comparison("cv_dd", "running statistics"),
        Comparison("cv_dd", "real images"),
        Comparison("cv_dd", "best member alone", asserted=False),
    ],
)
