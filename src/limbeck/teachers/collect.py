"""Run a teacher over a data set once, and store what comes out."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.core.adapt import main_output
from limbeck.core.batch import Batch
from limbeck.core.errors import RunError, UsageError
from limbeck.core.files import write_text
from limbeck.core.roles import Role, find
from limbeck.core.source import Source
from limbeck.evaluate.cost import evaluating
from limbeck.teachers.fingerprint import fingerprint
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


def collect(
    teacher: nn.Module | Role,
    source: Source,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    views: int | None = None,
    top_k: int | None = None,
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
    layers: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = 2**27,
) -> OutputStore:
    """Store the teacher's output, and that of some layers, for every sample and view of a source.

    Killed at any moment and called again, it goes on where the last whole shard ended, and the files become the same as if it
    had never been killed. Called on a finished store, it checks that the store fits and computes nothing. In a
    program of several processes, call it in one.

    Args:
        teacher: A module or role; it runs in evaluation mode and is left in the mode it was in.
        source: The data.
        path: The store's folder.
        batch_size: Samples of one call of the teacher.
        views: View seeds 0, ..., views - 1 are stored. Default: the source's.
        top_k: Keep the largest logits and the sum of the others, in [1, C]; None keeps the whole output.
        dtype: Stored precision.
        layers: Dotted paths of submodules whose outputs are stored too, whole.
        device: Where the teacher is moved and runs; default where it is.
        progress: Called after each batch with the numbers of samples done and to do.
        shard_bytes: A file is closed when it has grown to this size.

    Returns:
        The store, opened.

    Raises:
        UsageError: The folder holds outputs of another teacher, other data, layers or precision; or a layer cannot be stored.
        RunError: The teacher returned NaN, or a number that the precision cannot hold.

    Example:
        See `OutputStore`.
    """
    role = teacher if isinstance(teacher, Role) else Role("teacher", teacher)
    views = source.views if views is None else views
    _check_arguments(role, source, views, dtype, layers)
    header = Header(fingerprint(role), source.fingerprint(), dtype, top_k, {})
    writer = _Writer(Path(path), header, layers, shard_bytes)
    if device is not None:
        role.module.to(device)
    home = next((p.device for p in role.module.parameters()), torch.device("cpu"))
    done, total = 0, len(source) * views
    with evaluating(role.module):
        for view in range(views):
            todo = writer.missing(source.ids, view).nonzero().squeeze(1)
            done += len(source) - len(todo)
            for rows in todo.split(batch_size) if len(todo) else ():
                batch = source.batch(rows, view)
                writer.add(batch.id, batch.view, _outputs(role, batch.to(home), layers))
                done += len(rows)
                if progress is not None:
                    progress(done, total)
    writer.flush()
    return OutputStore(path, verify=False)


class _Writer:
    """Appends to a store; the last shard grows in memory and replaces its file now and then."""

    def __init__(self, path: Path, header: Header, layers: Sequence[str], shard_bytes: int) -> None:
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
        """Which sample ids were not stored with the view before this run."""
        return self.store.missing(ids, view) if self.store else torch.ones(len(ids), dtype=torch.bool)

    def add(self, ids: Tensor, views: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Append the outputs of a batch."""
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


def _outputs(role: Role, batch: Batch, layers: Sequence[str]) -> dict[str, Tensor]:
    """The output and the taps `[B, ...]` by name."""
    if layers:
        output, taps = role.features(batch, *layers)
        outputs = {OUTPUT: output, **{name: main_output(taps[name]) for name in layers}}
    else:
        outputs = {OUTPUT: role(batch)}
    for name, tensor in outputs.items():
        if not tensor.is_floating_point() or len(tensor) != len(batch.id):
            raise UsageError(
                "a layer's outputs cannot be stored",
                where=name,
                found=f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} for {len(batch.id)} samples",
                expected="floating-point numbers, one row for each sample",
            )
    return outputs


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


def _check_arguments(role: Role, source: Source, views: int, dtype: str, layers: Sequence[str]) -> None:
    problems = [
        ("dtype", dtype in DTYPES, dtype, ", ".join(DTYPES), None),
        ("views", views >= 1, views, ">= 1", "give the data a fixed number of views; a new one every epoch has no end"),
        ("data", len(source) > 0, "no samples", "samples", None),
        ("data.ids", len(source.ids.unique()) == len(source.ids), "repeated ids", "one id per sample", None),
        ("layers", OUTPUT not in layers, OUTPUT, "paths of submodules", "the output is always stored"),
    ]
    for where, ok, found, expected, fix in problems:
        if not ok:
            raise UsageError("the outputs cannot be stored", where=where, found=found, expected=expected, fix=fix)
    for path in layers:
        find(role.module, path, role.name)
