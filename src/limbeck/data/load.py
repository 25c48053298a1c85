"""`load_data`: from a name, a file, a folder or an object to named sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from limbeck.core.errors import UsageError, require
from limbeck.core.source import Source
from limbeck.data import embedded, folders, tables
from limbeck.data.data import Data, divide
from limbeck.data.images import SUFFIXES, Images, image_files, image_transform
from limbeck.data.labels import encode
from limbeck.data.sources import DatasetSource, TensorSource
from limbeck.data.text import TextSource
from limbeck.models.specs import import_object, is_object


@dataclass(frozen=True)
class DataOptions:
    """How data are read: the `data:` block of a recipe, beside `spec`.

    Args:
        text: Text column, or two for pairs of texts. Default: found by name.
        label: Label column. Default: found by name.
        image: Image column. Default: the first that holds images.
        features: Columns of numbers. Default: all but the label, where there is no text and no image.
        columns: Names of the columns of a file without a line of names.
        classes: Class names in the order of their numbers. Default: what the data say, else sorted.
        image_size: Pixels of a side. Default: the first image's shorter side, at most 224.
        augment: Whether training images are cropped and flipped at random.
        views: Number of augmentation seeds; 0 for a new one every epoch. Storing a teacher's outputs needs 1 or more.
        max_length: Tokens of a text that are kept; None keeps what the tokenizer allows.
        validation: Share of the training samples that becomes the validation split where there is none, in [0, 1).
        test: Share that becomes the test split where there is one split only, in [0, 1).
        seed: Seed of the division, the augmentation, and data that are drawn.
    """

    text: str | tuple[str, str] | None = None
    label: str | None = None
    image: str | None = None
    features: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    image_size: int | None = None
    augment: bool = True
    views: int = 0
    max_length: int | None = None
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        shares = self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1
        size = self.image_size is None or self.image_size > 0
        length = self.max_length is None or self.max_length > 0
        for name, ok, expected in [
            ("validation", shares, "validation and test are 0 or more and together below 1"),
            ("image_size", size, "1 or more"),
            ("views", self.views >= 0, "0 or more"),
            ("max_length", length, "1 or more"),
        ]:
            if not ok:
                found = getattr(self, name)
                raise UsageError(f"{name} is out of range", where=f"data.{name}", found=found, expected=expected)


def load_data(spec: Any, *, tokenizer: Callable[..., Any] | None = None, **options: Any) -> Data:
    """Data from almost anything; everything that can be checked without reading all of it is checked here.

    Args:
        spec: A name (`digits`, `iris`, `wine`, `breast_cancer`, `superclasses`, `docstrings`); a folder of images (one
            folder for each class, below `train/`, `val/`, `test/` or not); a `.parquet`, `.csv`, `.tsv`, `.jsonl` or
            `.txt` file (one sentence a line) or a folder of them; `hf:NAME` or `hf:NAME:CONFIG` for Hugging Face
            `datasets`; `file.py:function` or `package.module:factory` that returns any of the following; a `Data`, a
            mapping of splits, a source, a data set or data loader of torch, tensors `(x, y)`.
        tokenizer: For texts; see `TextSource`.
        **options: The fields of `DataOptions`.

    Returns:
        Splits by name. Where there is one split only, it is divided by the hash of the sample ids into train, validation
        and test; where only validation is missing, it is taken from train.

    Raises:
        UsageError: The name is unknown, a path is missing, there are no samples, a file, image, column or label is not
            what it should be, or numbers are not finite.

    Example:
        >>> data = load_data((torch.rand(100, 4), torch.arange(100) % 3))
        >>> list(data), data.num_classes
        (['train', 'validation', 'test'], 3)
    """
    chosen = _options(options)
    if not isinstance(spec, str | Path):
        return _from_object(spec, chosen)
    text = str(spec)
    if text in embedded.EMBEDDED:
        return embedded.EMBEDDED[text](seed=chosen.seed)
    if text == "docstrings":
        return embedded.docstrings(tokenizer, chosen.max_length)
    if text.startswith("hf:"):
        return _from_tables(_hugging_face(text.removeprefix("hf:")), chosen, tokenizer)
    if is_object(text):
        return _from_object(import_object(text)(), chosen)
    return _from_path(_existing(text), chosen, tokenizer)


def _options(options: Mapping[str, Any]) -> DataOptions:
    names = [f.name for f in fields(DataOptions)]
    for name in options:
        if name not in names:
            near = get_close_matches(name, names, n=3, cutoff=0.5) or names
            raise UsageError("unknown field", where=f"data.{name}", found=name, expected=" or ".join(near))
    return DataOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.exists():
        return path
    siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(spec, [*embedded.NAMES, *siblings], n=3, cutoff=0.5)
    raise UsageError(
        "there are no such data",
        where="data",
        found=f"'{spec}': no file or folder, and no known name",
        expected=" or ".join(near)
        if near
        else f"a path, hf:NAME, file.py:function, or one of {', '.join(embedded.NAMES)}",
        fix="correct the path or the name",
    )


def _from_path(path: Path, o: DataOptions, tokenizer: Callable[..., Any] | None) -> Data:
    if path.is_file():
        known = (*tables.SUFFIXES, ".txt")
        if path.suffix not in known:
            raise UsageError(
                "files of this kind are not read", where=path, found=path.suffix, expected=", ".join(known)
            )
        return _from_files({"train": [path]}, path.suffix, o, tokenizer)
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return _from_tables(_hugging_face(str(path)), o, tokenizer)
    suffix = _suffix(path)
    if suffix is None:
        return _with_transforms(folders.image_folder(path), o)
    files = sorted(p for p in path.rglob(f"*{suffix}") if p.is_file())
    return _from_files(folders.split_files(files, path), suffix, o, tokenizer)


def _suffix(folder: Path) -> str | None:
    """The kind of table files in a folder; None for images. Images in sub-folders come before tables, these before others."""
    if any(p.is_dir() and image_files(p) for p in folder.iterdir()):
        return None
    found = {p.suffix for p in folder.rglob("*") if p.is_file()}
    kinds = [s for s in tables.SUFFIXES if s in found]
    return kinds[0] if kinds else ".txt" if ".txt" in found and not found & SUFFIXES else None


def _from_files(
    files: Mapping[str, list[Path]], suffix: str, o: DataOptions, tokenizer: Callable[..., Any] | None
) -> Data:
    if suffix == ".txt":
        texts = {name: [t for path in paths for t in tables.read_lines(path)] for name, paths in files.items()}
        if empty := [name for name, lines in texts.items() if not lines]:
            raise UsageError("there are no samples", where=files[empty[0]][0], found="no lines with text")
        make = {
            name: TextSource(list(dict.fromkeys(t)), tokenizer, max_length=o.max_length) for name, t in texts.items()
        }
        return Data(**_complete(make, o))
    return _from_tables({name: _table(paths, suffix, o) for name, paths in files.items()}, o, tokenizer)


def _table(paths: list[Path], suffix: str, o: DataOptions) -> tables.Table:
    where = paths[0] if len(paths) == 1 else paths[0].parent
    if suffix == ".parquet":
        pa, parquet = (require(name, extra="parquet") for name in ("pyarrow", "pyarrow.parquet"))
        try:
            return tables.arrow_table(pa.concat_tables([parquet.read_table(path) for path in paths]), where)
        except (pa.ArrowException, OSError) as error:
            found = str(error).splitlines()[0]
            raise UsageError("this is not a whole parquet file", where=where, found=found) from None
    if suffix == ".jsonl":
        parts, named = [tables.read_jsonl(path) for path in paths], True
    else:
        read = [tables.read_delimited(path, o.columns) for path in paths]
        parts, named = [columns for columns, _ in read], all(n for _, n in read)
    for path, columns in zip(paths, parts, strict=True):
        if list(columns) != list(parts[0]):
            raise UsageError("files have different columns", where=path, found=list(columns), expected=list(parts[0]))
    joined = {name: [v for columns in parts for v in columns[name]] for name in parts[0]}
    return tables.plain_table(joined, str(where), named)


def _from_tables(found: Mapping[str, tables.Table], o: DataOptions, tokenizer: Callable[..., Any] | None) -> Data:
    if empty := [table.where for table in found.values() if not table.length]:
        raise UsageError("there are no samples", where=empty[0], found="no rows")
    first = found.get("train") or next(iter(found.values()))
    choice = tables.choose(first, o.image, o.text, o.features, o.label)
    needed = filter(None, (choice.image, *choice.text, *choice.features))
    for column in needed:
        if missing := [t for t in found.values() if t.kinds.get(column) != first.kinds[column]]:
            got = missing[0].kinds.get(column, "no such column")
            raise UsageError(
                "splits differ", where=missing[0].where, found=f"{column}: {got}", expected=first.kinds[column]
            )
    key = choice.label
    values = {name: table.read(key) if key in table.kinds else None for name, table in found.items()} if key else {}
    labels, classes = encode(values, o.classes or first.classes.get(key or ""))
    raw: dict[str, Any] = {}
    for name, table in found.items():
        y = labels.get(name)
        if choice.image:
            raw[name] = Images(table.read(choice.image), None, y, classes, table.where)
        elif choice.text:
            columns = [table.read(column) for column in choice.text]
            texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
            raw[name] = TextSource(
                texts, tokenizer, y, max_length=o.max_length, classes=classes if y is not None else None
            )
        else:
            raw[name] = TensorSource(_numbers(table, choice.features), y, classes=classes)
    return _with_transforms(raw, o) if choice.image else Data(**_complete(raw, o))


def _numbers(table: tables.Table, columns: Sequence[str]) -> Tensor:
    """Columns `[N]` side by side as `[N, F]`, or one column of arrays `[N, ...]`, in float32."""
    arrays = []
    for column in columns:
        if table.kinds[column] not in ("integer", "number", "vector"):
            found = table.kinds[column]
            raise UsageError(
                "a feature is not a number", where=f"{table.where}: {column}", found=found, expected="numbers"
            )
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


def _with_transforms(raw: Mapping[str, Images], o: DataOptions) -> Data:
    sizes = {name: images.check() for name, images in raw.items()}
    size = o.image_size or min(224, *next(iter(sizes.values())))
    for images in raw.values():
        if images.labels is not None and images.labels.dtype.is_floating_point is False:
            encode({"train": images.labels.numpy()}, images.classes) if images is raw.get("train") else None
    plain = image_transform(size, augment=False)
    sources = {}
    for name, images in _complete(raw, o).items():
        if o.augment and name not in ("validation", "test"):
            sources[name] = DatasetSource(images, image_transform(size, augment=True), views=o.views, seed=o.seed)
        else:
            sources[name] = DatasetSource(images, plain, views=1, seed=o.seed)
    return Data(**sources)


def _complete(raw: Mapping[str, Any], o: DataOptions) -> dict[str, Any]:
    """All splits, with those that are missing taken from train."""
    have = set(raw) & {"train", "validation", "test"}
    if len(raw) == 1:
        shares = {"train": 1 - o.validation - o.test, "validation": o.validation, "test": o.test}
        raw = {"train": next(iter(raw.values()))}
    elif have == {"train", "test"} or have == {"train"}:
        shares = {"train": 1 - o.validation, "validation": o.validation}
    else:
        return dict(raw)
    shares = {name: share for name, share in shares.items() if share > 0}
    parts = divide(raw["train"], shares, o.seed) if len(shares) > 1 else {"train": raw["train"]}
    return {**parts, **{name: value for name, value in raw.items() if name != "train"}}


def _from_object(value: Any, o: DataOptions) -> Data:
    if isinstance(value, Data):
        return value
    if isinstance(value, Mapping) and value and not any(isinstance(v, Tensor) for v in value.values()):
        return Data(**{str(name): as_source(item, o) for name, item in value.items()})
    return Data(**_complete({"train": as_source(value, o)}, o))


def as_source(value: Any, options: DataOptions | None = None) -> Any:
    """A source from a source, a data set or data loader of torch, or tensors `x` or `(x, y)`.

    Example:
        >>> as_source((torch.rand(4, 2), torch.tensor([0, 1, 0, 1])))
        TensorSource(4 samples, 2 classes)
    """
    if isinstance(value, Source):
        return value
    classes = None if options is None else options.classes
    if isinstance(value, DataLoader):
        return DatasetSource(value.dataset, collate=value.collate_fn, classes=classes)
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


def _hugging_face(name: str) -> dict[str, tables.Table]:
    hf = require("datasets", extra="language")
    path, _, config = name.partition(":")
    try:
        if any((Path(path) / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
            loaded = hf.load_from_disk(path)
        else:
            loaded = hf.load_dataset(path, config or None)
    except Exception as error:  # the library raises many kinds, some of its own, for a name that it cannot load
        raise UsageError(
            "this data set cannot be loaded",
            where=f"hf:{name}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check the name and the network; without one, load it once elsewhere and give the folder of save_to_disk",
        ) from None
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {folders.split_name(k) or k: _hf_table(d, Path(path)) for k, d in splits.items()}


def _hf_table(dataset: Any, where: Path) -> tables.Table:
    features = {
        name: {"_type": type(f).__name__, "names": getattr(f, "names", None)} for name, f in dataset.features.items()
    }
    features = {k: v if v["_type"] in ("Image", "Audio") or v["names"] else {} for k, v in features.items()}
    return tables.arrow_table(dataset.with_format("arrow")[:], where, features)
