"""Sources: data sets that make batches from rows, in which a sample is a function of (id, view)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from limbeck.core.batch import Batch, _map
from limbeck.core.errors import UsageError
from limbeck.data.ids import check_ids, content_ids, digest, seeds
from limbeck.data.images import pixels
from limbeck.data.seeding import isolated, reseed
from limbeck.data.wrapped import describe, known_classes, known_ids, known_labels, without_address

_LABELS = ("label", "labels", "y", "target")


class Rows:
    """What all sources of Limbeck share, whatever their samples are.

    Attributes:
        ids: Stable sample ids `[N]` int64, unique.
        views: Number of augmentation seeds in use; 1 for none, 0 for a new one every epoch.
        labels: The labels `[N, ...]` where they are known without reading samples.
        classes: Class names, where known.
    """

    ids: Tensor
    views: int = 1
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int | None:
        """The number of classes, from the names or from whole-number labels `[N]`; None where unknown."""
        if self.classes is not None:
            return len(self.classes)
        y = self.labels
        whole = y is not None and y.ndim == 1 and not (y.is_floating_point() or y.is_complex()) and len(y) > 0
        return int(y.max()) + 1 if y is not None and whole else None

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]` in view `view`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash that changes when any sample or the augmentation does."""
        raise NotImplementedError

    def subset(self, rows: Tensor | Sequence[int]) -> Rows:
        """The source of the samples at positions `rows` `[M]`, in that order; ids stay, and nothing is copied.

        Example:
            >>> part = TensorSource(torch.arange(10.0)).subset([7, 2])
            >>> part.batch(torch.tensor([0]), view=0).x.tolist()
            [7.0]
        """
        return Subset(self, torch.as_tensor(rows, dtype=torch.int64))

    def __repr__(self) -> str:
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"{type(self).__name__}({len(self)} samples{classes})"


