"""Sources made of two: one after the other, or side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, _map
from limbeck.core.errors import UsageError
from limbeck.data.ids import check_ids, digest, mix
from limbeck.data.sources import Rows


class Concatenated(Rows):
    """The samples of several sources in one, with the fields that all of them have.

    Args:
        *sources: Sources of inputs of one form; a sample that is in two of them counts once, in the first.

    Example:
        >>> from limbeck.data import TensorSource
        >>> labelled = TensorSource(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]))
        >>> both = Concatenated(labelled, TensorSource(torch.tensor([[2.0], [3.0]])))
        >>> both.batch(torch.tensor([2, 0]), view=0).x.tolist(), "y" in both.batch(torch.tensor([0]), view=0)
        ([[3.0], [1.0]], False)
    """

    def __init__(self, *sources: Any) -> None:
        self.sources = sources
        ids = torch.cat([source.ids for source in sources])
        part = torch.cat([torch.full((len(s),), i) for i, s in enumerate(sources)])
        row = torch.cat([torch.arange(len(s)) for s in sources])
        _, inverse = ids.unique(return_inverse=True)
        order = inverse.argsort(stable=True)
        starts = torch.ones(len(ids), dtype=torch.bool)
        starts[1:] = inverse[order][1:] != inverse[order][:-1]
        kept = order[starts].sort().values
        self.ids, self._part, self._row = check_ids(ids[kept], len(kept), "sources"), part[kept], row[kept]
        self.views = 0 if any(s.views == 0 for s in sources) else max(s.views for s in sources)
        labels = [y for s in sources if (y := getattr(s, "labels", None)) is not None]
        self.labels = torch.cat(labels)[kept] if len(labels) == len(sources) else None
        self.classes = getattr(sources[0], "classes", None)

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`."""
        part, row = self._part[rows], self._row[rows]
        found = []
        for i, source in enumerate(self.sources):
            if len(mine := row[part == i]):
                found.append(source.batch(mine, _view(source, view)).fields())
        names = [name for name in found[0] if all(name in fields for fields in found)]
        places = torch.cat([(part == i).nonzero().flatten() for i in range(len(self.sources))]).argsort()
        kept = [n for n in names if n != "y" or self.labels is not None]
        return Batch(**{n: _map(_cat([f[n] for f in found]), lambda t: t[places.to(t.device)]) for n in kept})

    def fingerprint(self) -> str:
        """Of the sources, in their order."""
        return digest(*(source.fingerprint() for source in self.sources))


class Paired(Rows):
    """Labelled samples, each beside an unlabelled one: a batch of B has B of both, so that one forward pass sees them all.

    An epoch is one pass over the larger source; the smaller one is passed over again and again, in a new random order each
    time. The fields of the batch are those of the labelled samples, and `unlabelled` is a mapping with the fields `x`,
    `id` and `view` of the others.

    Args:
        labelled: A source with labels.
        unlabelled: A source of inputs of the same form; labels in it are not handed on.
        seed: Seed of the orders.

    Example:
        >>> from limbeck.data import TensorSource
        >>> few = TensorSource(torch.rand(2, 3), torch.tensor([0, 1]))
        >>> pairs = Paired(few, TensorSource(torch.rand(5, 3)))
        >>> batch = pairs.batch(torch.arange(4), view=0)
        >>> len(pairs), batch.y.bincount().tolist(), batch.unlabelled["x"].shape
        (5, [2, 2], torch.Size([4, 3]))
    """

    def __init__(self, labelled: Any, unlabelled: Any, seed: int = 0) -> None:
        self.labelled, self.unlabelled, self.seed = labelled, unlabelled, seed
        self.ids = (labelled if len(labelled) >= len(unlabelled) else unlabelled).ids
        self.views = 0  # every epoch pairs anew
        self.classes = getattr(labelled, "classes", None)

    @property
    def num_classes(self) -> int | None:
        """That of the labelled source."""
        return getattr(self.labelled, "num_classes", None)

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The pairs at positions `rows` `[B]` of the larger source."""
        first, second = (
            source.batch(self._rows(rows, len(source), view), _view(source, view))
            for source in (self.labelled, self.unlabelled)
        )
        return first.replace(unlabelled={name: second.get(name) for name in ("x", "id", "view")})

    def fingerprint(self) -> str:
        """Of both sources and the seed."""
        return digest(self.labelled.fingerprint(), self.unlabelled.fingerprint(), self.seed)

    def _rows(self, rows: Tensor, size: int, view: int) -> Tensor:
        if size == len(self):
            return rows
        turns = rows // size
        found = torch.empty_like(rows)
        for turn in turns.unique().tolist():
            key = int(mix(torch.tensor(view * 1_000_003 + turn)) ^ mix(torch.tensor(self.seed)))
            order = torch.randperm(size, generator=torch.Generator().manual_seed(key))
            here = turns == turn
            found[here] = order[rows[here] % size]
        return found


def together(batch: Batch) -> tuple[Any, int]:
    """The inputs of a `Paired` batch, labelled first, for one forward pass; and how many are labelled.

    Example:
        >>> batch = Batch(x=torch.ones(2, 3), unlabelled={"x": torch.zeros(2, 3)})
        >>> together(batch)[0].shape, together(batch)[1]
        (torch.Size([4, 3]), 2)
    """
    return _cat([batch.x, batch.unlabelled["x"]]), len(batch)


def check_unlabelled(source: Any, where: str = "data.unlabelled") -> None:
    """Raise a `UsageError` where samples that should have no labels have some.

    Example:
        >>> from limbeck.data import TensorSource
        >>> check_unlabelled(TensorSource(torch.rand(2, 3)))
    """
    if "y" in source.batch(torch.zeros(1, dtype=torch.int64), 0):
        raise UsageError(
            "the unlabelled data have labels, which would not be used",
            where=where,
            found=repr(source),
            expected="samples without labels",
            fix="give labelled samples as data.train, or leave the labels out: no class folders, no label column",
        )


def _view(source: Any, view: int) -> int:
    return view % source.views if source.views else view


def _cat(parts: list[Any]) -> Any:
    """Tensors, or mappings or tuples of tensors, one after the other; token ids of several lengths are padded with 0."""
    first = parts[0]
    if isinstance(first, Tensor):
        width = max(t.shape[1] for t in parts) if first.ndim > 1 else 0
        ragged = first.ndim == 2 and not first.is_floating_point() and any(t.shape[1] != width for t in parts)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in parts] if ragged else parts)
    if isinstance(first, dict):
        return {name: _cat([part[name] for part in parts]) for name in first}
    return tuple(_cat(list(items)) for items in zip(*parts, strict=True))
