"""`load_data`: from a name, a file, a folder or an object to named sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from limbeck.core.errors import UsageError, require
from limbeck.data import embedded, folders, tables
from limbeck.data.build import complete, from_object, from_tables, hub_tables, is_hub, with_transforms
from limbeck.data.condensed import NAME as CONDENSED
from limbeck.data.data import Data
from limbeck.data.graphs import is_tu, read_tu
from limbeck.data.held_out import load_condensed
from limbeck.data.images import SUFFIXES, image_files
from limbeck.data.language import text_blocks
from limbeck.data.options import DataOptions
from limbeck.data.text import TextSource
from limbeck.models.specs import import_object, is_object

Tokenizer = Callable[..., Any] | None
_SAVED = ("dataset_dict.json", "dataset_info.json")  # what save_to_disk of Hugging Face writes


def load_data(spec: Any, *, tokenizer: Callable[..., Any] | str | None = None, **options: Any) -> Data:
    """Data from almost anything; everything that can be checked without reading all of it is checked here.

    Args:
        spec: A name (`digits`, `iris`, `wine`, `breast_cancer`, `superclasses`, `shapes`, `docstrings`); a folder of images (one
            folder for each class, below `train/`, `val/`, `test/` or not) or of graphs (see `read_tu`); a `.parquet`, `.csv`,
            `.tsv`, `.jsonl` or `.txt` file (one sentence a line) or a folder of them; `hf:NAME` or `hf:NAME:CONFIG` for
            Hugging Face `datasets`; `condensed:FOLDER` for what a condensing method made; `file.py:function` or
            `package.module:factory` that returns any of the following; a `Data`, a mapping of splits, a source, a data
            set or data loader of torch, tensors `(x, y)`.
        tokenizer: For texts; see `TextSource`, and `DataOptions` for names.
        **options: The fields of `DataOptions`.

    Returns:
        Splits by name. Where there is one split only, it is divided by the hash of the sample ids into train, validation
        and test; where only validation is missing, it is taken from train.

    Raises:
        UsageError: The name is unknown, a path is missing, there are no samples, a file, image, column or label is not
            what it should be, or numbers are not finite.

    Example:
        >>> import torch
        >>> data = load_data((torch.rand(100, 4), torch.arange(100) % 3))
        >>> list(data), data.num_classes
        (['train', 'validation', 'test'], 3)
    """
    if isinstance(tokenizer, str):
        options["tokenizer"], tokenizer = tokenizer, None
    o = DataOptions.of(options)
    if tokenizer is None and o.tokenizer is not None and o.block_size is None:
        tokenizer = _named_tokenizer(o.tokenizer)
    data = _load(spec, o, tokenizer)
    if o.held_out is not None and not str(spec).startswith(f"{CONDENSED}:"):
        raise UsageError(
            "these data have a test split of their own", where="data.held_out", found=o.held_out,
            expected="condensed:FOLDER as the data", fix="leave it out; data.test is the share that is held out",
        )  # fmt: skip
    if o.unlabelled is None:
        return data
    alone = replace(o, unlabelled=None, validation=0.0, test=0.0, label=None, classes=None)
    return Data(**dict(data.items()), unlabelled=_load(o.unlabelled, alone, tokenizer).train)


def _load(spec: Any, o: DataOptions, tokenizer: Tokenizer) -> Data:
    if not isinstance(spec, str | Path):
        return _from_value(spec, o, tokenizer)
    text = str(spec)
    if text in embedded.NAMES and Path(text).exists():
        raise UsageError(
            "this names two things: data that come with the library, and a file or folder here",
            where="data",
            found=text,
            expected=f"./{text} for the file or folder",
            fix="rename one of them, or go to another folder, for the data of the library",
        )
    if text in embedded.EMBEDDED:
        return embedded.EMBEDDED[text](seed=o.seed)
    if text == "docstrings":
        return embedded.docstrings(tokenizer, o.max_length)
    if text.startswith(f"{CONDENSED}:"):
        return load_condensed(text.partition(":")[2], o, tokenizer)
    if text.startswith("hf:"):
        return from_tables(_hub(text.removeprefix("hf:")), o, tokenizer)
    if is_object(text):
        made = import_object(text)
        return _from_value(made() if callable(made) and not isinstance(made, Data) else made, o, tokenizer)
    if o.block_size is not None:
        return _blocks(_existing(text), o, o.block_size)
    return _from_path(_existing(text), o, tokenizer)


def _blocks(path: Path, o: DataOptions, size: int) -> Data:
    tokenizer = None if o.tokenizer is None else _named_tokenizer(o.tokenizer)
    return text_blocks(path, size, tokenizer, validation=o.validation, test=o.test)


def _named_tokenizer(name: str) -> Callable[..., Any]:
    auto = require("transformers", extra="language").AutoTokenizer
    try:
        return auto.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise UsageError("this tokenizer cannot be loaded", where="data.tokenizer", found=message) from None


def _from_value(value: Any, o: DataOptions, tokenizer: Tokenizer) -> Data:
    return from_tables(hub_tables(value), o, tokenizer) if is_hub(value) else from_object(value, o)


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.exists():
        return path
    siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(spec, [*embedded.NAMES, *siblings], n=3, cutoff=0.5)
    forms = f"a path, hf:NAME, file.py:function, or one of {', '.join(embedded.NAMES)}"
    raise UsageError(
        "there are no such data",
        where="data",
        found=f"'{spec}': no file or folder, and no known name",
        expected=" or ".join(near) if near else forms,
        fix="correct the path or the name",
    )


def _from_path(path: Path, o: DataOptions, tokenizer: Tokenizer) -> Data:
    if path.is_file():
        known = (*tables.SUFFIXES, ".txt")
        if path.suffix not in known:
            raise UsageError("files of this kind are not read", where=path, found=path.name, expected=", ".join(known))
        return _from_files({"train": [path]}, path.suffix, o, tokenizer)
    if any((path / name).is_file() for name in _SAVED):
        return from_tables(_hub(str(path)), o, tokenizer)
    if is_tu(path):
        return Data(**complete({"train": read_tu(path)}, o))
    suffix = _suffix(path)
    if suffix is None:
        return with_transforms(folders.image_folder(path), o, tokenizer)
    files = sorted(p for p in path.rglob(f"*{suffix}") if p.is_file())
    return _from_files(folders.split_files(files, path), suffix, o, tokenizer)


def _suffix(folder: Path) -> str | None:
    """The kind of table files in a folder; None for images, which count first where they lie in sub-folders."""
    if any(p.is_dir() and image_files(p) for p in folder.iterdir()):
        return None
    found = {p.suffix for p in folder.rglob("*") if p.is_file()}
    kinds = [s for s in tables.SUFFIXES if s in found]
    return kinds[0] if kinds else ".txt" if ".txt" in found and not found & SUFFIXES else None


def _from_files(files: Mapping[str, list[Path]], suffix: str, o: DataOptions, tokenizer: Tokenizer) -> Data:
    if suffix != ".txt":
        return from_tables({name: _table(paths, suffix, o) for name, paths in files.items()}, o, tokenizer)
    texts = {name: list(dict.fromkeys(t for p in paths for t in tables.read_lines(p))) for name, paths in files.items()}
    if empty := [name for name, lines in texts.items() if not lines]:
        raise UsageError("there are no samples", where=files[empty[0]][0], found="no lines with text")
    sources = {name: TextSource(lines, tokenizer, max_length=o.max_length) for name, lines in texts.items()}
    return Data(**complete(sources, o))


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


def _hub(name: str) -> dict[str, tables.Table]:
    hub = require("datasets", extra="language")
    path, _, config = name.partition(":")
    try:
        saved = any((Path(path) / file).is_file() for file in _SAVED)
        loaded = hub.load_from_disk(path) if saved else hub.load_dataset(path, config or None)
    except Exception as error:  # the library raises many kinds, some of its own, for a name that it cannot load
        raise UsageError(
            "this data set cannot be loaded",
            where=f"hf:{name}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check the name and the network; without one, load it elsewhere and give the folder of save_to_disk",
        ) from None
    return hub_tables(loaded, Path(path))
