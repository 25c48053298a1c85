"""What the proofs of CV-DD and INFER share: digits somewhere on a noisy canvas, and networks of four kinds."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import Data, TensorSource
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.embedded import digits
from limbeck.data.ids import mix, normals, uniforms
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.evaluate.condensation import Training, accuracy, train_on
from limbeck.nn.convnet import ConvNet
from limbeck.prove import fit, seeded

SIDE, UNSEEN, EACH, ITERATIONS, TRAININGS = 12, 3, 5, 100, 2
JUDGE = Training(steps=200, optim=Optim("adamw", lr=0.01, weight_decay=0.01, schedule="cosine"))
KINDS = ((24, 2), (16, 3), (16, 2), (32, 3))  # width and blocks; the last is not in the committee


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


def members(seed: int) -> Roles:
    """The committee as roles."""
    m = Roles(**{f"teacher_{i}": net for i, net in enumerate(committee(seed))})
    m.freeze(*m.teachers)
    return m


def made(method: Method, seed: int, lr: float, *teachers: ConvNet) -> Condensed:
    """What a method makes of real images."""
    names = [f"teacher_{i}" for i in range(len(teachers))] if not method.averages else ["teacher"]
    m = Roles(**dict(zip(names, teachers, strict=True)), student=real(seed))
    optim = {"student": Optim("adam", lr=lr, betas=(0.5, 0.9), schedule="cosine")}
    fit(method, m, splits(seed), optim, steps=ITERATIONS, seed=seed)
    found: Any = m.student.module
    return found


def real(seed: int) -> Condensed:
    """Random real images of each class."""
    return from_source(splits(seed).train, EACH, seed)


def judged(seed: int, small: Condensed, kind: int = UNSEEN) -> tuple[float, float, dict[str, Passes]]:
    """The mean accuracy in per cent of networks of a kind trained on a set, on validation and test images; the passes."""
    scores, passes = [], Passes()
    for k in range(TRAININGS):
        net = seeded(100 * seed + k, partial(network, kind))
        with count_passes(learning=True, student=net) as counts:
            train_on(small, net.train(), JUDGE, k)
        passes = Passes(*(a + b for a, b in zip(vars(passes).values(), vars(counts["student"]).values(), strict=True)))
        scores.append([100 * accuracy(net, splits(seed)[split]) for split in ("validation", "test")])
    validation, test = (sum(column) / TRAININGS for column in zip(*scores, strict=True))
    return validation, test, {"student": passes}
