"""Tables of text, numbers or images: read from files, with columns found by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from limbeck.core.errors import UsageError, require
from limbeck.data.ids import text_ids
from limbeck.data.images import blob_key

Kind = Literal["image", "text", "integer", "number", "vector", "other"]
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
LABELS = ("label", "labels", "target", "class", "y", "score", "fine_label")
TEXTS = ("text", "sentence", "content", "document", "review", "question")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("question1", "question2"))
_NOT_FEATURES = ("id", "idx", "index")


@dataclass(frozen=True)
class Table:
    """Columns by name, each converted when it is read.

    Args:
        kinds: What each column holds.
        read: Column by name: a list of texts, an array of numbers `[N]` or `[N, F]`, or a sequence of image bytes and paths.
        length: Number of rows.
        where: The file, for messages.
        named: Whether the file names its columns.
        classes: Class names of columns whose file lists them.
    """

    kinds: Mapping[str, Kind]
    read: Callable[[str], Any]
    length: int
    where: str
    named: bool = True
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Which columns are the input (an image, one or two texts, or numbers) and the label."""

    image: str | None = None
    text: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    label: str | None = None


def choose(
    table: Table,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    label: str | None = None,
) -> Choice:
    """The columns named, else those found by name; in a file without names, those of fitting content.

    Raises:
        UsageError: A column that is named is missing, or none fits; lists the columns.

    Example:
        >>> choose(plain_table({"sentence": ["a", "b"], "label": ["0", "1"]}, "x.csv"))
        Choice(image=None, text=('sentence',), features=(), label='label')
    """
    texts = (text,) if isinstance(text, str) else tuple(text or ())
    for name in filter(None, (image, *texts, *(features or ()), label)):
        if name not in table.kinds:
            raise _no_column(table, f"there is no column '{name}'")
    label = label or _label(table, {image, *texts, *(features or ())})
    if image or texts or features:
        return Choice(image, texts, tuple(features or ()), label)
    by_kind = {kind: [c for c, k in table.kinds.items() if k == kind and c != label] for kind in ("image", "text")}
    if by_kind["image"]:
        return Choice(image=by_kind["image"][0], label=label)
    if found := _texts(table, by_kind["text"], label):
        return Choice(text=found, label=label)
    numbers = tuple(
        c
        for c, kind in table.kinds.items()
        if kind in ("integer", "number", "vector") and c != label and c.lower() not in _NOT_FEATURES
    )
    if not numbers or by_kind["text"]:
        raise _no_column(table, "no column is found for the input")
    return Choice(features=numbers, label=label)


def read_delimited(path: Path, columns: Sequence[str] | None = None) -> tuple[dict[str, list[str]], bool]:
    """The columns of a `.csv` or `.tsv` file as texts, and whether they have names.

    A first line counts as names when one of them is a usual one or names a column asked for, or when it holds no number
    while the second does.

    Args:
        path: The file; `.tsv` fields are taken as they are, `.csv` fields may be quoted.
        columns: Names for a file without a line of names, or names that must be in it.

    Raises:
        UsageError: Not text in UTF-8, or a line has another number of fields than the first.
    """
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, **options)
            lines = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError("this file cannot be read as a table", where=path, found=error, expected="UTF-8") from None
    rows = [row for _, row in lines]
    if not rows:
        return {}, True
    names, named = _names(rows, columns)
    if wrong := [(line, row) for line, row in lines if len(row) != len(names)]:
        line, row = wrong[0]
        where, found = f"{path}, line {line}", f"{len(row)} fields"
        raise UsageError("a line has another number of fields", where=where, found=found, expected=len(names))
    body = rows[1:] if named else rows
    return {name: [row[k] for row in body] for k, name in enumerate(names)}, named or columns is not None


