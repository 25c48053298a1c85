"""Synthetic tables and images: what methods that draw samples leave."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.files import aside
from limbeck.core.source import Source
from limbeck.data.categorical import Columns, RowSource
from limbeck.data.condensed import Condensed
from limbeck.data.sources import TensorSource

DATA, NOTES, TABLE = "synthetic.safetensors", "synthetic.json", "table.csv"
_T = TypeVar("_T")


class SyntheticTable:
    """Rows that were drawn, and what their columns mean.

    Args:
        columns: What they are.
        codes: Category numbers `[N, F]`.
        groups: Group numbers `[N]`.
        info: Plain data: how they were made.

    Example:
        >>> made = SyntheticTable(Columns.numbered((2, 3), 2), torch.tensor([[0, 2], [1, 1]]), torch.tensor([1, 0]))
        >>> len(made), made.bytes(), made.table()["column_1"]
        (2, {'codes': 4, 'groups': 2}, [2, 1])
    """

    def __init__(self, columns: Columns, codes: Tensor, groups: Tensor, info: Mapping[str, Any] | None = None) -> None:
        self.columns, self.codes, self.groups, self.info = columns, codes, groups, dict(info or {})

    def __len__(self) -> int:
        return len(self.codes)

    def table(self) -> dict[str, list[Any]]:
        """Values by column; numbers in bins are the medians of their bins."""
        return self.columns.table(self.codes, self.groups)

    def source(self) -> RowSource:
        """The rows one-hot, to train on."""
        return RowSource(self.columns, self.codes, self.groups)

    def condensed(self) -> Condensed:
        """The same as a condensed set, to train classifiers of the target on: `made.condensed().train(network)`."""
        rows = self.source().classified()
        target = self.codes[:, -1]
        return Condensed(rows.x, target, learn=(), info={**self.info, "classes": list(rows.classes or ())})

    def bytes(self) -> dict[str, int]:
        """The true size of each part as it is stored, beside the table in words."""
        return _sizes(self._parts())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write numbers, their meaning and `table.csv` into a folder, whole or not at all."""

        def table(folder: Path) -> None:
            columns = self.table()
            with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))

        _save(path, "table", self._parts(), {"columns": self.columns.as_dict(), "info": self.info}, table)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticTable:
        """Read the folder that `save` wrote, or that of the run which made it.

        Raises:
            UsageError: There is no synthetic table in the folder, or it is damaged.
        """
        return _load(
            path,
            "table",
            lambda notes, parts: cls(
                Columns.from_dict(notes["columns"]), parts["codes"].long(), parts["groups"].long(), notes["info"]
            ),
        )

    def _parts(self) -> dict[str, Tensor]:
        return {"codes": _small(self.codes, max(self.columns.sizes)), "groups": _small(self.groups)}


class SyntheticImages:
    """Images that were drawn, with their class and group.

    Args:
        images: `[N, C, H, W]` within [0, 1]; 256 levels are stored.
        targets: Class numbers `[N]`.
        groups: Group numbers `[N]`.
        info: Plain data: how they were made.

    Example:
        >>> made = SyntheticImages(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), torch.tensor([1, 1]))
        >>> made.bytes(), made.source()
        ({'images': 32, 'targets': 2, 'groups': 2}, TensorSource(2 samples, 2 classes))
    """

    def __init__(self, images: Tensor, targets: Tensor, groups: Tensor, info: Mapping[str, Any] | None = None) -> None:
        self.images, self.targets, self.groups, self.info = images, targets, groups, dict(info or {})

    def __len__(self) -> int:
        return len(self.images)

    def source(self) -> TensorSource:
        """The images with their class as label, to train on."""
        return TensorSource(self.images, self.targets, torch.arange(len(self)))

    def condensed(self) -> Condensed:
        """The same as a condensed set: `made.condensed().train(network)`."""
        return Condensed(self.images, self.targets, learn=(), info=self.info)

    def bytes(self) -> dict[str, int]:
        """The true size of each part as it is stored."""
        return _sizes(self._parts())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them into a folder, whole or not at all."""
        _save(path, "images", self._parts(), {"info": self.info})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticImages:
        """Read the folder that `save` wrote, or that of the run which made it.

        Raises:
            UsageError: There are no synthetic images in the folder, or they are damaged.
        """
        return _load(
            path,
            "images",
            lambda notes, parts: cls(
                parts["images"].float() / 255, parts["targets"].long(), parts["groups"].long(), notes["info"]
            ),
        )

    def _parts(self) -> dict[str, Tensor]:
        images = (255 * self.images).round().to(torch.uint8)
        return {"images": images, "targets": _small(self.targets), "groups": _small(self.groups)}


def load_synthetic(path: str | os.PathLike[str]) -> SyntheticTable | SyntheticImages | None:
    """What a folder, or the run in it, holds of either kind; None for neither.

    Raises:
        UsageError: It is damaged.
    """
    if (folder := _folder(path)) is None:
        return None
    images = _notes(folder).get("kind") == "images"
    return (SyntheticImages if images else SyntheticTable).load(folder)


def classified(source: Source) -> Source:
    """Real samples as classifiers of the target read them; sources that are so already are returned as they are.

    Args:
        source: Rows of a table, or images with their class in `x["target"]`, both with the group as label.
    """
    if isinstance(source, RowSource):
        return source.classified()
    x = getattr(source, "x", None)
    if isinstance(x, Mapping) and {"image", "target"} <= x.keys():
        return TensorSource(x["image"], x["target"], source.ids)
    return source


def _small(numbers: Tensor, count: int | None = None) -> Tensor:
    """In one byte each where that is enough."""
    count = int(numbers.max()) + 1 if count is None else count
    return numbers.to(torch.uint8 if count <= 256 else torch.int32)


def _sizes(parts: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: t.numel() * t.element_size() for name, t in parts.items()}


def _save(
    path: str | os.PathLike[str], kind: str, parts: Mapping[str, Tensor], notes: Mapping[str, Any],
    also: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    with aside(Path(path) / NOTES) as scratch:
        save_file({k: v.cpu().contiguous() for k, v in parts.items()}, scratch.with_name(DATA))
        also(scratch.parent)
        scratch.write_text(json.dumps({"format": 1, "kind": kind, **notes}, indent=1) + "\n", encoding="utf-8")


def _load(path: str | os.PathLike[str], kind: str, make: Callable[[Any, dict[str, Tensor]], _T]) -> _T:
    if (folder := _folder(path)) is None:
        raise UsageError(f"this folder holds no synthetic {kind}", where=path, expected=f"{DATA} and {NOTES}")
    notes = _notes(folder)
    try:
        if notes["kind"] != kind:
            raise UsageError(
                "what this folder holds is of another kind", where=folder, found=notes["kind"], expected=kind
            )
        return make(notes, load_file(folder / DATA))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(f"the synthetic {kind} in this folder cannot be read", where=folder, found=error) from None


def _folder(path: str | os.PathLike[str]) -> Path | None:
    folders = [Path(path), *sorted(Path(path).glob("artefacts/*"))]
    return next((f for f in folders if (f / NOTES).is_file()), None)


def _notes(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / NOTES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError("what was drawn in this folder cannot be read", where=folder, found=error) from None
