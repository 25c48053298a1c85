"""Classes that arrive in groups: increments of a labelled data set, and a small memory of the classes that were seen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.combine import Concatenated
from limbeck.data.data import Data
from limbeck.data.ids import digest
from limbeck.data.sources import Rows

_NAME = re.compile(r"increment_(\d+)$")


class Relabelled(Rows):
    """A source whose labels are the places of its classes in an order: the class that arrives first is 0.

    Args:
        source: A source with labels `[N]` of whole numbers.
        order: The classes, each once, as they arrive; a label that is not in it becomes -1.

    Example:
        >>> from limbeck.data import TensorSource
        >>> source = Relabelled(TensorSource(torch.rand(3, 2), torch.tensor([4, 7, 4])), order=[7, 4])
        >>> source.labels.tolist(), source.batch(torch.tensor([1]), view=0).y.tolist()
        ([1, 0, 1], [0])
    """

    labels: Tensor

    def __init__(self, source: Any, order: Sequence[int]) -> None:
        self.source, self.order = source, tuple(order)
        self.ids, self.views, self.lengths = source.ids, source.views, getattr(source, "lengths", None)
        self._places = torch.full((max(self.order) + 2,), -1)
        self._places[torch.tensor(self.order)] = torch.arange(len(self.order))
        self.labels = self._place(source.labels)
        names = getattr(source, "classes", None)
        self.classes = None if names is None else tuple(names[c] for c in self.order)

    @property
    def num_classes(self) -> int:
        """The classes of the order."""
        return len(self.order)

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`."""
        batch = self.source.batch(rows, view)
        return batch.replace(y=self._place(batch.y))

    def fingerprint(self) -> str:
        """Of the source and the order."""
        return digest(self.source.fingerprint(), self.order)

    def _place(self, labels: Tensor) -> Tensor:
        return self._places[labels.long().clamp(-1, max(self.order) + 1)]


@dataclass(frozen=True, eq=False)
class Increments:
    """A labelled data set whose classes arrive in groups.

    Args:
        source: All samples, labelled by the place of their class in `order`.
        order: The classes as they arrive.
        sizes: Classes of each group.
        memory: Ids of the samples that are remembered from the start, for each class that is known from the start.
    """

    source: Relabelled
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    memory: tuple[Tensor, ...] = ()

    @staticmethod
    def of(data: Data, groups: int | Sequence[int], seed: int | None = None) -> Increments:
        """The increments of a data set, by name or by class.

        Where there are splits `increment_0`, `increment_1`, ..., these are the increments, each with the classes that it
        has; without an `increment_0`, `train` is the first. Else `train` is divided: its classes, in random order, into
        `groups`. Where there is a split `memory`, its classes are known from the start, and it is all that is left of them.

        Args:
            data: Splits with labels `[N]`; classes are numbered from 0, without gaps.
            groups: Number of groups, whose sizes differ by one at most, or the size of each.
            seed: Seed of the order of the classes; None keeps the order of their numbers.

        Raises:
            UsageError: Labels are not known, an increment is missing or has a class of an earlier one, a class has no
                samples, a split that is judged on has a class that never arrives, or the sizes do not fit.

        Example:
            >>> from limbeck.data import TensorSource
            >>> y = torch.arange(12) % 6
            >>> found = Increments.of(Data(train=TensorSource(torch.rand(12, 2), y)), groups=2, seed=1993)
            >>> found.order, found.sizes, found.source.labels[:6].tolist()
            ((0, 2, 3, 4, 5, 1), (3, 3), [0, 5, 1, 2, 3, 4])
        """
        names = _increments(data)
        known = _classes(data, "memory") if "memory" in data else []
        arriving = [_classes(data, name) for name in names]
        for k, name in enumerate(names):
            earlier = {*known, *(c for group in arriving[:k] for c in group)}
            _refuse(
                sorted(earlier & set(arriving[k])),
                "an increment has classes that arrived before",
                f"data.{name}",
                "each class in one increment; what is remembered of earlier classes goes into data.memory",
            )
        if len(names) == 1:
            arriving = [[arriving[0][i] for i in class_order(len(arriving[0]), seed)]]
            sizes = group_sizes(len(arriving[0]), groups)
        else:
            sizes = tuple(len(group) for group in arriving)
        order = (*known, *(c for group in arriving for c in group))
        _check_order(data, order)
        parts = [*(["memory"] if known else []), *names]
        whole = data[parts[0]] if len(parts) == 1 else Concatenated(*(data[name] for name in parts))
        source = Relabelled(whole, order)
        memory = tuple(source.ids[source.labels == c] for c in range(len(known)))
        return Increments(source, order, sizes, memory)

    @property
    def known(self) -> int:
        """Classes that are known from the start."""
        return len(self.memory)

    def seen(self, step: int) -> int:
        """Classes that have arrived when increment `step` is there."""
        return self.known + sum(self.sizes[: step + 1])

    def train(self, step: int, memory: Sequence[Tensor]) -> Rows:
        """The samples of increment `step`, and those that are remembered.

        Args:
            step: Which increment.
            memory: Ids for each class seen before.
        """
        labels = self.source.labels
        new = (labels >= self.seen(step - 1)) & (labels < self.seen(step))
        kept = torch.isin(self.source.ids, torch.cat(list(memory))) if memory else torch.zeros_like(new)
        arrived = Relabelled(self.source.source, self.order[: self.seen(step)])  # which knows of no other class
        return arrived.subset((new | kept).nonzero().flatten())

    def of_class(self, place: int) -> Rows:
        """The samples of the class at a place of the order."""
        return self.source.subset((self.source.labels == place).nonzero().flatten())

    def judged(self, source: Any, step: int) -> Rows:
        """The samples of a held-out source whose classes have arrived at increment `step`."""
        relabelled = Relabelled(source, self.order)
        return relabelled.subset(((relabelled.labels >= 0) & (relabelled.labels < self.seen(step))).nonzero().flatten())


