"""Synthetic tables: what methods that draw rows leave."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.files import aside
from limbeck.data.categorical import Columns, RowSource

CODES, NOTES, TABLE = "synthetic.safetensors", "synthetic.json", "table.csv"


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

    def bytes(self) -> dict[str, int]:
        """The true size of each part as it is stored, beside the table in words."""
        return {name: t.numel() * t.element_size() for name, t in self._parts().items()}

    def train(self, steps: int = 300) -> Any:
        """A logistic regression that predicts the target from all other columns, without the group; see `fit_rows`."""
        from limbeck.evaluate.fairness import fit_rows

        return fit_rows(self.codes, self.columns.sizes, len(self.columns.sizes) - 1, steps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write numbers, their meaning and `table.csv` into a folder, whole or not at all."""
        table = self.table()
        with aside(Path(path) / NOTES) as scratch:
            save_file({k: v.cpu().contiguous() for k, v in self._parts().items()}, scratch.with_name(CODES))
            with scratch.with_name(TABLE).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(table)
                writer.writerows(zip(*table.values(), strict=True))
            notes = {"format": 1, "columns": self.columns.as_dict(), "info": self.info}
            scratch.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticTable:
        """Read the folder that `save` wrote, or that of the run which made it.

        Raises:
            UsageError: There is no synthetic table in the folder, or it is damaged.
        """
        folders = [Path(path), *sorted(Path(path).glob("artefacts/*"))]
        folder = next((f for f in folders if (f / NOTES).is_file()), None)
        if folder is None:
            raise UsageError("this folder holds no synthetic table", where=path, expected=f"{CODES} and {NOTES}")
        try:
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            parts = {name: t.long() for name, t in load_file(folder / CODES).items()}
            return cls(Columns.from_dict(notes["columns"]), **parts, info=notes["info"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UsageError("this synthetic table is damaged", where=folder, found=error) from None

    def _parts(self) -> dict[str, Tensor]:
        kind = torch.uint8 if max(self.columns.sizes) <= 256 else torch.int32
        return {"codes": self.codes.to(kind), "groups": self.groups.to(torch.uint8)}
