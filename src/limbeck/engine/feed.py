"""The batches of a stage: which rows, which view, whose part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.engine.settings import Engine


@dataclass
class Position:
    """Where a stage is in its data: finished epochs, batches done in this one, and the rows selected for it."""

    epoch: int = 0
    batch: int = 0
    rows: Tensor | None = None


@dataclass(frozen=True)
class Feed:
    """Makes the micro-batches of this process, in an order that depends on (seed, epoch) alone.

    Args:
        data: A `Source`, a data loader, a function `(step, generator) -> Batch`, or None.
        engine: The settings.
        rank: This process.
        world: All processes.
        select: The method's choice of sample ids for an epoch.
    """

    data: Any
    engine: Engine
    rank: int = 0
    world: int = 1
    select: Callable[[Roles, int], Tensor | None] | None = None

    @property
    def parts(self) -> int:
        """Micro-batches of all processes together."""
        return self.world * self.engine.micro_batches

    def epoch_steps(self) -> int | None:
        """Steps of one epoch over all rows; None for endless data."""
        if isinstance(self.data, Source):
            return self._count(len(self.data))
        return len(self.data) if hasattr(self.data, "__len__") else None

    def _count(self, rows: int) -> int:
        whole, rest = divmod(rows, self.engine.batch_size)
        # A last batch that is smaller than the number of parts cannot be shared out.
        return whole + (rest >= self.parts)

    def epoch(self, m: Roles, at: Position) -> Iterator[tuple[int, list[Batch]]]:
        """The rest of epoch `at.epoch` from batch `at.batch`: samples in the whole batch, and this process's parts."""
        if isinstance(self.data, Source):
            return self._rows(m, at)
        if self.data is None or not hasattr(self.data, "__iter__"):
            return self._endless(m)
        return self._loader(at)

    def _rows(self, m: Roles, at: Position) -> Iterator[tuple[int, list[Batch]]]:
        from limbeck.data.loading import batches
        from limbeck.data.text import like_lengths

        source: Source = self.data
        if at.rows is None and self.select is not None:
            ids = self.select(m, at.epoch)
            at.rows = None if ids is None else rows_of(source, ids)
        generator = torch.Generator().manual_seed(self.engine.seed * 1_000_003 + at.epoch)
        count = len(source) if at.rows is None else len(at.rows)
        order = torch.randperm(count, generator=generator)
        order = order if at.rows is None else at.rows[order]
        lengths = getattr(source, "lengths", None)
        if lengths is not None and self.engine.group_by_length:
            order = like_lengths(order, lengths, self.engine.batch_size, generator)
        view = at.epoch % source.views if source.views else at.epoch
        size, parts, mine = self.engine.batch_size, self.parts, self.engine.micro_batches
        chunks = [order[i * size : (i + 1) * size] for i in range(at.batch, self._count(count))]

        def plan() -> Iterator[tuple[Tensor, int]]:
            for rows in chunks:
                low, high = (len(rows) * p // parts for p in (self.rank * mine, (self.rank + 1) * mine))
                yield rows[low:high], view

        loaded = batches(source, plan(), workers=self.engine.workers)
        for rows, batch in zip(chunks, loaded, strict=True):
            yield len(rows), self._micro(batch, len(rows))

    def _micro(self, batch: Batch, whole: int) -> list[Batch]:
        if self.engine.micro_batches == 1:
            return [batch]
        mine = self.engine.micro_batches
        bounds = [whole * p // self.parts for p in range(self.rank * mine, (self.rank + 1) * mine + 1)]
        return [batch[low - bounds[0] : high - bounds[0]] for low, high in pairwise(bounds)]

    def _share(self, batch: Batch) -> tuple[int, list[Batch]]:
        if self.parts == 1:
            return len(batch) if batch.fields() else 1, [batch]
        mine = self.engine.micro_batches
        return len(batch), list(batch.split(self.parts))[self.rank * mine : (self.rank + 1) * mine]

    def _endless(self, m: Roles) -> Iterator[tuple[int, list[Batch]]]:
        while True:
            yield self._share(Batch() if self.data is None else self.data(m.step, m.rng("data")))

    def _loader(self, at: Position) -> Iterator[tuple[int, list[Batch]]]:
        # The loader shuffles from the global generator: a seed per epoch makes its order a function of the epoch.
        state = torch.get_rng_state()
        torch.manual_seed(self.engine.seed * 1_000_003 + at.epoch)
        items = iter(self.data)
        torch.set_rng_state(state)
        for i, item in enumerate(items):
            if i >= at.batch:
                yield self._share(as_batch(item))


def as_batch(item: Any) -> Batch:
    """A batch from what a data loader yields: a `Batch`, `(x, y)` or `(x, y, id)`, a mapping, or a bare input.

    Example:
        >>> as_batch((torch.ones(2, 3), torch.zeros(2)))
        Batch(x=float32[2, 3], y=float32[2])
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, tuple | list) and 1 <= len(item) <= 3:
        return Batch(**dict(zip(("x", "y", "id"), item, strict=False)))
    if isinstance(item, dict) and "x" in item:
        return Batch(**item)
    if hasattr(item, "items"):
        fields = dict(item.items())
        label = next((fields.pop(k) for k in ("labels", "label", "y") if k in fields), None)
        ids = {k: fields.pop(k) for k in ("id", "view") if k in fields}
        return Batch(x=fields, **ids, **({} if label is None else {"y": label}))
    return Batch(x=item)


def rows_of(source: Source, ids: Tensor) -> Tensor:
    """The positions of sample ids `[M]` in a source; an error names ids that it does not have."""
    order = source.ids.argsort()
    found = torch.searchsorted(source.ids[order], ids).clamp_(max=len(source) - 1)
    rows = order[found]
    if not torch.equal(source.ids[rows], ids):
        missing = ids[source.ids[rows] != ids]
        raise UsageError("sample ids that the data do not have", where="select", found=missing[:5].tolist())
    return rows
