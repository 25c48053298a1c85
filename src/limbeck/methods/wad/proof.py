"""Four classes with six labels each, and a pool that is mostly of other things."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import Data, TensorSource
from limbeck.data.combine import Concatenated, together
from limbeck.data.ids import digest
from limbeck.data.pseudo_labels import class_similarities
from limbeck.data.sources import Rows
from limbeck.evaluate.budget import Passes, total_passes
from limbeck.evaluate.tasks import predict
from limbeck.losses import soft_cross_entropy
from limbeck.methods.wad.method import WAD
from limbeck.methods.wad.sources import Taught, TwoViews
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

OPTIM = Optim("adam", lr=0.003)
CLASSES, CONTENT, NUISANCE, LABELS, TARGETS, UNKNOWN = 4, 10, 20, 6, 160, 240
STEPS, BATCH = 600, 50
RATES = (0.0003, 0.001, 0.003, 0.01)


class Views(Rows):
    """Points whose nuisance dimensions are drawn anew in every view.

    Args:
        content: `[N, 10]`.
        labels: `[N]`, or None.
        rotation: `[30, 30]`.
        seed: Of the nuisance.
        first: The first id.
    """

    def __init__(self, content: Tensor, labels: Tensor | None, rotation: Tensor, seed: int, first: int) -> None:
        self.content, self.labels, self.rotation, self.seed = content, labels, rotation, seed
        self.ids, self.views = first + torch.arange(len(content)), 0

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows`."""
        g = torch.Generator().manual_seed(1000 * self.seed + view)
        nuisance = 1.5 * torch.randn(len(self), NUISANCE, generator=g)
        x = torch.cat([self.content, nuisance], 1)[rows] @ self.rotation
        y = {} if self.labels is None else {"y": self.labels[rows]}
        return Batch(x=x, id=self.ids[rows], view=torch.full((len(rows),), view), **y)

    def fingerprint(self) -> str:
        """Of the content."""
        return digest(self.content, self.seed)


def frozen(source: Views) -> TensorSource:
    """The points in view 0, which is all that the student sees."""
    return TensorSource(source.batch(torch.arange(len(source)), 0).x, source.labels, ids=source.ids)


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module, Tensor]:
    """The data, an encoder that 300 steps of SimCLR have trained, and which unlabelled points are of the four classes."""
    g = torch.Generator().manual_seed(seed)
    centres = 0.9 * torch.randn(CLASSES, CONTENT, generator=g)
    pairs = torch.stack([torch.randperm(CLASSES, generator=g)[:2] for _ in range(UNKNOWN)])
    between = centres[pairs].mean(1) + 0.5 * torch.randn(UNKNOWN, CONTENT, generator=g)
    rotation = torch.linalg.qr(torch.randn(CONTENT + NUISANCE, CONTENT + NUISANCE, generator=g)).Q

    def points(count: int, first: int, labelled: bool = True) -> Views:
        y = torch.arange(count) % CLASSES
        content = centres[y] + 0.8 * torch.randn(count, CONTENT, generator=g)
        if not labelled:
            content = torch.cat([content, between + 0.8 * torch.randn(UNKNOWN, CONTENT, generator=g)])
        return Views(content, y if labelled else None, rotation, seed, first)

    few, pool = points(LABELS * CLASSES, 0), points(TARGETS, 1000, labelled=False)
    m = Roles(encoder=seeded(seed, lambda: mlp(CONTENT + NUISANCE, 128, 64, 16)))
    both = TwoViews(Concatenated(few, pool))
    fit(WAD().contrast, m, both, {"encoder": Optim("adam", lr=0.003)}, steps=300, batch_size=200, seed=seed)
    judged = {"validation": frozen(points(200, 5000)), "test": frozen(points(1000, 9000))}
    data = Data(train=frozen(few), unlabelled=frozen(pool), **judged)
    return data, m.encoder.module, torch.arange(len(pool)) < TARGETS


def similarities(data: Data, encoder: nn.Module) -> Tensor:
    """Cosines of the pool to the nearest labelled sample of each class `[U, 4]`."""
    role = Roles(teacher=encoder).teacher
    known, new = (F.normalize(predict(role, source)[0], dim=1) for source in (data.train, data.unlabelled))
    return class_similarities(new, known, data.train.labels, CLASSES)


def student(seed: int) -> Roles:
    """A fresh student."""
    return Roles(student=seeded(1000 + seed, lambda: mlp(CONTENT + NUISANCE, 64, CLASSES)))


def trial(m: Roles, data: Data, passes: dict[str, Passes]) -> Trial:
    """What is measured of a student."""
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), {"student": passes["student"]})


