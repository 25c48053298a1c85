"""Smaller models that are cut out of bigger ones: fewer heads, hidden units, channels, layers, or less width."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.convert.layers import tell_depth
from limbeck.convert.structure import Depth, Dim, Structure, structure
from limbeck.core.errors import UsageError

Keep = Mapping[str, int | float | Sequence[int]]
Index = tuple[slice | Tensor | None, ...]


@dataclass(frozen=True)
class Piece:
    """The part of a tensor of a big model that a small one keeps.

    Args:
        name: The tensor of the big model.
        index: What is kept along each of its axes; None keeps all.
    """

    name: str
    index: Index = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the tensor; a view of it wherever all indices are slices."""
        for dim, index in enumerate(self.index):
            if isinstance(index, slice):
                tensor = tensor.narrow(dim, index.start, index.stop - index.start)
            elif index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor


@dataclass(frozen=True)
class Slice:
    """Copy a part of a model: its leading units and layers, or chosen ones.

    Whole units are cut: a head, never a part of one; hidden units with the columns that read them. See `structure` for the
    names.

    Args:
        keep: By name of a dimension or of a list of layers, or by glob of such names: how many to keep (the leading ones, of a
            kernel the middle; a share where it is below 1), or which. What is not named stays whole.

    Raises:
        UsageError: There is no such dimension, or it has not as many.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> small, record = Slice({"0.channels": [1, 5]})(net)
        >>> small[0].weight.equal(net[0].weight[[1, 5]]), small[2].weight.shape, record["keep"]
        (True, torch.Size([3, 2]), {'0.channels': [1, 5]})
    """

    keep: Keep

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The smaller model with the weights of the big one, and the record that rebuilds it."""
        parts = structure(module) if self.keep else Structure()  # any model can be copied
        keep = resolve(self.keep, parts)
        skeleton, pieces = cut(module, keep, parts)
        return fill(skeleton, pieces, module), {"kind": f"{__name__}:slice_module", "keep": keep}


def slice_module(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a smaller model, from the record of its conversion."""
    return Slice(record["keep"])(module)[0]


def resolve(keep: Keep, parts: Structure) -> dict[str, int | list[int]]:
    """What is kept by exact names: globs and shares are looked up.

    Raises:
        UsageError: A name is that of no dimension and no list of layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> resolve({"*.channels": 0.5}, structure(net))
        {'0.channels': 4}
    """
    sizes = parts.sizes()
    found: dict[str, int | list[int]] = {}
    for pattern, value in keep.items():
        names = [pattern] if pattern in sizes else [name for name in sizes if fnmatchcase(name, pattern)]
        if not names:
            raise _unknown(parts, pattern)
        for name in names:
            if isinstance(value, float):
                found[name] = max(1, round(value * sizes[name])) if value < 1 else int(value)
            else:
                found[name] = value if isinstance(value, int) else list(value)
    return found


def _unknown(parts: Structure, name: str) -> UsageError:
    near = get_close_matches(name, parts.sizes(), n=3, cutoff=0.3) or list(parts.sizes())[:5]
    expected = ", ".join(near) or "none is known"
    return UsageError("the model has no such dimension", where="keep", found=name, expected=expected)


def cut(
    module: nn.Module, keep: Mapping[str, int | Sequence[int]], parts: Structure | None = None
) -> tuple[nn.Module, dict[str, Piece]]:
    """The structure of a smaller model without weights, and where each of its tensors lies in the big one.

    `torch.func.functional_call(skeleton, {name: piece.of(tensors[piece.name]) ...}, x)` runs the smaller model on the big
    one's weights; leading units are views, so that nothing is copied and running statistics are kept where they are.

    Args:
        module: The big model; it is not changed.
        keep: As in `Slice`, by exact names.
        parts: Its structure, where that is known already.

    Returns:
        The smaller model, its tensors on the meta device, and a piece for every parameter and buffer of it, shared ones once.

    Raises:
        UsageError: There is no such dimension, or it has not as many.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> skeleton, pieces = cut(net, {"0.channels": 2})
        >>> skeleton[0].weight.shape, pieces["2.weight"].index
        (torch.Size([2, 4]), (None, slice(0, 2, None)))
    """
    parts = parts or structure(module)
    kept = {name: _units(parts, name, value) for name, value in keep.items()}
    names: dict[int, str] = {}
    for name, tensor in _tensors(module):
        names.setdefault(id(tensor), name)
    canonical = {name: names[id(tensor)] for name, tensor in _tensors(module)}
    index: dict[str, dict[int, slice | Tensor]] = {}
    for name in kept.keys() & parts.dims.keys():
        dim = parts.dims[name]
        for axis in dim.axes:
            index.setdefault(canonical[axis.tensor], {})[axis.dim] = axis.index(kept[name], dim.size)
    pieces: dict[str, Piece] = {}
    memo: dict[int, Any] = {}
    for identity, tensor in {id(t): t for _, t in _tensors(module)}.items():
        found = index.get(names[identity], {})
        piece = Piece(names[identity], tuple(found.get(d) for d in range(tensor.ndim)) if found else ())
        with torch.no_grad():
            hollow = piece.of(torch.empty_like(tensor, device="meta"))
        memo[identity] = nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
        pieces[names[identity]] = piece
    skeleton = copy.deepcopy(module, memo)
    origin = {id(memo[i]): pieces[name] for i, name in names.items()}
    for name in kept.keys() & parts.dims.keys():
        for path, attribute, factor in parts.dims[name].counts:
            setattr(skeleton.get_submodule(path), attribute, factor * len(kept[name]))
    for part in skeleton.modules():
        part.__dict__.pop("train", None)  # of a frozen role, whose copy need not stay in evaluation mode
        _fix(part)
    for name in kept.keys() & parts.depths.keys():
        _shorten(skeleton, parts.depths[name], kept[name])
    first = {id(tensor): name for name, tensor in reversed(_tensors(skeleton))}  # shared tensors under one name
    return skeleton, {name: origin[identity] for identity, name in first.items()}


