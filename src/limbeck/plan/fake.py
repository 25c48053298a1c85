"""Roles and batches with shapes and dtypes but no values."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from limbeck.core.batch import Batch, _map
from limbeck.core.roles import Role, Roles
from limbeck.teachers.cached import Cached
from limbeck.teachers.store import OUTPUT, Header, Layer, OutputStore


class _Mode(FakeTensorMode):
    """torch's own, that looks a known operation up with less ado: half of the time of a plan went into the keys."""

    def _prep_args_for_hash(self, result: list[Any], args: Any, *rest: Any) -> None:
        if isinstance(args, dict):
            super()._prep_args_for_hash(result, args, *rest)
            return
        result += (type(args), len(args))
        for arg in args:
            if type(arg) in _PLAIN:  # the type, for 1 and 1.0 are equal
                result += (type(arg), arg)
            elif type(arg) is FakeTensor and arg.fake_mode is self and arg.constant is None and _is_strided(arg):
                size = arg.untyped_storage().nbytes()
                result += (
                    arg.dtype, arg.fake_device, arg.shape, arg.stride(), arg.storage_offset(), size, arg.requires_grad,
                    arg.is_conj(), arg.is_neg(), arg.is_inference(),
                )  # fmt: skip
            else:
                super()._prep_args_for_hash(result, (arg,), *rest)


_PLAIN = {int, float, bool, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format}


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_mkldnn and not tensor.is_quantized


class Fake:
    """A world in which tensors have shapes, dtypes and lifetimes, and take no memory; entered and left as often as needed."""

    def __init__(self) -> None:
        self._mode = _Mode(allow_non_fake_inputs=True)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Be inside; torch's own report of a failure is silenced."""
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            moved, copied = patch.object(nn.Module, "_apply", _apply), patch.object(Tensor, "__deepcopy__", _copy)
            with self._mode, moved, copied, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copying one does
                yield
        finally:
            logger.setLevel(level)


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy for `copy.deepcopy`, which asks for the storage of a buffer, and fake ones have none."""
    copied = tensor.detach().clone()
    learns = isinstance(tensor, nn.Parameter)  # or it would be a buffer to those who ask
    return memo.setdefault(
        id(tensor),
        nn.Parameter(copied, tensor.requires_grad) if learns else copied.requires_grad_(tensor.requires_grad),
    )


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's own, which swaps tensors in place, and fake ones cannot be swapped."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(change(p.detach()), p.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


def fake_tensor(tensor: Tensor, samples: int | None = None) -> Tensor:
    """A fake tensor like `tensor`, which may be real or on the meta device; with `samples` as its first dimension, if given."""
    size = tensor.shape if samples is None else (samples, *tensor.shape[1:])
    fake = torch.empty_strided(size, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class FakeStore:
    """Stored outputs of a teacher, as shapes.

    Args:
        layers: Shape and dtype of a sample's output, for the output and each stored layer.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.header = Header("", "", "fp32", None, layers)

    def read(self, ids: Tensor, views: Any = 0, layers: Sequence[str] = (OUTPUT,)) -> dict[str, Tensor]:
        """Empty outputs `[B, ...]` by layer."""
        known = self.header.layers
        return {
            name: torch.empty(len(ids), *known[name].shape, dtype=getattr(torch, known[name].dtype)) for name in layers
        }


def cached(role: Role, batch: Batch) -> Cached:
    """What stands in for a fake role whose outputs are stored, from what it returns for a fake batch."""
    with torch.no_grad():
        output = role(batch)
    layer = Layer(tuple(output.shape[1:]), str(output.dtype).removeprefix("torch."))
    return Cached(cast(OutputStore, FakeStore({OUTPUT: layer})))


def fake_roles(roles: Roles, fake: Fake) -> Roles:
    """The same roles with fake tensors in the place of parameters, buffers and other tensors that modules hold."""
    memo: dict[int, Any] = {}
    with fake():
        for _, role in roles.items():
            for part in role.module.modules():
                if isinstance(part, Cached):
                    memo[id(part.store)] = FakeStore(part.store.header.layers)
                for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
                    if isinstance(value, Tensor):
                        memo.setdefault(id(value), fake_tensor(value))
    return copy_roles(roles, memo)


def copy_roles(roles: Roles, memo: dict[int, Any] | None = None) -> Roles:
    """Deep copies of the roles; what they share, the copies share."""
    memo = {} if memo is None else memo
    copies = Roles()
    for name, role in roles.items():
        twin = Role(name, copy.deepcopy(role.module, memo), role.preprocess)
        twin.frozen, twin._learned = role.frozen, copy.deepcopy(role._learned, memo)
        setattr(copies, name, twin)
    copies.step, copies.epoch, copies.total, copies.seed = roles.step, roles.epoch, roles.total, roles.seed
    return copies


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [leaf for leaf in tree_leaves(batch.fields()) if isinstance(leaf, Tensor)]


def fake_batch(batch: Batch, samples: int) -> Batch:
    """A fake batch of `samples` samples that looks like `batch`, which may hold fewer."""
    size = len(batch)
    stretch = {True: samples, False: None}
    return Batch(**_map(batch.fields(), lambda t: fake_tensor(t, stretch[t.ndim > 0 and len(t) == size])))