def rounds(seed: int, lr: float, method: WAD) -> Trial:
    """The whole method with the encoder that is there; all steps are shared out among its rounds."""
    data, encoder, _ = task(seed)
    m = student(seed)
    m.teacher = encoder
    steps = STEPS // (method.promotions + 1)
    optim = {"student": replace(OPTIM, lr=lr)}
    return trial(m, data, fit(method, m, data, optim, steps=steps, batch_size=BATCH, seed=seed))


def paired(seed: int, lr: float, step: Any, steps: int = STEPS, m: Roles | None = None, **given: Tensor) -> Trial:
    """Batches of labelled and unlabelled samples, as those of the method, with another loss."""
    data, _, _ = task(seed)
    m = m or student(seed)
    labels = given.get("labels", torch.zeros(len(data.unlabelled), dtype=torch.int64))
    weights = given.get("weights", torch.zeros(len(data.unlabelled)))
    source = Taught(data.train, data.unlabelled, labels, weights, seed)
    optim = {"student": replace(OPTIM, lr=lr)}
    return trial(m, data, fit(step, m, source, optim, steps=steps, batch_size=BATCH, seed=seed))


def self_training(seed: int, lr: float) -> Trial:
    """Half of the steps with labels alone, then half with the student's own labels for the pool."""
    data, _, _ = task(seed)
    m = student(seed)
    first = paired(seed, lr, WAD().step, STEPS // 2, m)
    own = predict(m.student, data.unlabelled)[0].argmax(-1)
    last = paired(seed, lr, WAD().step, STEPS // 2, m, labels=own, weights=torch.ones(len(own)))
    return replace(last, passes=total_passes(t.passes for t in (first, last)))


def known_alone(seed: int, lr: float) -> Trial:
    """The encoder's labels, with weight 1 for points of the four classes and 0 for others, as if an oracle had said which."""
    data, encoder, known = task(seed)
    return paired(seed, lr, WAD().step, labels=similarities(data, encoder).argmax(1), weights=known.float())


def kd(seed: int, temperature: float) -> Trial:
    """The encoder as a teacher: soft labels from its similarities."""
    data, encoder, _ = task(seed)
    soft = (similarities(data, encoder) / temperature).softmax(-1)
    place = {int(i): row for row, i in enumerate(data.unlabelled.ids)}
    order = torch.tensor([place.get(i, 0) for i in range(int(data.unlabelled.ids.max()) + 1)])

    def step(m: Roles, batch: Batch) -> Tensor:
        inputs, count = together(batch)
        logits = m.student(inputs)
        return F.cross_entropy(logits[:count], batch.y) + soft_cross_entropy(
            logits[count:], soft[order[batch.unlabelled["id"]]]
        )

    return paired(seed, OPTIM.lr, step)


def found_unknown(seed: int) -> float:
    """Area under the curve of telling the four classes from other things by the weight."""
    data, encoder, known = task(seed)
    top = similarities(data, encoder).topk(2, dim=1).values
    metrics = require("sklearn.metrics", extra="vision")
    return float(metrics.roc_auc_score(known.numpy(), (top[:, 0] - top[:, 1]).numpy()))


PROOF = Proof(
    claim="With few labels and a pool that is mostly of other classes, the labels and weights that a self-supervised encoder "
    "gives are far better than the labels alone (Du et al. 2023)",
    task="4 classes in 10 of 30 rotated dimensions, 6 labels each; a pool of 160 points of these classes and 240 from between "
    "them; an encoder MLP 30-128-64-16 after 300 steps of SimCLR, shared by all arms; students MLP 30-64-4, 600 steps of 50 "
    "labelled and 50 unlabelled points; 200 points to tune on, 1000 to test",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: paired(seed, lr, WAD().step), "lr", RATES),
        "self-training": Arm(self_training, "lr", RATES),
        "kd": Arm(kd, "temperature", (0.03, 0.1, 0.3, 1.0)),
        "unweighted": Arm(lambda seed, lr: rounds(seed, lr, WAD(promotions=0, weighted=False)), "lr", RATES),
        "known alone": Arm(known_alone, "lr", RATES),
        "one round": Arm(lambda seed, lr: rounds(seed, lr, WAD(promotions=0)), "lr", RATES),
        "wad": Arm(lambda seed, lr: rounds(seed, lr, WAD()), "lr", RATES),
    },
    comparisons=[
        Comparison("wad", "labels alone"),
        Comparison("wad", "self-training"),
        Comparison("one round", "labels alone"),
        Comparison("wad", "one round", asserted=False),
        Comparison("one round", "unweighted", asserted=False),
        Comparison("wad", "kd", asserted=False),
        Comparison("known alone", "unweighted", asserted=False),
    ],
)
