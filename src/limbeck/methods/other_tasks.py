"""What DistillNearest and DistillWeighted share: classifiers of other tasks that teach a student through heads of their own."""

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Collect, Stage, Train
from limbeck.core.update import Update
from limbeck.data.combine import Concatenated, Paired, together
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.similarity import knn_accuracy, leep, linear_cka, parc, rsa
from limbeck.losses import soft_cross_entropy
from limbeck.losses._reduce import check_labels
from limbeck.methods.checks import check_field, outputs
from limbeck.models.embedding import embedding_layer, embedding_size, with_embedding
from limbeck.teachers import Cached
from limbeck.teachers.store import OUTPUT

MEASURES = {
    "parc": parc,
    "cka": linear_cka,
    "rsa": rsa,
    "knn": lambda features, labels: knn_accuracy(features, labels, k=min(5, len(labels) - 1)),
    "leep": lambda logits, labels: leep(logits.softmax(-1), labels).exp(),
}


@dataclass(frozen=True)
class OtherTasks(Method):
    """Base of the methods in which sources, classifiers with classes of their own, teach a student of another task.

    `w mean_l CE(y, g(f(x))) + (1 - w) sum_s a_s mean CE(p_s(x), softmax(g_s(f(x))))`, f the student's feature, g its classifier,
    `p_s` the probabilities of source s over its own classes and `g_s` a linear head for them, which is left out in the end.
    The first mean is over labelled samples, the second over labelled and unlabelled ones. `weigh` says what `a_s` is.

    Args:
        similarity: What relates a source to the task, measured once: a function of `limbeck.evaluate.similarity`, of the source's
            features and the labels; "leep", of its answers, is its exponential, since only positive values weigh.
        label_weight: `w` in [0, 1], the share of the labels.
        probe: Labelled samples that the similarity is measured on, at most; 3 or more.
        normalise: Divide each source's loss by the logarithm of its number of classes, which it grows with.
    """

    logits: ClassVar[tuple[str, ...]] = ("student",)
    averages: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[str, ...]] = ("heads",)

    similarity: Literal["parc", "cka", "rsa", "knn", "leep"] = "parc"
    label_weight: float = 0.8
    probe: int = 500
    normalise: bool = False

    def __post_init__(self) -> None:
        check_field("similarity", self.similarity, self.similarity in MEASURES, ", ".join(MEASURES))
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "a share in [0, 1]")
        check_field("probe", self.probe, self.probe >= 3, "3 or more")

    def weigh(self, scores: Sequence[float]) -> list[float]:
        """The weight `a_s` of each source, 0 or more and together 1, from the similarities."""
        raise NotImplementedError

    def check(self, m: Roles, batch: Batch) -> None:
        """There are sources that classify, some labels, and a student that ends in a linear layer."""
        if not m.teachers:
            raise UsageError(
                "this method needs classifiers of other tasks to learn from",
                where="roles.teacher",
                found="none",
                expected="a list of models",
                fix="give several: --teacher timm:resnet50 --teacher file.py:function",
            )
        for name, output in zip(m.teachers, outputs(m, batch, *m.teachers), strict=True):
            if output.ndim != 2 or output.shape[1] != classes_of(m[name]):
                raise UsageError(
                    "a source is no classifier",
                    where=f"roles.{name}",
                    found=f"an output {list(output.shape)}, and a last layer with {classes_of(m[name])} outputs",
                    expected="logits [B, C] from its last linear layer",
                )
        if "y" not in batch:
            raise UsageError(
                "this method needs some labels and the data have none",
                where="batch.y",
                found=repr(batch),
                fix="give labelled samples as data.train, and those without labels as data.unlabelled",
            )
        with evaluating(m.student.module):
            logits, _ = with_embedding(m.student, batch)
        check_labels("batch.y", batch.y, logits)

    def check_data(self, data: Any) -> None:
        """The labels tell samples apart, so that a similarity can be measured."""
        if (labels := getattr(data.train, "labels", None)) is not None:
            linear_cka(torch.zeros(len(labels), 1), labels)

    def stores(self, role: Role, batch: Batch) -> Sequence[str]:
        """The layer that gives the features, which are compared with the labels."""
        return () if self.similarity == "leep" else [embedding_layer(role, batch)]

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Measure how related the sources are, then train the student and the heads."""
        names = list(m.teachers)
        weights = yield from self.weights_by_role(data.train, names)
        m.heads = source_heads(m, weights, m.rng("heads"))
        source = data.train
        if "unlabelled" in data:
            source = Paired(source, Concatenated(source, data.unlabelled))
        used = [name for name in names if weights[name] > 0]
        yield Train(self.step, roles={"student": None, "heads": None}, frozen=used, data=source)

    def weights_by_role(self, source: Source, names: Sequence[str]) -> Generator[Stage, Any, dict[str, float]]:
        """The weight of each source, by a stage that measures similarities."""
        example = {"scores": [1.0] * len(names)}
        found = yield Collect("similarity", partial(self._measure, source), example)
        return dict(zip(names, self.weigh(found.value["scores"]), strict=True))

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student and one of the heads, each from the same weights of the other."""
        target = Batch(**batch.unlabelled) if "unlabelled" in batch else batch
        logits, feature = with_embedding(m.student, batch if target is batch else together(batch)[0])
        feature = feature[-len(target) :]  # [B, D]
        hard = F.cross_entropy(logits[: len(batch)], batch.y)
        with torch.no_grad():
            soft_labels = {name: m[name](target).softmax(-1) for name in m.heads.weights}  # [B, C_s] each
        soft = self._imitation(m, feature, soft_labels)
        loss = self.label_weight * hard + (1 - self.label_weight) * soft
        yield Update("student", loss, logs={"hard": hard, "soft": soft})
        yield Update("heads", (1 - self.label_weight) * self._imitation(m, feature.detach(), soft_labels))

    def _imitation(self, m: Roles, feature: Tensor, soft_labels: Mapping[str, Tensor]) -> Tensor:
        """`sum_s a_s mean CE(p_s, softmax(g_s(f)))`."""
        terms = []
        parts = m.heads(feature).split(m.heads.sizes, -1)  # [B, C_s] each
        for (name, weight), logits in zip(m.heads.weights.items(), parts, strict=True):
            scale = math.log(logits.shape[-1]) if self.normalise else 1.0
            terms.append(weight / scale * soft_cross_entropy(logits, soft_labels[name]))
        return torch.stack(terms).sum()

    def _measure(self, source: Source, m: Roles, folder: Path) -> dict[str, list[float]]:
        """The similarity of each source to the labels of a probe set, in its view 0."""
        rows = torch.randperm(len(source), generator=m.rng("probe"))[: self.probe].sort().values
        scores = {name: score(role, source, rows, self.similarity) for name, role in m.teachers.items()}
        if wrong := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise UsageError("a source cannot be compared with the labels", where=wrong[0], found=scores[wrong[0]])
        weights = dict(zip(scores, self.weigh(list(scores.values())), strict=True))
        told = {"similarity": self.similarity, "samples": len(rows), "scores": scores, "weights": weights}
        (folder / "similarity.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return {"scores": list(scores.values())}


class SourceHeads(nn.Module):
    """Linear heads on the student's feature for the sources that count, side by side in one layer.

    Args:
        width: D of the features.
        classes: Classes of each source.
        weights: Weight of each source, above 0.
        generator: Draws the heads, uniform within `1 / sqrt(D)`.
    """

    def __init__(
        self, width: int, classes: Mapping[str, int], weights: Mapping[str, float], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weights, self.sizes = dict(weights), [classes[name] for name in weights]
        self.layer = nn.utils.skip_init(nn.Linear, width, sum(self.sizes))
        for p in self.parameters():
            nn.init.uniform_(p, -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `[B, C_1 + C_2 + ...]` for features `[B, D]`, in the order of the weights."""
        return self.layer(feature)


def source_heads(m: Roles, weights: Mapping[str, float], generator: torch.Generator | None = None) -> SourceHeads:
    """The heads that fit the roles; sources of weight 0 get none and are not run.

    Args:
        m: Roles with a `student` and the sources.
        weights: Weight of each source, by role.
        generator: Draws them; default one seeded with 0.
    """
    used = {name: weight for name, weight in weights.items() if weight > 0}
    width, _ = embedding_size(m.student)
    heads = SourceHeads(
        width,
        {name: classes_of(m[name]) for name in used},
        used,
        generator or torch.Generator().manual_seed(0),
    )
    return heads.to(next(p.device for p in m.student.parameters()))


def score(role: Role, source: Source, rows: Tensor, similarity: str) -> float:
    """The similarity of one source to the labels of the samples at `rows`; stored logits stand in where no layer is stored."""
    device = next((p.device for p in role.module.parameters()), torch.device("cpu"))
    on_outputs = similarity == "leep" or (isinstance(role.module, Cached) and not role.module.taps)
    found, labels = [], []
    with evaluating(role.module):
        for some in rows.split(64):
            batch = source.batch(some, 0).to(device)
            found.append((role(batch) if on_outputs else with_embedding(role, batch)[1]).flatten(1))
            labels.append(batch.y)
    return float(MEASURES[similarity](torch.cat(found), torch.cat(labels)))


def classes_of(role: Role) -> int:
    """The classes of a source."""
    if isinstance(role.module, Cached):
        return role.module.store.header.layers[OUTPUT].shape[-1]
    return embedding_size(role)[1]
