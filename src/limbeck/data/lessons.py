"""What a training on a condensed set sees, and the set as a source of data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.augment import Views
from limbeck.data.ids import digest
from limbeck.data.sources import Rows, TensorSource

if TYPE_CHECKING:
    from limbeck.data.condensed import Condensed
    from limbeck.data.condensed_graphs import CondensedGraphs


@dataclass(frozen=True, eq=False)
class Lessons:
    """The batches of a training on a condensed set, as a function of the step: `x` as it is seen, and what is to be learned.

    Args:
        x: Samples `[N, ...]`.
        targets: One-hot labels or logits `[N, C]`, mixed as the samples are; or logits `[E, N, C]` of the views of each epoch,
            which belong to what is seen there as they are.
        views: Order, augmentation and mixing.

    Example:
        >>> lessons = Lessons(torch.rand(5, 3), torch.eye(5), Views(batch_size=2))
        >>> len(lessons), lessons(0), lessons(2).id.tolist() == lessons(0).id.tolist()
        (2, Batch(x=float32[2, 3], target=float32[2, 5], id=int64[2], view=int64[2]), False)
    """

    x: Tensor
    targets: Tensor
    views: Views
    kept: dict[int, list[Any]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._epoch(0))

    def __call__(self, step: int, generator: torch.Generator | None = None) -> Batch:
        """The batch of a step; nothing is drawn from the generator."""
        epoch, number = divmod(step, len(self))
        replayed = self.targets.ndim == 3
        shown = epoch % len(self.targets) if replayed else epoch
        rows, see = self._epoch(shown)[number]
        x, mixing = see(self.x[rows])
        target = (self.targets[shown] if replayed else self.targets)[rows]
        if mixing is not None and not replayed:
            target = mixing.targets(target)
        return Batch(x=x, target=target, id=rows, view=torch.full_like(rows, shown))

    def _epoch(self, epoch: int) -> list[Any]:
        if epoch not in self.kept:
            first = self.kept.get(0)  # whose length is asked for at every step
            self.kept.clear()
            if first is not None:
                self.kept[0] = first
            self.kept[epoch] = list(self.views.epoch(epoch, len(self.x)))
        return self.kept[epoch]


class CondensedSource(TensorSource):
    """A condensed set as data: `batch.y` are class numbers; with one table of soft labels, `batch.soft` are logits `[B, C]`.

    Tables of labels for each epoch belong to views and not to samples: `limbeck.evaluate.own_training` reads those.

    Args:
        condensed: The set.
    """

    def __init__(self, condensed: Condensed) -> None:
        self.condensed = condensed
        with torch.no_grad():
            x = condensed().detach()
        super().__init__(x, condensed.y, torch.arange(len(condensed)), classes=condensed.info.get("classes"))

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`."""
        batch, soft = super().batch(rows, view), self.condensed.soft
        return batch if soft is None or soft.ndim == 3 else batch.replace(soft=soft[rows].float())

    def fingerprint(self) -> str:
        """Of samples and all labels."""
        soft = self.condensed.soft
        return super().fingerprint() if soft is None else digest(super().fingerprint(), soft)


class SetsSource(Rows):
    """Condensed graphs as data: `batch.x` are sets of trees side by side, with `roots`, the nodes that are read.

    Args:
        condensed: The sets.
        batch_size: Of `drawn`.
        seed: Of `drawn`.
    """

    def __init__(self, condensed: CondensedGraphs, batch_size: int = 32, seed: int = 0) -> None:
        self.condensed, self.batch_size, self.seed = condensed, batch_size, seed
        self.ids, self.labels = torch.arange(len(condensed)), condensed.labels.long()

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The sets at positions `rows` `[B]`."""
        x = self.condensed.examples(rows.tolist())
        return Batch(id=self.ids[rows], view=torch.full_like(rows, view), y=self.condensed.labels[rows].long(), x=x)

    def drawn(self, step: int, generator: torch.Generator) -> Batch:
        """Sets by the number of graphs that hold them, with replacement: the batch of a training's step."""
        rows = torch.multinomial(self.condensed.counts.double(), self.batch_size, replacement=True, generator=generator)
        return self.batch(rows, 0)

    def fingerprint(self) -> str:
        """Of all sets."""
        small = self.condensed
        return digest("sets", small.nodes, small.parents, small.items, small.counts, small.labels)