def class_order(classes: int, seed: int | None = None) -> tuple[int, ...]:
    """The classes in random order, by numpy's old generator: seed 1993 gives the usual order of CIFAR-100.

    Args:
        classes: Number of classes.
        seed: Seed; None keeps the order of their numbers.

    Example:
        >>> class_order(100, seed=1993)[:5]
        (68, 56, 78, 8, 23)
    """
    if seed is None:
        return tuple(range(classes))
    return tuple(np.random.RandomState(seed).permutation(classes).tolist())


def group_sizes(classes: int, groups: int | Sequence[int]) -> tuple[int, ...]:
    """Classes of each group.

    Args:
        classes: Number of classes.
        groups: Number of groups, 1 to `classes`, whose sizes differ by one at most; or the sizes themselves.

    Raises:
        UsageError: The sizes do not sum to the number of classes, or a group would be empty.

    Example:
        >>> group_sizes(10, 4), group_sizes(10, [6, 4])
        ((3, 3, 2, 2), (6, 4))
    """
    if isinstance(groups, int) and 1 <= groups <= classes:
        return tuple(classes // groups + (k < classes % groups) for k in range(groups))
    if isinstance(groups, int) or sum(groups) != classes or min(groups) < 1:
        raise UsageError(
            "the classes do not divide into these increments",
            where="increments",
            found=groups,
            expected=f"1 to {classes} groups, or sizes above 0 that sum to {classes}",
        )
    return tuple(groups)


def herd(features: Tensor, count: int) -> Tensor:
    """The samples whose running mean stays closest to the mean of all: `argmin_i ||mu - (f_i + sum_selected) / k||`, k = 1, ...

    Features are scaled to length 1 first, `mu` is their mean (Rebuffi et al. 2017, iCaRL, algorithm 4).

    Args:
        features: `[N, d]`.
        count: Samples to choose, 0 to N.

    Returns:
        Positions `[count]` of different samples, the most typical first: a prefix of it is the choice of fewer.

    Example:
        >>> herd(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]), count=2).tolist()
        [2, 0]
    """
    f = torch.nn.functional.normalize(features.double(), dim=1)  # [N, d]
    mean, total = f.mean(0), torch.zeros_like(f[0])
    chosen = torch.zeros(count, dtype=torch.int64)
    free = torch.ones(len(f), dtype=torch.bool)
    for k in range(count):
        distance = (mean - (total + f) / (k + 1)).norm(dim=1).masked_fill(~free, torch.inf)  # [N]
        chosen[k] = distance.argmin()
        free[chosen[k]] = False
        total = total + f[chosen[k]]
    return chosen


def _increments(data: Data) -> list[str]:
    """The splits that are increments, in their order."""
    numbers = sorted(int(found[1]) for name in data if (found := _NAME.match(name)))
    first = min(numbers[0], 1) if numbers else 1
    if numbers and numbers != list(range(first, first + len(numbers))):
        raise UsageError(
            "an increment is missing",
            where="data",
            found=", ".join(f"increment_{k}" for k in numbers),
            expected="increment_0, increment_1, ..., or train, increment_1, ...",
            fix="number the splits without gaps",
        )
    return [*(["train"] if first else []), *(f"increment_{k}" for k in numbers)]


def _classes(data: Data, name: str) -> list[int]:
    labels = getattr(data[name], "labels", None)
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise UsageError(
            "classes that arrive in groups need labels that are known without reading the samples",
            where=f"data.{name}",
            found="no labels" if labels is None else f"labels {labels.dtype} {list(labels.shape)}",
            expected="one class index per sample",
            fix="give tensors, image folders, or tables with a label column",
        )
    return labels.unique().tolist()


def _check_order(data: Data, order: Sequence[int]) -> None:
    """All classes arrive, and nothing is judged on one that does not."""
    for name in ("validation", "test"):
        if name in data:
            unseen = sorted(set(_classes(data, name)) - set(order))
            _refuse(unseen, "a class is judged that never arrives", f"data.{name}", "classes of the increments")
    total = max(data.num_classes or 0, max(order) + 1)
    missing = sorted(set(range(total)) - set(order))
    _refuse(missing, "a class has no samples in any increment", "data", f"samples of all {total} classes")


def _refuse(classes: Sequence[int], what: str, where: str, expected: str) -> None:
    if classes:
        found = f"class {', '.join(map(str, classes[:10]))}"
        raise UsageError(what, where=where, found=found, expected=expected, fix="correct the labels or the splits")