class Subset(Rows):
    """Some rows of another source, as `source.subset(rows)` makes it; any `Source` will do."""

    def __init__(self, source: Any, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.ids = check_ids(source.ids[rows], len(rows), "subset")
        self.views, self.classes = source.views, getattr(source, "classes", None)
        labels = getattr(source, "labels", None)
        self.labels = None if labels is None else labels[rows]

    @property
    def num_classes(self) -> int | None:
        """That of the whole source, since a subset may miss a class."""
        return getattr(self.source, "num_classes", None)

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]` of the subset."""
        return self.source.batch(self.rows.index_select(0, rows), view)

    def fingerprint(self) -> str:
        """Of the source and the rows."""
        return digest(self.source.fingerprint(), self.rows)


class TensorSource(Rows):
    """Samples held in memory as tensors; a batch is one `index_select`.

    Args:
        x: Inputs `[N, ...]` on any device: a tensor, or a mapping or tuple of tensors.
        y: Labels `[N, ...]`.
        ids: Unique whole numbers `[N]`. Default: hashes of the rows' content.
        classes: Class names.

    Raises:
        UsageError: No samples, lengths that differ, NaN or infinite values, labels out of range, ids that are not unique.

    Example:
        >>> source = TensorSource(torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> source.batch(torch.tensor([4, 0]), view=0)
        Batch(x=float32[2, 3, 8, 8], id=int64[2], view=int64[2], y=int64[2])
        >>> source.num_classes
        3
    """

    def __init__(
        self, x: Any, y: Any = None, ids: Tensor | None = None, *, classes: Sequence[str] | None = None
    ) -> None:
        self.x = _tensors(x)
        self.labels = None if y is None else torch.as_tensor(y)
        self.classes = None if classes is None else tuple(classes)
        size = self._check()
        self.ids = check_ids(content_ids(self.x) if ids is None else ids, size, "ids")

    @property
    def y(self) -> Tensor | None:
        """The labels."""
        return self.labels

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`; the view changes nothing."""
        fields: dict[str, Any] = {"x": _map(self.x, lambda t: t.index_select(0, rows.to(t.device)))}
        fields["id"] = self.ids.index_select(0, rows)
        fields["view"] = torch.full((len(rows),), view)
        if self.labels is not None:
            fields["y"] = self.labels.index_select(0, rows.to(self.labels.device))
        return Batch(**fields)

    def fingerprint(self) -> str:
        """A hash of inputs, labels and ids."""
        labels = () if self.labels is None else (content_ids(self.labels),)
        return digest(content_ids(self.x), self.ids, *labels)

    def _check(self) -> int:
        parts = {"x" + (f".{k}" if k else ""): t for k, t in _leaves(self.x)}
        if self.labels is not None:
            parts["y"] = self.labels
        sizes = {name: len(t) if t.ndim else 0 for name, t in parts.items()}
        if len(set(sizes.values())) > 1:
            raise UsageError("inputs and labels have different lengths", where="data", found=sizes)
        if not sizes or not all(sizes.values()):
            raise UsageError("there are no samples", where="data", found=sizes or "no tensors")
        for name, t in parts.items():
            check_finite(t, name)
        if self.labels is not None:
            check_labels(self.labels, None if self.classes is None else len(self.classes))
        return next(iter(sizes.values()))


class DatasetSource(Rows):
    """Any map-style data set of torch, torchvision or Hugging Face.

    An item is an input, a tuple `(x, y)`, or a mapping (one of `label`, `labels`, `y`, `target` is the label; the rest is the
    input). Whatever is drawn while an item is read and transformed, from the global generators of torch, `random` or
    numpy, is a function of (seed, sample id, view): the same in any process and any order.

    Args:
        dataset: Has `__len__` and `__getitem__`.
        transform: Called with the input of a tuple item, or with the whole of any other item.
        views: Number of augmentation seeds: 1 for none, 0 for a new one every epoch. Default: 0 with a transform, else 1.
        ids: Unique whole numbers `[N]`. Default: hashes of the relative paths where the data set lists files, else of its
            content's fingerprint and the position.
        seed: Seed of the augmentation.
        collate: Makes a batch from a list of items.
        classes: Class names. Default: `dataset.classes`.

    Raises:
        UsageError: No samples, or ids that are not unique.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = TensorDataset(torch.zeros(4, 3, 8, 8), torch.arange(4))
        >>> source = DatasetSource(images, transform=lambda x: x + torch.rand(()))
        >>> one, again = (source.batch(torch.tensor([2, 3]), view=5).x for _ in range(2))
        >>> bool((one == again).all()), bool((one == source.batch(torch.tensor([2, 3]), view=6).x).any())
        (True, False)
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Any] | None = None,
        views: int | None = None,
        ids: Tensor | None = None,
        seed: int = 0,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.dataset, self.transform, self.seed, self.collate = dataset, transform, seed, collate or default_collate
        self.views = (0 if transform else 1) if views is None else views
        size = len(dataset)
        if not size:
            raise UsageError("there are no samples", where="data", found=f"an empty {type(dataset).__name__}")
        self.ids = check_ids(known_ids(dataset) if ids is None else ids, size, "ids")
        self.labels = known_labels(dataset)
        self.classes = known_classes(dataset) if classes is None else tuple(classes)
        if self.labels is not None and self.labels.ndim == 1:
            check_labels(self.labels, None if self.classes is None else len(self.classes))

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]`, augmented with view `view`."""
        ids = self.ids.index_select(0, rows)
        with isolated():
            items = []
            for row, seed in zip(rows.tolist(), seeds(ids, view, self.seed).tolist(), strict=True):
                reseed(seed)
                items.append(self._item(row))
            x, y = _divide(self._collated(items))
        fields = {"x": x, "id": ids, "view": torch.full((len(rows),), view)}
        return Batch(**fields) if y is None else Batch(**fields, y=y)

    def fingerprint(self) -> str:
        """A hash of what the data set says of itself (or of some of its samples), the ids and the transform.

        Files count with path and size, tensors with their content, other data sets with evenly spaced samples.
        """
        return digest(describe(self.dataset), self.ids, without_address(repr(self.transform)), self.seed, self.views)

    def _item(self, row: int) -> Any:
        item = self.dataset[row]
        if self.transform is not None:
            plain = isinstance(item, tuple | list)
            item = (self.transform(item[0]), *item[1:]) if plain else self.transform(item)
        return _numbers(item)

    def _collated(self, items: list[Any]) -> Any:
        try:
            return self.collate(items)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                "the samples cannot be stacked into a batch",
                where=type(self.dataset).__name__,
                found=str(error).splitlines()[0],
                expected="items whose tensors have one shape",
                fix="give a transform that resizes images, a collate function that pads, or a TextSource for text",
            ) from error


def check_finite(values: Tensor, where: str) -> None:
    """Raise a `UsageError` for NaN or infinite values, naming the first row."""
    if values.is_floating_point() and not bool(values.isfinite().all()):
        bad = (~values.isfinite()).reshape(len(values), -1).any(1).nonzero().flatten()
        raise UsageError(
            "the data hold NaN or infinite values",
            where=where,
            found=f"{len(bad)} such rows, the first is row {int(bad[0])}",
            expected="finite numbers",
            fix="drop or fill these rows",
        )


def check_labels(labels: Tensor, num_classes: int | None, where: str = "y") -> None:
    """Raise a `UsageError` for whole-number labels `[N]` outside `0 .. num_classes - 1`, naming the first row."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or not len(labels):
        return
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise UsageError(
            "a label is out of range",
            where=where,
            found=f"{int(labels[row])} in row {row}",
            expected="0 or more" if num_classes is None else f"0 to {num_classes - 1} for {num_classes} classes",
            fix="number the classes from 0, or give the right number of classes",
        )


def _tensors(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _tensors(value) for name, value in x.items()}
    return tuple(_tensors(value) for value in x) if isinstance(x, tuple) else torch.as_tensor(x)


def _leaves(x: Any) -> list[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        return [("", x)]
    items = x.items() if isinstance(x, Mapping) else enumerate(x)
    return [(f"{name}.{k}" if k else str(name), t) for name, value in items for k, t in _leaves(value)]


def _numbers(item: Any) -> Any:
    """An item whose images (PIL) are tensors."""
    if isinstance(item, Mapping):
        return {name: _numbers(value) for name, value in item.items()}
    if isinstance(item, tuple):
        return tuple(_numbers(value) for value in item)
    return pixels(item) if type(item).__module__.startswith("PIL.") else item


def _divide(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a collated batch."""
    if isinstance(batch, Mapping):
        label = next((name for name in _LABELS if name in batch), None)
        rest = {k: v for k, v in batch.items() if k != label and isinstance(v, Tensor | Mapping)}
        if not rest:
            raise UsageError("the items hold no tensors", where="data", found=sorted(batch))
        return next(iter(rest.values())) if len(rest) == 1 else rest, None if label is None else batch[label]
    if isinstance(batch, tuple | list):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) != 2:
            raise UsageError(
                "an item of the data set is not understood",
                where="data",
                found=f"{len(batch)} values",
                expected="x, (x, y), or a mapping",
            )
        x, y = batch
        return tuple(x) if isinstance(x, list) else x, torch.as_tensor(np.asarray(y)) if isinstance(y, list) else y
    return batch, None
