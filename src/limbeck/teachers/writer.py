"""Appending to a store of teacher outputs."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.errors import RunError, UsageError
from limbeck.core.files import write_text
from limbeck.teachers.store import (
    DTYPES,
    OUTPUT,
    Columns,
    Header,
    Layer,
    OutputStore,
    checksum,
    read_shard,
    refuse_mismatch,
    shard_files,
)
from limbeck.teachers.topk import TopK

_FLUSH_SECONDS = 20.0  # at most this much work is lost to a kill


class Writer:
    """Appends to a store, or begins one; the last shard grows in memory and replaces its file now and then.

    Args:
        path: The store's folder.
        header: What it holds; its layers are those of the first outputs.
        layers: Names of the layers beside the output.
        shard_bytes: A file is closed when it has grown to this size.

    Raises:
        UsageError: The folder holds something else.
    """

    def __init__(self, path: Path, header: Header, layers: Sequence[str] = (), shard_bytes: int = 2**27) -> None:
        self.path, self.header, self.shard_bytes = path, header, shard_bytes
        self.parts: list[Columns] = []
        self.bytes = self.number = 0
        self.changed = False
        self.saved = time.monotonic()
        self.store: OutputStore | None = None
        if (path / "store.json").exists() or shard_files(path):
            self._resume(layers)

    def _resume(self, layers: Sequence[str]) -> None:
        wanted = self.header
        self.store = OutputStore(self.path)
        self.header = self.store.header
        expected: dict[str, Any] = {"teacher fingerprint": wanted.teacher, "data fingerprint": wanted.data}
        expected |= {"dtype": wanted.dtype, "top_k": wanted.top_k, "layers": sorted(layers)}
        refuse_mismatch(self.path, self.header, expected)
        if files := shard_files(self.path):
            self.number = int(files[-1].stem.removeprefix("shard-"))
            self.parts = [read_shard(files[-1], verify=False)]
            self.bytes = _bytes(self.parts[0])
            self._close_full()

    def missing(self, ids: Tensor, view: int) -> Tensor:
        """Which sample ids `[B]` were not stored with the view before this run: bool `[B]`."""
        return self.store.missing(ids, view) if self.store else torch.ones(len(ids), dtype=torch.bool)

    def add(self, ids: Tensor, views: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Append the outputs `[B, ...]` of a batch by layer, for ids and view seeds `[B]`."""
        layers = {name: Layer(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for name, t in outputs.items()}
        if not self.header.layers:
            self._begin(layers)
        elif layers != self.header.layers:
            raise UsageError(
                "a layer's outputs differ in shape or dtype from sample to sample",
                where=self.path,
                found=", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in layers.items()),
                expected=", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in self.header.layers.items()),
                fix="pad inputs to one length, or store only layers of one shape",
            )
        columns = {"id": ids.cpu(), "view": views.cpu()}
        for name, tensor in outputs.items():
            columns |= _pack(name, tensor, self.header)
        self.parts.append(columns)
        self.bytes += _bytes(columns)
        self.changed = True
        if self.bytes >= self.shard_bytes or time.monotonic() - self.saved > _FLUSH_SECONDS:
            self.flush()
        self._close_full()

    def _begin(self, layers: Mapping[str, Layer]) -> None:
        self.header = replace(self.header, layers=layers)
        classes = layers[OUTPUT].shape[-1] if layers[OUTPUT].shape else 0
        if self.header.top_k is not None and not 1 <= self.header.top_k <= classes:
            raise UsageError(
                "top_k is out of range", where="top_k", found=self.header.top_k, expected=f"1 to {classes} classes"
            )
        write_text(self.path / "store.json", self.header.to_json())

    def _close_full(self) -> None:
        if self.bytes >= self.shard_bytes:
            self.parts, self.bytes, self.number = [], 0, self.number + 1

    def flush(self) -> None:
        """Write the last shard, aside and renamed."""
        if not self.changed:
            return
        columns = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        self.parts = [columns]
        file = self.path / f"shard-{self.number:05d}.safetensors"
        scratch = file.with_suffix(".part")  # of one name, so that a kill leaves nothing that is not written over
        save_file(columns, scratch, metadata={"crc32": checksum(columns)})
        os.replace(scratch, file)
        self.saved, self.changed = time.monotonic(), False


def _bytes(columns: Columns) -> int:
    return sum(t.nbytes for t in columns.values())


def _pack(name: str, tensor: Tensor, header: Header) -> Columns:
    """The columns of one layer in the stored precision, on the CPU."""
    dtype = DTYPES[header.dtype]
    if name == OUTPUT and header.top_k is not None:
        top = TopK.of(tensor, header.top_k)
        columns = {f"{name}:values": top.values, f"{name}:indices": top.indices, f"{name}:rest": top.rest}
        stored = {k: t.to(dtype) if k.endswith("values") else t for k, t in columns.items()}
    else:
        columns, stored = {name: tensor}, {name: tensor.to(dtype)}
    for key, exact in columns.items():
        if bool((exact.isnan() | (stored[key].isinf() & ~exact.isinf())).any()):
            raise RunError(
                "the teacher returned a number that cannot be stored",
                where=name,
                found=f"NaN, or above {torch.finfo(dtype).max:.3g} in magnitude",
                fix='look for NaN in data and weights; store with dtype="bf16" or "fp32"',
            )
    return {key: t.cpu().contiguous() for key, t in stored.items()}