def read_jsonl(path: Path) -> dict[str, list[Any]]:
    """The columns of a file with one JSON object on each line; values that an object lacks are None.

    Raises:
        UsageError: A line is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError("a line is not JSON", where=f"{path}, line {number}", found=error) from None
            if not isinstance(row, dict):
                found = type(row).__name__
                raise UsageError("a line is no object", where=f"{path}, line {number}", found=found, expected="{...}")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, each text once."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError("this file is not text", where=path, found=error, expected="UTF-8") from None
    return list(dict.fromkeys(stripped for line in lines if (stripped := line.strip())))


def plain_table(columns: Mapping[str, list[Any]], where: str, named: bool = True) -> Table:
    """A table from lists of values as files of text hold them: numbers may be given as texts.

    Example:
        >>> plain_table({"a": ["1", "2"], "b": ["1.5", ""], "c": ["x", "1"]}, "x.csv").kinds
        {'a': 'integer', 'b': 'number', 'c': 'text'}
    """
    values = {name: _values(column) for name, column in columns.items()}

    def read(name: str) -> Any:
        kind, column = values[name]
        return _texts_only(column, f"{where}: {name}") if kind == "text" else column

    kinds = {name: kind for name, (kind, _) in values.items()}
    return Table(kinds, read, len(next(iter(columns.values()), [])), where, named)


def arrow_table(table: Any, where: Path, features: Mapping[str, Any] | None = None) -> Table:
    """A table from one of pyarrow; texts and numbers are converted when read, images stay where they are.

    Args:
        table: `pyarrow.Table`.
        where: The file or folder; relative image paths start there.
        features: What Hugging Face `datasets` says of each column. Default: the table's own metadata.
    """
    if features is None:
        meta = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = meta.get("info", {}).get("features", {})
    kinds = {f.name: _arrow_kind(f.type, features.get(f.name)) for f in table.schema}
    names = {name: tuple(f["names"]) for name, f in features.items() if isinstance(f, Mapping) and f.get("names")}

    def read(name: str) -> Any:
        column, kind, place = table.column(name), kinds[name], f"{where}: {name}"
        if kind == "image":
            return Blobs(column, where if where.is_dir() else where.parent)
        if kind == "text":
            return _texts_only(column.to_pylist(), place)
        if kind == "vector":
            if (array := _stacked(column.to_pylist())) is None:
                raise UsageError("lists of a column have different lengths", where=place)
            return array
        return column.to_numpy().astype(np.float64 if kind == "number" or column.null_count else np.int64)

    return Table(kinds, read, table.num_rows, str(where), classes=names)


class Blobs(Sequence[Any]):
    """Image files in a column of pyarrow: the bytes where they are stored, else the path."""

    def __init__(self, column: Any, folder: Path) -> None:
        pa = require("pyarrow", extra="parquet")
        column = column.combine_chunks()
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        struct = pa.types.is_struct(column.type)
        self.bytes = column.field("bytes") if struct else column
        self.paths = column.field("path") if struct and column.type.get_field_index("path") >= 0 else None
        self.folder = folder

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, row: Any) -> Any:
        value = self.bytes[row]
        if value.is_valid:
            return memoryview(value.as_buffer())
        return self.folder / path if (path := self.path(row)) else b""

    def path(self, row: int) -> str:
        """The path as it is stored; empty where there is none."""
        return "" if self.paths is None else self.paths[row].as_py() or ""

    def ids(self) -> Tensor:
        """Sample ids `[N]`: of the bytes, else of the path as it is stored."""
        keys = (blob_key(v) if isinstance(v := self[row], memoryview) else self.path(row) for row in range(len(self)))
        return text_ids(keys)


def _label(table: Table, taken: set[str | None]) -> str | None:
    lower = {name.lower(): name for name in table.kinds if name not in taken}
    if (name := next((lower[n] for n in LABELS if n in lower), None)) is not None:
        return name
    if table.named:
        return None
    kinds = list(table.kinds.values())
    numbers = [name for name, kind in table.kinds.items() if kind in ("integer", "number")]
    return numbers[0] if "text" in kinds and len(numbers) == 1 else None


def _texts(table: Table, columns: Sequence[str], label: str | None) -> tuple[str, ...]:
    lower = {name.lower(): name for name in columns}
    for names in (*PAIRS, *((name,) for name in TEXTS)):
        if all(name in lower for name in names):
            return tuple(lower[name] for name in names)
    clear = len(columns) == 1 or (len(columns) == 2 and label is not None)
    return tuple(columns) if clear and not table.named else ()


def _no_column(table: Table, what: str) -> UsageError:
    return UsageError(
        what,
        where=table.where,
        found=", ".join(f"{name} ({kind})" for name, kind in table.kinds.items()),
        expected=f"an image column, a text column named {', '.join(TEXTS[:3])} ..., or numbers only",
        fix="name them: text=, image= or features= for the input, label= for the label",
    )


def _names(rows: list[list[str]], columns: Sequence[str] | None) -> tuple[list[str], bool]:
    first = rows[0]
    known = {*LABELS, *TEXTS, *(name for pair in PAIRS for name in pair)}
    if known & {cell.lower() for cell in first} or set(columns or ()) & set(first):
        return _unique(first), True
    if columns is not None:
        return list(columns), False
    if len(rows) > 1 and not any(map(_is_number, first)) and any(map(_is_number, rows[1])):
        return _unique(first), True
    return [str(k) for k in range(len(first))], False


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise UsageError("two columns have the same name", where="the first line", found=", ".join(names))
    return names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _values(values: list[Any]) -> tuple[Kind, Any]:
    """What a column of Python values holds, and the values as an array where they are numbers."""
    sample = next((v for v in values if v not in (None, "")), None)
    if isinstance(sample, list):
        array = _stacked(values)
        return ("other", values) if array is None else ("vector", array)
    if isinstance(sample, str) and not _is_number(sample):
        return "text", values
    if not isinstance(sample, str | int | float):
        return "other", values
    try:
        if not any(v is None or v == "" or isinstance(v, float) for v in values):
            return "integer", np.array([int(v) for v in values], dtype=np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return "number", np.array([np.nan if v in (None, "") else float(v) for v in values])
    except ValueError:
        return "text", values


def _texts_only(values: list[Any], where: str) -> list[str]:
    row = next((row for row, v in enumerate(values) if not isinstance(v, str)), None)
    if row is not None:
        raise UsageError("a value is not a text", where=where, found=f"{values[row]!r} in row {row}", expected="a text")
    return values


def _stacked(values: list[Any]) -> Any:
    """Lists of numbers of one shape as an array, or None."""
    try:
        array = np.array(values)
    except ValueError:
        return None
    return array if array.dtype.kind in "iufb" else None


def _arrow_kind(kind: Any, feature: Any) -> Kind:
    types = require("pyarrow", extra="parquet").types
    special = feature.get("_type") if isinstance(feature, Mapping) else None
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and special in (None, "Image"):
        return "image"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "image"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind):
        return "text"
    if types.is_integer(kind) or types.is_boolean(kind):
        return "integer"
    if types.is_floating(kind):
        return "number"
    return "vector" if special is None and (types.is_list(kind) or types.is_fixed_size_list(kind)) else "other"
