"""Memory, FLOPs and dtypes of a step, seen operation by operation; works on fake tensors and on real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, ops, strided
from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from limbeck.evaluate.cost import flop_counter

_ATEN = ops.aten
_DEVICE = ops.prim.device.default  # where a fake tensor is: asked for after each operation, and none itself
# Their fake kernels do not compare dtypes, the real ones do.
_SAME_DTYPE = {_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.convolution}


@dataclass(frozen=True)
class Memory:
    """What is held at the moment when most is held, in bytes on one device.

    Args:
        parameters: Parameters and buffers of all roles.
        gradients: Gradients of the roles that learn.
        optimizer: State of the optimizers.
        batch: The batch.
        activations: Everything else: kept for backward, or in passing.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    batch: int = 0
    activations: int = 0

    @property
    def peak(self) -> int:
        """The sum."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(eq=False)
class _Block:
    size: int
    kind: str
    born: int
    died: int | None = None


class MemoryTracker(TorchDispatchMode):
    """A life line for every storage that is made inside, so that the peak is known with what it consists of.

    Storages are sorted into kinds by `label`, at any time before they die; what has no label is an activation. Memory that a
    kernel takes and gives back within one operation is not seen. `flops` are of matrix products, convolutions and attention.

    Example:
        >>> import torch
        >>> with MemoryTracker() as tracker:
        ...     x = torch.zeros(256)
        ...     tracker.label("batch", [x])
        ...     y = (x + 1).sum()
        >>> memory = tracker.peak()
        >>> memory.batch, memory.activations
        (1024, 1028)
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[_Block] = []
        self._live: dict[int, _Block] = {}
        self._now = 0
        self._formulas = flop_counter().flop_registry
        self._composite: dict[Any, bool] = {}
        self.flops = 0

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors` as `kind`, a field of `Memory`."""
        for tensor in tensors:
            if tensor.layout == strided:
                self._see(tensor).kind = kind

    def peak(self, since: int = 0) -> Memory:
        """The memory at the moment from `since` on when most was held."""
        change = [0] * (self._now + 2)
        for block in self._blocks:
            change[block.born] += block.size
            if block.died is not None:
                change[block.died] -= block.size
        held, most, moment = 0, -1, 0
        for time, delta in enumerate(change[: self._now + 1]):
            held += delta
            if time >= since and held > most:
                most, moment = held, time
        kinds = dict.fromkeys((f.name for f in fields(Memory)), 0)
        for block in self._blocks:
            if block.born <= moment and (block.died is None or block.died > moment):
                kinds[block.kind] += block.size
        return Memory(**kinds)

    @property
    def now(self) -> int:
        """Operations seen so far."""
        return self._now

    @contextmanager
    def before(self) -> Iterator[None]:
        """What is made inside counts as having been there from the first, if it stays; the operations are not counted."""
        now, flops, count = self._now, self.flops, len(self._blocks)
        yield
        self._now, self.flops = now, flops
        stay = [block for block in self._blocks[count:] if block.died is None]
        for block in stay:
            block.born = 0
        for block in self._blocks[:count]:
            block.died = None if block.died is None else min(block.died, now + 1)
        self._blocks[count:] = stay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return getattr(args[0], "fake_device", None) or func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _SAME_DTYPE:
            _check_dtypes(args, func)
        if self._is_composite(func):  # inference mode does not take these apart by itself
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._now += 1
        if packet in self._formulas:
            self.flops += self._formulas[packet](*args, **kwargs, out_val=out)
        for value in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(value, Tensor) and value.layout == strided:  # a sparse tensor has no storage of its own
                self._see(value)
        return out

    def _is_composite(self, func: Any) -> bool:
        if func not in self._composite:
            key = DispatchKey.CompositeImplicitAutograd
            known = key in func.py_kernels or _dispatch_has_kernel_for_dispatch_key(func.name(), key)
            self._composite[func] = known
        return self._composite[func]

    def _see(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            block = _Block(storage.nbytes(), "activations", self._now)
            self._blocks.append(block)
            self._live[key] = block
            weakref.finalize(storage, self._end, key).atexit = False
        return self._live[key]

    def _end(self, key: int) -> None:
        self._live.pop(key).died = self._now + 1  # it was there while the output of the present operation was made


def _check_dtypes(args: tuple[Any, ...], func: Any) -> None:
    dtypes = [a.dtype for a in args if isinstance(a, Tensor)]
    if len(set(dtypes)) > 1:
        names = " and ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
        raise RuntimeError(f"{func.overloadpacket.__name__} of different dtypes: {names}")
