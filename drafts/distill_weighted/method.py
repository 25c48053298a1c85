"""DistillWeighted: several classifiers of other tasks teach one, the more related the more."""

import json
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from limbeck.evaluate.similarity import knn_accuracy, leep, linear_cka, parc, rsa
from limbeck.losses import soft_cross_entropy
from limbeck.losses._reduce import check_labels
from limbeck.methods.checks import check_field, outputs
from limbeck.models.load import classifier_path, num_classes, penultimate
from limbeck.teachers import Cached
from limbeck.teachers.store import OUTPUT

Similarity = Literal["parc", "cka", "rsa", "knn", "leep"]


@dataclass(frozen=True)
class DistillWeighted(Method):
    """A zoo of classifiers with classes of their own teaches a student of another task, of which few labels are known.

    `w mean_l CE(y, g(f(x))) + (1 - w) sum_s a_s mean CE(p_s(x), softmax(g_s(f(x))))`, f the student's feature, g its
    classifier, `p_s` the probabilities of source s over its own classes and `g_s` a linear head for them, which is dropped
    after training. The first mean is over labelled, the second over labelled and unlabelled samples. `a_s = max(e_s, 0)^p /
    sum_j max(e_j, 0)^p`, with `e_s` the similarity of the source's features to the labels, measured once (Borup, Phoo and
    Hariharan 2023, section 3). There is no public code: the form of the weights, `w = 0.8` and `p = 12` are inferred.

    Args:
        similarity: What `e_s` is: a function of `limbeck.evaluate.similarity`; "leep" is its exponential, since only
            positive values weigh.
        power: `p >= 0`; 0 is equal weights of all sources with `e_s > 0`, infinity the best one alone.
        label_weight: `w` in [0, 1], the share of the labels.
        weights: One for each source in the place of measured ones, 0 or more; scaled to sum to one.
        probe: Labelled samples that the similarity is measured on, at most.
        normalise: Divide each source's loss by the logarithm of its number of classes, which it grows with.

    Example:
        >>> m = Roles(**{f"teacher_{i}": torch.nn.Linear(4, 5 + i) for i in range(2)}, student=torch.nn.Linear(4, 3))
        >>> m.heads = source_heads(m, {"teacher_0": 0.7, "teacher_1": 0.3})
        >>> batch = Batch(x=torch.ones(2, 4), y=torch.tensor([0, 2]))
        >>> [update.role for update in DistillWeighted().step(m, batch)]
        ['student', 'heads']
    """

    logits = ("student",)
    averages = False
    frozen = ()

    similarity: Similarity = "parc"
    power: float = 12.0
    label_weight: float = 0.8
    weights: tuple[float, ...] | None = None
    probe: int = 500
    normalise: bool = False

    def __post_init__(self) -> None:
        check_field("similarity", self.similarity, self.similarity in _MEASURES, ", ".join(_MEASURES))
        check_field("power", self.power, self.power >= 0, "0 or more")
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "a share in [0, 1]")
        check_field("probe", self.probe, self.probe >= 3, "3 or more")
        if self.weights is not None:
            ok = all(0 <= a < math.inf for a in self.weights) and any(self.weights)
            check_field("weights", self.weights, ok, "numbers of 0 or more, not all of them 0")

    def check(self, m: Roles, batch: Batch) -> None:
        """There are sources, one weight for each where weights are given, and a student with a linear classifier."""
        _check_sources(m, batch, self.weights)
        if "y" not in batch:
            raise UsageError(
                "this method needs some labels and the data have none",
                where="batch.y",
                found=repr(batch),
                fix="give labelled data as data.train, and those without labels as data.unlabelled",
            )
        (student,) = outputs(m, batch, "student")
        check_labels("batch.y", batch.y, student)
        classifier_path(m.student.module)

    def check_data(self, data: Any) -> None:
        """The labels tell samples apart, so that a similarity can be measured."""
        labels = getattr(data.train, "labels", None)
        if self.weights is None and labels is not None:
            _MEASURES["cka"](torch.zeros(len(labels), 1), labels)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Measure how related the sources are, then train the student and the heads."""
        names = list(m.teachers)
        if self.weights is None:
            found = yield Collect("similarity", partial(self._measure, data.train))
            # A plan collects nothing: it counts every source.
            weights = (
                source_weights(found.value["scores"], self.power) if found.value else [1 / len(names)] * len(names)
            )
        else:
            weights = [a / sum(self.weights) for a in self.weights]
        m.heads = source_heads(m, dict(zip(names, weights, strict=True)), m.rng("heads"))
        source = data.train
        if "unlabelled" in data:
            source = Paired(source, Concatenated(source, data.unlabelled))
        yield Train(self.step, roles={"student": None, "heads": None}, frozen=names, data=source)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student and the heads, each from the same weights of the other."""
        target = Batch(**batch.unlabelled) if "unlabelled" in batch else batch
        logits, feature = penultimate(m.student, batch if target is batch else together(batch)[0])
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
        for name, logits in m.heads.raw(feature).items():
            scale = math.log(logits.shape[-1]) if self.normalise else 1.0
            terms.append(m.heads.weights[name] / scale * soft_cross_entropy(logits, soft_labels[name]))
        return torch.stack(terms).sum()

    def _measure(self, source: Source, m: Roles, folder: Path) -> dict[str, list[float]]:
        """The similarity of each source to the labels of a probe set, in its view 0."""
        rows = torch.randperm(len(source), generator=m.rng("probe"))[: self.probe].sort().values
        scores = {name: _score(role, source, rows, self.similarity) for name, role in m.teachers.items()}
        if wrong := [name for name, score in scores.items() if not math.isfinite(score)]:
            raise UsageError("a source cannot be compared with the labels", where=wrong[0], found=scores[wrong[0]])
        weights = dict(zip(scores, source_weights(list(scores.values()), self.power), strict=True))
        told = {"similarity": self.similarity, "samples": len(rows), "scores": scores, "weights": weights}
        (folder / "similarity.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return {"scores": list(scores.values())}


class SourceHeads(nn.Module):
    """A linear head on the student's feature for each source that counts.

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
        self.weights = dict(weights)
        self.layers = nn.ModuleDict()
        for name in weights:
            self.layers[name] = nn.utils.skip_init(nn.Linear, width, classes[name])
            for p in self.layers[name].parameters():
                nn.init.uniform_(p, -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        """Logits `[B, C_s]` by source, for features `[B, D]`."""
        return {name: layer(feature) for name, layer in self.layers.items()}


def source_heads(m: Roles, weights: Mapping[str, float], generator: torch.Generator | None = None) -> SourceHeads:
    """The heads that fit the roles; sources of weight 0 get none and are not run.

    Args:
        m: Roles with a `student` and the sources.
        weights: Weight of each source, by role.
        generator: Draws them; default one seeded with 0.
    """
    used = {name: a for name, a in weights.items() if a > 0}
    classifier: Any = m.student.module.get_submodule(classifier_path(m.student.module))
    generator = generator or torch.Generator().manual_seed(0)
    return SourceHeads(classifier.in_features, {name: _classes(m[name]) or 0 for name in used}, used, generator)


def source_weights(scores: Sequence[float], power: float) -> list[float]:
    """`max(e, 0)^p`, scaled to sum to one; sources with `e <= 0` weigh nothing whatever the power.

    Where none is above 0, the best has all the weight, with a warning.

    Example:
        >>> [round(a, 6) for a in source_weights([0.3, -0.1, 0.2, 0.0], power=1.0)]
        [0.6, 0.0, 0.4, 0.0]
    """
    e = torch.tensor(scores, dtype=torch.float64)
    if not (e > 0).any():
        warnings.warn("no source is related to the labels: the best of them is used alone", stacklevel=2)
        return F.one_hot(e.argmax(), len(e)).double().tolist()
    a = torch.where(e > 0, (e / e.max()).clamp_min(0) ** power, 0)  # by the largest, so that no power overflows
    return (a / a.sum()).tolist()


_MEASURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "parc": parc,
    "cka": linear_cka,
    "rsa": rsa,
    "knn": lambda features, labels: knn_accuracy(features, labels, k=min(5, len(labels) - 1)),
    "leep": lambda logits, labels: leep(logits.softmax(-1), labels).exp(),
}


def _score(role: Role, source: Source, rows: Tensor, similarity: Similarity) -> float:
    """The similarity of one source, from its features; from its outputs for LEEP and where they are stored."""
    device = next((p.device for p in role.module.parameters()), torch.device("cpu"))
    on_outputs = similarity == "leep" or isinstance(role.module, Cached)
    found, labels = [], []
    for some in rows.split(64):
        batch = source.batch(some, 0).to(device)
        found.append((role(batch) if on_outputs else penultimate(role, batch)[1]).flatten(1))
        labels.append(batch.y)
    return _MEASURES[similarity](torch.cat(found), torch.cat(labels)).item()


def _classes(role: Role) -> int | None:
    if isinstance(role.module, Cached):
        return role.module.store.header.layers[OUTPUT].shape[-1]
    return num_classes(role.module)


def _check_sources(m: Roles, batch: Batch, weights: Sequence[float] | None) -> None:
    if not m.teachers:
        raise UsageError(
            "the method needs sources to learn from", where="teacher", fix="give a list of classifiers as the teacher"
        )
    if weights is not None and len(weights) != len(m.teachers):
        more = "more" if len(m.teachers) > len(weights) else "fewer"
        raise UsageError(
            f"there are {more} sources than weights",
            where="method.weights",
            found=f"{len(m.teachers)} sources, {len(weights)} weights",
            expected="one weight for each source, in their order",
        )
    for name, output in zip(m.teachers, outputs(m, batch, *m.teachers), strict=True):
        if output.ndim != 2 or output.shape[1] != _classes(m[name]):
            raise UsageError(
                "a source is no classifier",
                where=name,
                found=f"an output {list(output.shape)}, and a last layer with {_classes(m[name])} outputs",
                expected="logits [B, C] from its last linear layer",
            )
