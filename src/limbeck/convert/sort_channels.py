"""Units in the order of their importance, so that the leading ones are those worth keeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from limbeck.convert.slicing import Slice
from limbeck.convert.structure import Dim, structure
from limbeck.core.errors import UsageError
from limbeck.nn.elastic import Elastic


@dataclass(frozen=True)
class SortChannels:
    """Copy a model and put the units of some dimensions in descending order of importance; its function stays the same.

    A unit's importance is the L1 norm of the weights that read it last: the columns of the projection that follows (Cai et al.
    2020; OFA and DepS sort so before channels are cut).

    Args:
        names: Globs of dimensions.

    Raises:
        UsageError: The model has none of them.

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> net = mlp(4, 8, 3)
        >>> ordered, _ = SortChannels()(net)
        >>> x = torch.ones(1, 4)
        >>> torch.allclose(ordered(x), net(x), atol=1e-6), bool((ordered[2].weight.abs().sum(0).diff() <= 0).all())
        (True, True)
    """

    names: Sequence[str] = ("*.channels", "*.ffn", "*.heads")

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The model in its new order, and a record; the structure is that of before."""
        inner = module.model if isinstance(module, Elastic) else module
        dims = [d for d in structure(inner).dims.values() if any(fnmatchcase(d.name, glob) for glob in self.names)]
        if not dims:
            raise UsageError("there is nothing to sort", where=type(inner).__name__, found=list(self.names))
        tensors = dict(inner.named_parameters(remove_duplicate=False))
        ordered, _ = Slice({dim.name: _order(importance(dim, tensors)) for dim in dims})(inner)
        record = {"kind": f"{__name__}:sort_channels"}
        if isinstance(module, Elastic):
            return Elastic(ordered, module.space, module.dropout).train(module.training), record
        return ordered, record


def sort_channels(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a sorted model, which is that of before: weights are loaded afterwards."""
    return module


def _order(values: Tensor) -> list[int]:
    if isinstance(values, FakeTensor):  # a plan has no values, and any order will do
        return list(range(len(values)))
    return values.argsort(descending=True, stable=True).tolist()


@torch.no_grad()
def importance(dim: Dim, tensors: Mapping[str, Tensor]) -> Tensor:
    """The L1 norm of what each unit of a dimension is read with last `[size]`."""
    axis = [axis for axis in dim.axes if axis.side == "consume"][-1]
    weight = tensors[axis.tensor].detach().abs()
    others = [d for d in range(weight.ndim) if d != axis.dim]
    return weight.sum(others).view(axis.groups, dim.size, axis.unit).sum((0, 2))
