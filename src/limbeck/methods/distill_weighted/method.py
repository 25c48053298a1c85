"""DistillWeighted: several classifiers of other tasks teach, the more related the more."""

import math
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Stage
from limbeck.methods.checks import check_field
from limbeck.methods.other_tasks import OtherTasks


@dataclass(frozen=True)
class DistillWeighted(OtherTasks):
    r"""A zoo of classifiers of other tasks teaches a student of which few labels are known, each by its similarity.

    $w\, \mathrm{CE}(y, g(f(x))) + (1 - w) \sum_s a_s \mathrm{CE}(p_s(x), \mathrm{softmax}(g_s(f(x))))$ with
    $a_s = \max(e_s, 0)^p / \sum_j \max(e_j, 0)^p$ (Borup, Phoo and Hariharan 2023, section 3), where $e_s$ is the similarity of
    the features of source s to the labels, f the student's feature, g its classifier and $g_s$ a linear head for the classes of
    the source, which is dropped after training. The first mean is over labelled samples, the second over labelled and
    unlabelled ones. There is no public code: the form of the weights, `w = 0.8` and `p = 12` are inferred.

    Args:
        similarity: What `e_s` is, measured once: a function of `limbeck.evaluate.similarity`, of features and labels; "leep", of
            the source's answers, is its exponential, since only positive values weigh.
        label_weight: `w` in [0, 1], the share of the labels.
        probe: Labelled samples that the similarity is measured on, at most; 3 or more.
        normalise: Divide each source's loss by the logarithm of its number of classes, which it grows with.
        power: `p >= 0`; 0 is equal weights of all sources with `e_s > 0`, infinity the best one alone.
        weights: One for each source in the place of measured ones, 0 or more; scaled to sum to one.

    Example:
        >>> from limbeck.methods.other_tasks import source_heads
        >>> m = Roles(**{f"teacher_{i}": torch.nn.Linear(4, 5 + i) for i in range(2)}, student=torch.nn.Linear(4, 3))
        >>> m.heads = source_heads(m, {"teacher_0": 0.7, "teacher_1": 0.3})
        >>> batch = Batch(x=torch.ones(2, 4), y=torch.tensor([0, 2]))
        >>> [update.role for update in DistillWeighted().step(m, batch)]
        ['student', 'heads']
    """

    power: float = 12.0
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field("power", self.power, self.power >= 0, "0 or more")
        if self.weights is not None:
            ok = all(0 <= a < math.inf for a in self.weights) and any(self.weights)
            check_field("weights", self.weights, ok, "numbers of 0 or more, not all of them 0")

    def check(self, m: Roles, batch: Batch) -> None:
        """As the base class, and there is one weight for each source where weights are given."""
        if self.weights is not None and len(self.weights) != len(m.teachers):
            more = "more" if len(m.teachers) > len(self.weights) else "fewer"
            raise UsageError(
                f"there are {more} sources than weights",
                where="method.weights",
                found=f"{len(m.teachers)} sources, {len(self.weights)} weights",
                expected="one weight for each source, in their order",
                fix="give as many, or leave them out: they are measured then",
            )
        super().check(m, batch)

    def check_data(self, data: Any) -> None:
        """As the base class, where weights are measured."""
        if self.weights is None:
            super().check_data(data)

    def weights_by_role(self, source: Source, names: Sequence[str]) -> Generator[Stage, Any, dict[str, float]]:
        """The weight of each source: what is given, or what is measured."""
        if self.weights is None:
            return (yield from super().weights_by_role(source, names))
        return {name: a / sum(self.weights) for name, a in zip(names, self.weights, strict=True)}

    def weigh(self, scores: Sequence[float]) -> list[float]:
        """`max(e, 0)^p`, scaled to sum to one; sources with `e <= 0` weigh nothing whatever the power.

        Where none is above 0, the best has all the weight, with a warning.

        Example:
            >>> [round(a, 6) for a in DistillWeighted(power=1.0).weigh([0.3, -0.1, 0.2, 0.0])]
            [0.6, 0.0, 0.4, 0.0]
        """
        e = torch.tensor(scores, dtype=torch.float64)
        if not (e > 0).any():
            warnings.warn("no source is related to the labels: the best of them is used alone", stacklevel=2)
            return [float(a) for a in F.one_hot(e.argmax(), len(e))]
        powers = (e / e.max()).clamp_min(0) ** self.power  # by the largest, so that none overflows
        a = torch.where(e > 0, powers, 0)
        return [float(weight) for weight in a / a.sum()]
