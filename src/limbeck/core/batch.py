"""One batch: inputs, labels, stable sample ids and view seeds."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Batch:
    """Named fields of one batch, first dimension = samples.

    `x` is what models are called with (a tensor, or a mapping such as tokenizer output), `y` the labels if any, `id` the
    stable sample ids `[B]` int64, `view` the augmentation seeds `[B]` int64 that produced `x`. Methods may add fields.

    Args:
        **fields: Tensors, mappings or tuples of tensors with the same first dimension `B`, or other per-batch values.

    Example:
        >>> batch = Batch(x=torch.zeros(4, 3), y=torch.arange(4), id=torch.arange(4))
        >>> len(batch), batch.y.tolist(), batch.get("view") is None
        (4, [0, 1, 2, 3], True)
        >>> [b.id.tolist() for b in batch.split(2)]
        [[0, 1], [2, 3]]
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this batch has no field '{name}'; it has {', '.join(self.__dict__) or 'none'}")

    def __repr__(self) -> str:
        return f"Batch({', '.join(f'{k}={_shape(v)}' for k, v in self.__dict__.items())})"

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __len__(self) -> int:
        size = _length(self.__dict__)
        if size is None:
            raise TypeError("this batch has no tensor field, so it has no length")
        return size

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where the batch has none."""
        return self.__dict__.get(name, default)

    def fields(self) -> dict[str, Any]:
        """All fields by name."""
        return dict(self.__dict__)

    def replace(self, **fields: Any) -> "Batch":
        """A batch with some fields replaced or added."""
        return Batch(**{**self.__dict__, **fields})

    def to(self, device: torch.device | str, memory_format: torch.memory_format | None = None) -> "Batch":
        """All tensors on `device`; 4-d tensors in `memory_format` where one is given."""

        def move(t: Tensor) -> Tensor:
            image = memory_format is not None and t.ndim == 4
            return t.to(device, non_blocking=True, memory_format=memory_format if image else torch.preserve_format)

        return Batch(**_map(self.__dict__, move))

    def split(self, parts: int) -> Iterator["Batch"]:
        """`parts` batches of consecutive samples, sizes differing by at most one."""
        bounds = [len(self) * i // parts for i in range(parts + 1)]
        for start, stop in pairwise(bounds):
            yield self[start:stop]

    def __getitem__(self, index: slice) -> "Batch":
        size = len(self)
        return Batch(**_map(self.__dict__, lambda t: t[index] if t.ndim and len(t) == size else t))


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {k: _map(v, fn) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(v, fn) for v in value)
    return value


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return next((n for n in map(_length, items) if n is not None), None)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in value.items()) + "}"
    return type(value).__name__
