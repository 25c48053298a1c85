"""From tables, images and objects to sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from limbeck.core.errors import UsageError
from limbeck.core.source import Source
from limbeck.data import tables
from limbeck.data.data import Data, divide
from limbeck.data.folders import split_name
from limbeck.data.image_text import ImageText, captioned
from limbeck.data.images import Images, image_transform
from limbeck.data.labels import encode
from limbeck.data.options import DataOptions
from limbeck.data.sources import DatasetSource, TensorSource
from limbeck.data.text import TextSource


def from_tables(found: Mapping[str, tables.Table], o: DataOptions, tokenizer: Callable[..., Any] | None) -> Data:
    """Sources of images, texts or numbers from the tables of the splits."""
    if empty := [table.where for table in found.values() if not table.length]:
        raise UsageError("there are no samples", where=empty[0], found="no rows")
    first = found.get("train") or next(iter(found.values()))
    choice = tables.choose(first, o.image, o.text, o.features, o.label)
    _check_alike(found, first, choice)
    key = choice.label or ""
    values = {name: table.read(key) if key in table.kinds else None for name, table in found.items()}
    labels, classes = encode(values, o.classes or first.classes.get(key))
    if choice.image:
        raw = {name: _images(table, choice.image, labels[name], classes) for name, table in found.items()}
        captions = {name: _captions(table, o, raw[name]) for name, table in found.items()} if o.text else {}
        return with_transforms(raw, o, tokenizer, captions)
    sources: dict[str, Any] = {}
    for name, table in found.items():
        if choice.text:
            columns = [table.read(column) for column in choice.text]
            texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
            sources[name] = TextSource(texts, tokenizer, labels[name], max_length=o.max_length, classes=classes)
        else:
            sources[name] = TensorSource(_numbers(table, choice.features), labels[name], classes=classes)
    return Data(**complete(sources, o))


def _check_alike(found: Mapping[str, tables.Table], first: tables.Table, choice: tables.Choice) -> None:
    for column in filter(None, (choice.image, *choice.text, *choice.features)):
        expected = first.kinds[column]
        for table in found.values():
            kind = table.kinds.get(column, "other")
            if kind != expected and not {kind, expected} <= {"integer", "number"}:
                content = f"{column}: {kind if column in table.kinds else 'no such column'}"
                raise UsageError("splits have different columns", where=table.where, found=content, expected=expected)


def _images(table: tables.Table, column: str, labels: Tensor | None, classes: tuple[str, ...] | None) -> Images:
    blobs = table.read(column)
    return Images(blobs, blobs.ids(), labels, classes, table.where)


def _numbers(table: tables.Table, columns: Sequence[str]) -> Tensor:
    """Columns `[N]` side by side as `[N, F]`, or one column of arrays `[N, ...]`, in float32."""
    arrays = []
    for column in columns:
        if (kind := table.kinds[column]) not in ("integer", "number", "vector"):
            where = f"{table.where}: {column}"
            raise UsageError("a feature is not a number", where=where, found=kind, expected="numbers")
        array = np.asarray(table.read(column), dtype=np.float32)
        arrays.append(array[:, None] if array.ndim == 1 else array)
        if not np.isfinite(array).all():
            rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
            found = f"{len(rows)} such rows, the first is row {rows[0]}"
            raise UsageError(
                "the data hold missing, NaN or infinite values",
                where=f"{table.where}: {column}",
                found=found,
                fix="drop or fill these rows",
            )
    return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1))


def _captions(table: tables.Table, o: DataOptions, images: Images) -> dict[int, str]:
    """The text of each image, by its id."""
    if not isinstance(o.text, str):
        raise UsageError("an image has one text", where="data.text", found=o.text, expected="one column")
    return dict(zip(images.ids.tolist(), table.read(o.text), strict=True))


def with_transforms(
    raw: Mapping[str, Images],
    o: DataOptions,
    tokenizer: Callable[..., Any] | None = None,
    captions: Mapping[str, Mapping[int, str]] | None = None,
) -> Data:
    """Sources of images, all splits of them: cropped and flipped at random for training, in the middle for judging.

    With captions, or with `data.prompt` and classes, they are sources of pairs.
    """
    sizes = [images.check() for images in raw.values()]
    size = o.image_size or min(224, *sizes[0])
    plain, random = image_transform(size, augment=False), image_transform(size, augment=True)
    sources: dict[str, Any] = {}
    for name, images in complete(raw, o).items():
        if o.augment and name not in ("validation", "test"):
            sources[name] = DatasetSource(images, random, views=o.views, seed=o.seed)
        else:
            sources[name] = DatasetSource(images, plain, views=1, seed=o.seed)
    if captions or o.prompt:
        texts = {row: text for split in (captions or {}).values() for row, text in split.items()}
        sources = {name: _paired(source, o, tokenizer, texts) for name, source in sources.items()}
    return Data(**sources)


def _paired(source: Any, o: DataOptions, tokenizer: Callable[..., Any] | None, texts: Mapping[int, str]) -> ImageText:
    """Images with their own texts, or with those of their classes; prompts where there are both."""
    tokens = tokenizer or _utf8
    if not texts:
        return captioned(source, o.prompt or "", source.classes or (), tokens, max_length=o.max_length)
    own = TextSource(
        [texts[row] for row in source.ids.tolist()], tokens, ids=torch.arange(len(source)), max_length=o.max_length
    )
    if o.prompt is None or source.classes is None:
        return ImageText(source, own)
    return ImageText(source, own, captioned(source, o.prompt, source.classes, tokens, max_length=o.max_length).prompts)


def _utf8(texts: Sequence[str]) -> dict[str, list[list[int]]]:
    return {"input_ids": [list(text.encode()) for text in texts]}


def complete(raw: Mapping[str, Any], o: DataOptions) -> dict[str, Any]:
    """All splits, train first, with those that are missing taken from it."""
    have = set(raw) & {"train", "validation", "test"}
    if len(raw) == 1:
        shares = {"train": 1 - o.validation - o.test, "validation": o.validation, "test": o.test}
        raw = {"train": next(iter(raw.values()))}
    elif have == {"train", "test"} or have == {"train"}:
        shares = {"train": 1 - o.validation, "validation": o.validation}
    else:
        return {name: raw[name] for name in sorted(raw, key=_place)}
    shares = {name: share for name, share in shares.items() if share > 0}
    parts = divide(raw["train"], shares, o.seed) if len(shares) > 1 else {"train": raw["train"]}
    parts |= {name: value for name, value in raw.items() if name != "train"}
    return {name: parts[name] for name in sorted(parts, key=_place)}


def _place(name: str) -> int:
    order = ("train", "validation", "test")
    return order.index(name) if name in order else len(order)


def from_object(value: Any, o: DataOptions) -> Data:
    """Data from a `Data`, a mapping of splits, or what `as_source` takes, which is divided."""
    if isinstance(value, Data):
        return value
    if isinstance(value, Mapping) and value and not any(isinstance(v, Tensor | np.ndarray) for v in value.values()):
        return Data(**{str(name): as_source(item, o.classes) for name, item in value.items()})
    return Data(**complete({"train": as_source(value, o.classes)}, o))


def as_source(value: Any, classes: Sequence[str] | None = None) -> Any:
    """A source from a source, a data set or data loader of torch, or tensors: `x`, `(x, y)`, or a mapping of inputs
    (or of `x`, `y` and `ids`).

    Example:
        >>> as_source((torch.rand(4, 2), torch.tensor([0, 1, 0, 1])))
        TensorSource(4 samples, 2 classes)
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, DataLoader):
        return DatasetSource(value.dataset, collate=value.collate_fn, classes=classes)
    if isinstance(value, Mapping) and "x" in value:
        return TensorSource(value["x"], value.get("y"), value.get("ids"), classes=classes)
    if isinstance(value, Tensor | np.ndarray) or (isinstance(value, Mapping) and value):
        return TensorSource(value, classes=classes)
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor | np.ndarray) for v in value):
        return TensorSource(value[0], value[1], classes=classes)
    sized = hasattr(value, "__len__") and not isinstance(value, IterableDataset | str | list | tuple)
    if sized and (isinstance(value, Dataset) or hasattr(value, "__getitem__")):
        return DatasetSource(value, classes=classes)
    raise UsageError(
        "these data are not understood",
        where="data",
        found=type(value).__name__,
        expected="a Source, a map-style data set or data loader of torch, tensors (x, y), or a mapping of splits",
        fix="an iterable data set has no rows: give Train(data=loader) in a method, or load it into a map-style one",
    )


def is_hub(value: Any) -> bool:
    """Whether a value is a data set of Hugging Face in memory, not tokenised and without a format or transform of its own."""
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    return bool(parts) and all(
        type(p).__module__.startswith("datasets.")
        and getattr(p, "format", {"type": ""})["type"] is None
        and "input_ids" not in p.column_names
        for p in parts
    )


def hub_tables(loaded: Any, where: Path = Path()) -> dict[str, tables.Table]:
    """The splits of a data set of Hugging Face as tables."""
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {split_name(name) or name: _hub_table(dataset, where) for name, dataset in splits.items()}


def _hub_table(dataset: Any, where: Path) -> tables.Table:
    kinds = {name: type(f).__name__ for name, f in dataset.features.items()}
    features = {
        name: {"_type": kinds[name], "names": getattr(f, "names", None)}
        for name, f in dataset.features.items()
        if kinds[name] in ("Image", "Audio", "ClassLabel")
    }
    return tables.arrow_table(dataset.with_format("arrow")[:], where, features)
