"""The life of a constructed student: weights under a parametrization while it learns, folded and plain when it has learnt.

A parametrization is a module `kind(weight, dim, **arguments)`, `dim` the axis of the inputs, with `forward(weight)`, the
weight that the layer uses; and, where that is another one, `finalise(weight)`, the weight that stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.convert.structure import find_depths
from limbeck.core.errors import UsageError
from limbeck.nn.heads import find_head


@dataclass(frozen=True)
class Parametrize:
    """Copy a model and put the weights of some of its layers under a parametrization.

    Args:
        kind: The parametrization, `module:Class` inside Limbeck, such as `"limbeck.nn.nm:MaskedNM"`.
        arguments: What it is made with beside the weight and its axis; plain data.
        include: Globs of the layers' paths. Default: the linear layers and convolutions inside the model's repeated layers;
            of a model without those, all but the last linear layer.
        exclude: Globs of paths that are left out.

    Raises:
        UsageError: No layer is left, or the parametrization does not fit one.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> sparse, record = Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4})(net)
        >>> record["paths"], int(sparse[0].weight.count_nonzero())
        (['0'], 16)
    """

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The model with its parametrizations, and the record that rebuilds it."""
        paths = layers_of(module, self.include, self.exclude)
        record = {
            "kind": f"{__name__}:parametrize_module",
            "parametrization": self.kind,
            "arguments": dict(self.arguments),
            "paths": paths,
        }
        return parametrize_module(copy.deepcopy(module), record), record


@dataclass(frozen=True)
class Finalise:
    """Copy a model, fold all its parametrizations into plain weights, and remove them.

    Raises:
        UsageError: The model has none.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> sparse, _ = Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4})(net)
        >>> plain, record = Finalise()(sparse)
        >>> plain[0].weight.equal(sparse[0].weight), type(plain[0]).__name__, record["tensors"]
        (True, 'Linear', ['0.weight'])
    """

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The plain model, and the record of what was folded."""
        tensors = [_join(path, name) for path, part in module.named_modules() for name in _stacks(part)]
        if not tensors:
            raise UsageError(
                "there is nothing to finalise", where=type(module).__name__, expected="a model under parametrizations"
            )
        folded = copy.deepcopy(module)
        values = {tensor: fold(*_at(folded, tensor)) for tensor in tensors}
        record = {"kind": f"{__name__}:finalise_module", "tensors": tensors}
        finalise_module(folded, record)
        with torch.no_grad():
            for tensor, value in values.items():
                part, name = _at(folded, tensor)
                getattr(part, name).copy_(value)
        return folded, record


def parametrize_module(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Put a model's weights under a parametrization in place, as a record says."""
    kind = _kind(record["parametrization"])
    for path in record["paths"]:
        part = module.get_submodule(path)
        weight: Tensor = part.weight  # type: ignore[assignment]
        dim = 1 if isinstance(part, nn.Linear | nn.Conv2d) else 0
        try:
            made = kind(weight.detach(), dim, **record["arguments"])
        except UsageError as error:
            raise UsageError(
                error.what, where=f"{path}: {error.where}", found=error.found, expected=error.expected, fix=error.fix
            ) from None
        parametrize.register_parametrization(part, "weight", made.to(weight.device).train(part.training), unsafe=True)
        stack: Any = part.parametrizations["weight"]  # type: ignore[index]
        if "original" in stack._buffers:  # torch does not know a parameter in the fake tensors of a plan
            stack.register_parameter("original", nn.Parameter(stack._buffers.pop("original").detach()))
    return module


def finalise_module(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Remove a model's parametrizations in place, as a record says; weights are loaded afterwards."""
    for tensor in record["tensors"]:
        part, name = _at(module, tensor)
        # torch takes the property off the class, which copies of a parametrized layer have in common.
        part.__class__ = type(type(part).__name__, type(part).__bases__, dict(vars(type(part))))
        parametrize.remove_parametrizations(part, name, leave_parametrized=False)
    return module


def parametrized(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers whose weights are under a parametrization, with their paths.

    Example:
        >>> sparse, _ = Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4}, include=["*"])(nn.Sequential(nn.Linear(4, 8)))
        >>> [path for path, _ in parametrized(sparse)]
        ['0']
    """
    for path, part in module.named_modules():
        if parametrize.is_parametrized(part, "weight"):
            yield path, part


def under(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Parameter, Any]]:
    """The weights under a kind of parametrization, each with its parametrization.

    Args:
        module: The model.
        kind: The parametrization's class, or one that it derives from.
    """
    for _, part in parametrized(module):
        stack = part.parametrizations.weight
        for made in stack:
            if isinstance(made, kind):
                yield stack.original, made


@torch.no_grad()
def fold(part: Any, name: str = "weight") -> Tensor:
    """The plain value of a tensor that is under parametrizations, in their order."""
    stack = part.parametrizations[name]
    value = stack.original
    for made in stack:
        value = made.finalise(value) if hasattr(made, "finalise") else made(value)
    return value


def _stacks(part: nn.Module) -> list[str]:
    """The names of a module's own tensors that are under parametrizations."""
    return list(part.parametrizations) if parametrize.is_parametrized(part) else []  # type: ignore[arg-type]


def _at(module: nn.Module, tensor: str) -> tuple[Any, str]:
    path, _, name = tensor.rpartition(".")
    return module.get_submodule(path), name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _kind(name: str) -> Any:
    place, _, attribute = name.partition(":")
    kind = getattr(import_module(place), attribute, None) if place.startswith("limbeck.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):  # a record may come from a file
        raise UsageError("there is no such parametrization", found=name, expected="limbeck....:Class")
    return kind


def layers_of(module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The paths of the linear layers and convolutions that a conversion is about.

    Args:
        module: The model.
        include: Globs of paths. Default: those inside the model's repeated layers; of a model without those, all but the last
            linear layer.
        exclude: Globs of paths that are left out.

    Raises:
        UsageError: None is left.

    Example:
        >>> layers_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)), exclude=["0"])
        ['2']
    """
    paths = [path for path, part in module.named_modules() if is_linear(part)]
    if include:
        chosen = [path for path in paths if any(fnmatchcase(path, glob) for glob in include)]
    else:
        blocks = tuple(f"{depth.name}." for depth in find_depths(module))
        chosen = [path for path in paths if path.startswith(blocks)] if blocks else []
        chosen = chosen or [path for path in paths if path != find_head(module)]
    chosen = [path for path in chosen if not any(fnmatchcase(path, glob) for glob in exclude)]
    if not chosen:
        raise UsageError(
            "no layer is left",
            where=type(module).__name__,
            found=f"include={list(include)}, exclude={list(exclude)}",
            expected=f"globs of {', '.join(paths[:4])}, ..." if paths else "a model with linear layers",
        )
    return chosen


def is_linear(part: nn.Module) -> bool:
    """Whether a module is a linear layer, a convolution, or GPT-2's transposed linear layer."""
    return isinstance(part, nn.Linear | nn.Conv2d) or "Conv1D" in type(part).__name__
