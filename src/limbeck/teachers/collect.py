"""Run a teacher over a data set once, and store what comes out."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.adapt import main_output
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, find
from limbeck.core.source import Source
from limbeck.evaluate.cost import evaluating
from limbeck.teachers.fingerprint import fingerprint
from limbeck.teachers.store import DTYPES, OUTPUT, Header, OutputStore
from limbeck.teachers.writer import Writer


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
    writer = Writer(Path(path), header, layers, shard_bytes)
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