def fill(skeleton: nn.Module, pieces: Mapping[str, Piece], module: nn.Module) -> nn.Module:
    """Give a skeleton of `cut` its own copies of the weights; it is changed in place."""
    tensors = dict(_tensors(module))
    filled: dict[int, Tensor] = {}
    with torch.no_grad():
        for part_path, part in list(skeleton.named_modules()):
            for store in (part._parameters, part._buffers):
                for name, hollow in store.items():
                    if hollow is None:
                        continue
                    if id(hollow) not in filled:
                        piece = pieces[f"{part_path}.{name}" if part_path else name]
                        tensor = piece.of(tensors[piece.name]).detach().clone(memory_format=torch.contiguous_format)
                        learns = isinstance(hollow, nn.Parameter)
                        filled[id(hollow)] = nn.Parameter(tensor, hollow.requires_grad) if learns else tensor
                    store[name] = filled[id(hollow)]
    return skeleton


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers with all their names, shared ones several times."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


def _units(parts: Structure, name: str, value: int | Sequence[int]) -> list[int]:
    part: Dim | Depth | None = parts.dims.get(name) or parts.depths.get(name)
    if part is None:
        raise _unknown(parts, name)
    if isinstance(value, int):
        units = part.units(value) if isinstance(part, Dim) else list(range(value))
    else:
        units = [int(unit) for unit in value]
        if isinstance(part, Dim) and part.central and units != part.units(len(units)):
            raise UsageError("a kernel keeps its middle", where=f"keep['{name}']", found=value, expected="a number")
    good = bool(units) and len(set(units)) == len(units) and all(0 <= unit < part.size for unit in units)
    if not good:
        raise UsageError(
            "this part cannot be kept",
            where=f"keep['{name}']",
            found=value,
            expected=f"1 to {part.size} different ones",
        )
    if isinstance(part, Depth) and not set(part.fixed) <= set(units):
        raise UsageError(
            "a layer that changes the shape of its input cannot be left out",
            where=f"keep['{name}']",
            found=units,
            expected=f"{', '.join(map(str, part.fixed))} among them",
        )
    return units


def _fix(part: Any) -> None:
    """Tell a module the sizes of its tensors."""
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = weight.shape
    elif isinstance(part, nn.Conv2d):
        if part.groups > 1 and part.groups == part.in_channels:  # one filter per channel
            part.groups = part.in_channels = weight.shape[0]
        part.out_channels, part.in_channels = weight.shape[0], weight.shape[1] * part.groups
        if part.kernel_size != weight.shape[2:]:  # as much less padding as the kernel reaches less far
            less = [
                d * (was - now) // 2
                for d, was, now in zip(part.dilation, part.kernel_size, weight.shape[2:], strict=True)
            ]
            if not isinstance(part.padding, str):
                part.padding = tuple(max(0, p - n) for p, n in zip(part.padding, less, strict=True))
            part.kernel_size = tuple(weight.shape[2:])
    elif isinstance(part, nn.LayerNorm) or hasattr(part, "normalized_shape"):
        part.normalized_shape = tuple(weight.shape)
    elif hasattr(part, "num_features"):
        part.num_features = len(weight)
    elif isinstance(part, nn.Embedding):
        part.embedding_dim = weight.shape[1]
    elif type(part).__name__ == "Conv1D":
        part.nx, part.nf = weight.shape


def _shorten(module: nn.Module, depth: Depth, kept: Sequence[int]) -> None:
    layers: Any = module.get_submodule(depth.name)
    chosen = [layers[i] for i in kept]
    parent, _, name = depth.name.rpartition(".")
    whole = module.get_submodule(parent)
    shorter = nn.ModuleList(chosen) if isinstance(layers, nn.ModuleList) else nn.Sequential(*chosen)
    setattr(whole, name, shorter.train(layers.training))
    tell_depth(module, depth.name, list(kept), depth.size)
