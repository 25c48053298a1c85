"""Batches of a source in a planned order, made here or in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck.core.batch import Batch, _map
from limbeck.core.errors import LimbeckError
from limbeck.core.source import Source


def batches(source: Source, plan: Iterable[tuple[Tensor, int]], workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """The batches of a plan, in its order; the same ones for any number of workers.

    Workers start with the first batch and end with the plan, so one plan over many epochs starts them once. Up to two
    batches for each worker are made ahead; without workers, each is made when it is asked for.

    Args:
        source: The data.
        plan: `(rows [B], view)` of each batch; may be endless.
        workers: Processes that make batches.
        pin: Copy them to page-locked memory, for faster copies to a GPU.

    Yields:
        One batch for each entry of the plan.

    Example:
        >>> from limbeck.data.sources import TensorSource
        >>> source = TensorSource(torch.arange(4.0))
        >>> [b.x.tolist() for b in batches(source, [(torch.tensor([2, 0]), 0), (torch.tensor([3]), 0)])]
        [[2.0, 0.0], [3.0]]
    """
    if not workers:
        for rows, view in plan:
            batch = source.batch(rows, view)
            yield Batch(**_map(batch.fields(), Tensor.pin_memory)) if pin else batch
        return
    loader = DataLoader(
        _Batches(source),
        batch_size=None,
        # Arrays travel to the workers in the message itself; tensors would take a shared-memory file each.
        sampler=_Lazy((rows.numpy(), view) for rows, view in plan),
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader draws its workers' seed from it, not from the global one
    )
    for fields in loader:
        if isinstance(fields, LimbeckError):
            raise fields
        yield Batch(**fields)


class _Batches(Dataset[Any]):
    """Fields of the batch for an entry of the plan, or the error that it ended in: the loader would bury its message."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, entry: tuple[np.ndarray[Any, Any], int]) -> Any:
        rows, view = entry
        try:
            return self.source.batch(torch.from_numpy(rows), view).fields()
        except LimbeckError as error:
            return error


class _Lazy:
    """A plan as the loader wants its sampler: something without a length that is gone through once."""

    def __init__(self, plan: Iterator[Any]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[Any]:
        return self.plan


def _same(value: Any) -> Any:
    return value
