"""Sources of WAD: two views of each sample, one view for ever, and samples with the labels that a model gave them."""

from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.combine import Paired
from limbeck.data.ids import digest
from limbeck.data.sources import Rows


class TwoViews(Rows):
    """Each sample in two augmented views: the field `other` holds the second, which no epoch shows as a first.

    Args:
        source: A source that augments.

    Raises:
        UsageError: It has one view only.

    Example:
        >>> from limbeck.data import DatasetSource
        >>> noisy = DatasetSource([torch.zeros(2)], transform=lambda x: x + torch.rand(2))
        >>> batch = TwoViews(noisy).batch(torch.tensor([0]), view=0)
        >>> bool((batch.x == batch.other).any())
        False
    """

    def __init__(self, source: Any) -> None:
        if source.views == 1:
            raise UsageError(
                "two views of a sample are needed, and the data have one",
                where="data.unlabelled",
                found=repr(source),
                expected="images that are augmented, or a source with views",
                fix="set data.augment=true, or give an encoder as the teacher",
            )
        self.source, self.ids, self.views = source, source.ids, 0

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`, in the views `2 view` and `2 view + 1`."""
        one, other = (self.source.batch(rows, self._view(2 * view + k)) for k in (0, 1))
        return one.replace(other=other.x)

    def _view(self, view: int) -> int:
        return view % self.source.views if self.source.views else view

    def fingerprint(self) -> str:
        """Of the source."""
        return digest("two views", self.source.fingerprint())


class View(Rows):
    """A source that shows one view, whatever is asked for."""

    def __init__(self, source: Any, view: int) -> None:
        self.source, self.ids = source, source.ids
        self.view = view % source.views if source.views else view

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`."""
        return self.source.batch(rows, self.view)

    def fingerprint(self) -> str:
        """Of the source and the view."""
        return digest("view", self.source.fingerprint(), self.view)


class Labelled(Rows):
    """A source with other labels.

    Args:
        source: The samples.
        labels: `[N]`.
    """

    def __init__(self, source: Any, labels: Tensor) -> None:
        self.source, self.labels, self.ids, self.views = source, labels, source.ids, source.views

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`."""
        assert self.labels is not None
        return self.source.batch(rows, view).replace(y=self.labels[rows])

    def fingerprint(self) -> str:
        """Of the source and the labels."""
        return digest("labelled", self.source.fingerprint(), self.labels)


class Taught(Paired):
    """Labelled samples beside unlabelled ones, whose labels `y` and weights `weight` are a model's.

    Args:
        labelled: A source with labels.
        unlabelled: A source of U samples.
        labels: `[U]`.
        weights: `[U]`.
        seed: Seed of the orders.
    """

    def __init__(self, labelled: Any, unlabelled: Any, labels: Tensor, weights: Tensor, seed: int = 0) -> None:
        super().__init__(labelled, unlabelled, seed)
        self._given = {"y": labels, "weight": weights}
        self._order = unlabelled.ids.argsort()

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The pairs at positions `rows` `[B]` of the larger source."""
        batch = super().batch(rows, view)
        ids = batch.unlabelled["id"]
        at = self._order[torch.searchsorted(self.unlabelled.ids[self._order], ids)]
        return batch.replace(unlabelled={**batch.unlabelled, **{name: t[at] for name, t in self._given.items()}})

    def fingerprint(self) -> str:
        """Of the pairs, the labels and the weights."""
        return digest(super().fingerprint(), *self._given.values())
