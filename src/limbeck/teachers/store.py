"""Outputs of a teacher on disk: looked up by sample id and view seed, read from memory-mapped shards."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.core.source import Source
from limbeck.teachers.fingerprint import fingerprint
from limbeck.teachers.topk import TopK

FORMAT = 1
OUTPUT = "output"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Columns = dict[str, Tensor]


class MissingOutput(UsageError):
    """A sample id and view seed that a store was asked for and does not hold."""


@dataclass(frozen=True)
class Layer:
    """One stored layer: the shape of a sample's output, and the dtype that the teacher returned."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Header:
    """What a store holds.

    Args:
        teacher: Fingerprint of the teacher.
        data: Fingerprint of the data.
        dtype: Stored precision, `fp16`, `bf16` or `fp32`.
        top_k: Logits kept of the output; None keeps all.
        layers: The output, and tapped submodules by dotted path.
    """

    teacher: str
    data: str
    dtype: str
    top_k: int | None
    layers: Mapping[str, Layer]

    def to_json(self) -> str:
        """The header as it stands in `store.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Header":
        """The header of the store at `path`."""
        file = path / "store.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if (version := raw.pop("format")) > FORMAT:
                raise UsageError(
                    "this store was written by a newer Limbeck",
                    where=file,
                    found=f"format {version}",
                    expected=f"format {FORMAT}",
                    fix="pip install -U limbeck",
                )
            layers = {name: Layer(tuple(v["shape"]), v["dtype"]) for name, v in raw.pop("layers").items()}
            return cls(**raw, layers=layers)
        except FileNotFoundError:
            raise UsageError("there is no store of teacher outputs", where=path, fix="write one with collect") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError("this is not the header of a store", where=file, found=repr(error)) from None


class OutputStore:
    """Teacher outputs by sample id and view seed, as `collect` wrote them; several processes may read at once.

    Args:
        path: The store's folder.
        verify: Whether the checksums are compared, which reads the files once.

    Attributes:
        header: Fingerprints, layers, precision.

    Raises:
        UsageError: There is no store, or a shard is damaged.

    Example:
        >>> import tempfile
        >>> from limbeck.teachers.collect import collect
        >>> folder = tempfile.TemporaryDirectory()
        >>> class Points:
        ...     ids, views = torch.tensor([7, 9]), 1
        ...     def __len__(self): return 2
        ...     def batch(self, rows, view):
        ...         return Batch(x=torch.eye(2)[rows], id=self.ids[rows], view=torch.full_like(rows, view))
        ...     def fingerprint(self): return "points"
        >>> from limbeck.core.batch import Batch
        >>> _ = collect(nn.Identity(), Points(), folder.name)
        >>> store = OutputStore(folder.name)
        >>> store.read(torch.tensor([9, 7]))["output"].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        self.path = Path(path)
        self.header = Header.read(self.path)
        self._shards = [read_shard(file, verify) for file in shard_files(self.path)]
        sizes = [len(shard["id"]) for shard in self._shards]
        self._starts = torch.tensor([0, *sizes]).cumsum(0)  # [S + 1]
        none = torch.empty(0, dtype=torch.int64)
        self._index = _Index(
            torch.cat([none, *(shard["id"] for shard in self._shards)]),
            torch.cat([none, *(shard["view"] for shard in self._shards)]),
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return OutputStore, (self.path, False)  # a copy, also in another process, maps the same files

    def missing(self, ids: Tensor, views: Tensor | int = 0) -> Tensor:
        """Which of the sample ids `[B]`, seen with the view seeds `[B]`, are not stored: bool `[B]`."""
        return self._index.rows(ids, views) < 0

    def read(
        self, ids: Tensor, views: Tensor | int = 0, layers: Sequence[str] | None = None
    ) -> dict[str, Tensor | TopK]:
        """The stored outputs of some samples, on the CPU in the stored precision.

        Args:
            ids: Sample ids `[B]` int64; on a GPU they are copied to the CPU first, which waits for it.
            views: View seeds `[B]` int64, or one for all.
            layers: `"output"` and paths of taps; default all.

        Returns:
            Outputs `[B, ...]` by layer; the output is a `TopK` where only the top k were stored.

        Raises:
            MissingOutput: A sample was not stored with that view.
            UsageError: A layer was not stored.
        """
        names = list(self.header.layers) if layers is None else layers
        self._has(names)
        rows = self._index.rows(ids, views)
        if bool((rows < 0).any()):
            self._refuse(ids, views, rows < 0)
        shards = torch.bucketize(rows, self._starts, right=True) - 1  # [B]
        parts = [(s, (shards == s).nonzero().squeeze(1)) for s in shards.unique().tolist()]

        def gather(column: str) -> Tensor:
            if len(parts) == 1:
                s = parts[0][0]
                return self._shards[s][column].index_select(0, rows - self._starts[s])
            out = torch.empty(len(rows), *self._shards[0][column].shape[1:], dtype=self._shards[0][column].dtype)
            for s, where in parts:
                out[where] = self._shards[s][column].index_select(0, rows[where] - self._starts[s])
            return out

        return {name: self._layer(name, gather) for name in names}

    def check(
        self,
        *,
        teacher: nn.Module | Role | None = None,
        data: Source | None = None,
        layers: Sequence[str] = (),
        dtype: str | None = None,
    ) -> None:
        """Refuse this store where it does not hold what a run needs; what is None is not looked at.

        Args:
            teacher: The teacher that the outputs must be of.
            data: The data that they must be of; all its samples and views must be stored.
            layers: Taps that must be stored.
            dtype: The stored precision.

        Raises:
            UsageError: Names all that differs.
            MissingOutput: A sample or view of the data is not stored.
        """
        expected = {
            "teacher fingerprint": None if teacher is None else fingerprint(teacher),
            "data fingerprint": None if data is None else data.fingerprint(),
            "dtype": dtype,
        }
        refuse_mismatch(self.path, self.header, {k: v for k, v in expected.items() if v is not None})
        self._has(layers)
        if data is None:
            return
        if data.views == 0:
            raise UsageError("a new view every epoch cannot be stored", where="data.views", found=0, expected=">= 1")
        for view in range(data.views):
            if bool((missing := self.missing(data.ids, view)).any()):
                self._refuse(data.ids, view, missing)

    def _layer(self, name: str, gather: Any) -> Tensor | TopK:
        if name == OUTPUT and self.header.top_k is not None:
            values, indices, rest = (gather(f"{name}:{part}") for part in ("values", "indices", "rest"))
            return TopK(values, indices, rest, classes=self.header.layers[name].shape[-1])
        return gather(name)

    def _has(self, layers: Sequence[str]) -> None:
        if absent := [name for name in layers if name not in self.header.layers]:
            raise UsageError(
                "a layer was not stored",
                where=self.path,
                found=", ".join(self.header.layers),
                expected=", ".join(absent),
                fix=f"collect into another folder with layers={absent}",
            )

    def _refuse(self, ids: Tensor, views: Tensor | int, missing: Tensor) -> None:
        first = int(missing.nonzero()[0])
        view = int(torch.as_tensor(views).expand_as(ids)[first])
        raise MissingOutput(
            "the store does not hold the teacher's output for a sample and view",
            where=self.path,
            found=f"id {int(ids[first])} with view {view} is missing, in all {int(missing.sum())} of {len(missing)}",
            expected=f"one of {len(self._index.ids)} ids with view {_short(self._index.views)}",
            fix="run collect again on this folder with these data and views: only what is missing is computed",
        )


class _Index:
    """Row numbers by sample id and view seed: a table over the sorted distinct ids and views."""

    def __init__(self, ids: Tensor, views: Tensor) -> None:
        self.ids, i = ids.unique(return_inverse=True)
        self.views, v = views.unique(return_inverse=True)
        self._table = torch.full((len(self.ids), len(self.views)), -1)
        self._table[i, v] = torch.arange(len(ids))

    def rows(self, ids: Tensor, views: Tensor | int) -> Tensor:
        """Row numbers `[B]`; -1 where there is none."""
        ids = ids.cpu()
        if not len(self.ids):
            return torch.full_like(ids, -1)
        views = torch.as_tensor(views).cpu()
        i = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        v = torch.searchsorted(self.views, views).clamp_(max=len(self.views) - 1)
        found = (self.ids[i] == ids) & (self.views[v] == views)
        return torch.where(found, self._table[i, v], -1)


def refuse_mismatch(path: Path, header: Header, expected: Mapping[str, Any]) -> None:
    """Raise a `UsageError` that names every property of the store that is not as expected."""
    found = {
        "teacher fingerprint": header.teacher,
        "data fingerprint": header.data,
        "dtype": header.dtype,
        "top_k": header.top_k,
        "layers": sorted(name for name in header.layers if name != OUTPUT),
    }
    if names := [name for name, value in expected.items() if found[name] != value]:
        raise UsageError(
            f"this store of teacher outputs does not fit: {', '.join(names)}",
            where=path,
            found=", ".join(f"{name} {found[name]}" for name in names),
            expected=", ".join(f"{name} {expected[name]}" for name in names),
            fix="collect into another folder, or delete this one",
        )


def shard_files(path: Path) -> list[Path]:
    """The shards of a store, in order."""
    return sorted(path.glob("shard-*.safetensors"))


def read_shard(file: Path, verify: bool = True) -> Columns:
    """The columns of one shard, mapped from the file.

    Raises:
        UsageError: The shard is damaged.
    """
    try:
        with safe_open(file, framework="pt") as shard:
            columns = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            expected = (shard.metadata() or {}).get("crc32")
    except (SafetensorError, OSError) as error:
        found = str(error)
    else:
        if not verify or checksum(columns) == expected:
            return columns
        found = "its checksum differs"
    raise UsageError(
        "a shard of teacher outputs is damaged",
        where=file,
        found=found,
        fix="delete it and run collect again: only its samples are computed",
    )


def checksum(columns: Columns) -> str:
    """CRC-32 of the columns' bytes."""
    crc = 0
    for name in sorted(columns):
        crc = zlib.crc32(columns[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _short(values: Tensor) -> str:
    shown = ", ".join(str(v) for v in values[:5].tolist())
    return f"{shown}, ..." if len(values) > 5 else shown
