"""The named dimensions of a model that a smaller one may have less of: heads, hidden units, channels, width and layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.core.errors import UsageError

Side = Literal["produce", "consume", "carry"]

# The projections of an attention as their libraries name them: query, key, value, output.
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # CLIP, Whisper
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, ViT
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT
    ("attention.query", "attention.key", "attention.value", "output.dense"),  # DINOv2
    ("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2
    ("qkv", "qkv", "qkv", "proj"),  # timm
)
# Of a feed-forward network: those whose outputs are the hidden units, and the one that reads them.
_FFN = (
    (("fc1",), "fc2"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("intermediate.dense",), "output.dense"),
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_ALL_HEADS = ("all_head_size", "split_size", "attn_dim")
_WIDTHS = ("embed_dim", "num_features", "head_hidden_size", "hidden_size")
_PROJECTIONS = {"visual_projection": "vision_model", "text_projection": "text_model"}  # of dual encoders, outside them


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor that runs over a dimension.

    Args:
        tensor: Name of the parameter or buffer.
        dim: Which of its axes.
        side: `"produce"` where the tensor makes the dimension's values (rows of a linear layer, its bias, an embedding),
            `"consume"` where it reads them (columns), `"carry"` where it is applied to each (a norm).
        unit: Entries of each unit, such as the size of a head.
        groups: How often all units follow each other on the axis: 3 in fused queries, keys and values.
    """

    tensor: str
    dim: int
    side: Side
    unit: int = 1
    groups: int = 1

    def index(self, kept: Sequence[int], size: int) -> slice | Tensor:
        """Where on the axis the kept units of `size` are; a slice for neighbours, so that what it takes is a view."""
        if self.groups == 1 and list(kept) == list(range(kept[0], kept[0] + len(kept))):
            return slice(kept[0] * self.unit, (kept[0] + len(kept)) * self.unit)
        at = torch.arange(self.groups * size * self.unit).view(self.groups, size, self.unit)
        return at[:, list(kept)].flatten()


@dataclass(frozen=True)
class Dim:
    """A dimension of a model: what must be cut together.

    Args:
        name: Such as `encoder.layers.0.ffn`.
        size: Units, such as heads or channels.
        axes: All the axes that run over it.
        counts: Attributes that tell the number of units: module, attribute, and what one unit counts there.
        central: Whether a number keeps the units in the middle, as of a kernel, and not the leading ones.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    counts: tuple[tuple[str, str, int], ...] = ()
    central: bool = False

    def units(self, count: int) -> list[int]:
        """The units that a number stands for.

        Raises:
            UsageError: Units in the middle of an odd number of them are an odd number.
        """
        rest = self.size - count if self.central else 0
        if rest % 2:
            raise UsageError(
                "a kernel has no such middle", where=self.name, found=count, expected=f"{self.size} less an even number"
            )
        return list(range(rest // 2, rest // 2 + count))


@dataclass(frozen=True)
class Depth:
    """A list of layers.

    Args:
        name: Dotted path of the list.
        size: Layers.
        fixed: Layers that always stay, since they change the shape of what they are given.
    """

    name: str
    size: int
    fixed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Structure:
    """All the dimensions of a model by name.

    Args:
        dims: Heads, hidden units, channels, kernels and widths.
        depths: Lists of layers.
    """

    dims: Mapping[str, Dim] = field(default_factory=dict)
    depths: Mapping[str, Depth] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """The size of every dimension and list of layers."""
        parts: dict[str, Dim | Depth] = {**self.dims, **self.depths}
        return {name: part.size for name, part in parts.items()}


def structure(module: nn.Module) -> Structure:
    """Find the dimensions of a model by the shapes and names of its parts; no class is edited.

    Known are the attentions and feed-forward networks of transformers (BERT, CLIP, ViT, GPT-2, Llama and their like) and of
    timm, the blocks of ResNet and MobileNet, networks with `fc1` and `fc2`, and plain chains of linear layers. Names are
    dotted paths: `X.heads` (groups of heads that share keys, where they do), `X.ffn`, `X.channels`, `X.kernel` (the side of
    depthwise filters), `X.width`, and the path of each list of layers.

    Args:
        module: The model.

    Raises:
        UsageError: Parts of the model are under a parametrization, which is finalised first.

    Example:
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> structure(Sequential(Linear(4, 8), ReLU(), Linear(8, 3))).sizes()
        {'0.channels': 8}
    """
    _check_plain(module)
    dims: dict[str, Dim] = {}
    for path, part in module.named_modules():
        for dim in _dims_of(path, part):
            dims[dim.name] = dim
    depths = {depth.name: depth for depth in find_depths(module)}
    for dim in _widths(module, depths, dims):
        dims[dim.name] = dim
    return Structure(dims, depths)


def _dims_of(path: str, part: nn.Module) -> Iterator[Dim]:
    if isinstance(part, nn.Sequential):
        yield from _chain(path, part)
        return
    children = dict(part.named_modules())
    for names in _ATTENTION:
        if all(_linear(children.get(name)) for name in names):
            yield _heads(path, part, children, names)
            break
    for makers, reader in _FFN:
        if all(_linear(children.get(name)) for name in (*makers, reader)):
            yield _units(_join(path, "ffn"), path, children, makers, reader)
            break
    if isinstance(children.get("conv_dw"), nn.Conv2d) and isinstance(children.get("conv_pwl"), nn.Conv2d):
        yield from _kernel(path, "conv_dw", children["conv_dw"])
        if "conv_pw" in children:
            yield _channels(path, children, ("conv_pw", "bn1", "conv_dw", "bn2"), "conv_pwl")
    elif isinstance(children.get("conv3"), nn.Conv2d):
        if {"bn1", "bn2"} <= children.keys() and children["conv2"].groups == 1:
            yield _channels(path, children, ("conv1", "bn1", "conv2", "bn2"), "conv3")
    elif "bn1" in children and all(isinstance(children.get(name), nn.Conv2d) for name in ("conv1", "conv2")):
        yield _channels(path, children, ("conv1", "bn1"), "conv2")


def _heads(path: str, part: nn.Module, children: Mapping[str, nn.Module], names: tuple[str, ...]) -> Dim:
    owner = next((m for m in children.values() if any(hasattr(m, name) for name in _HEADS)), None)
    query, key, value, out = names
    fused = query == key
    inner = _sizes(children[out])[1]  # all heads together
    if owner is not None:
        heads = next(getattr(owner, name) for name in _HEADS if hasattr(owner, name))
    else:  # Llama knows them by their size
        heads = inner // getattr(part, "head_dim", inner)
    shared = 1 if fused else inner // _sizes(children[key])[0]
    size, unit = heads // shared, inner // heads
    axes: list[Axis] = []
    if fused:
        axes += _produce(path, query, children[query], unit, groups=3)
    else:
        axes += _produce(path, query, children[query], unit * shared)
        axes += [axis for name in (key, value) for axis in _produce(path, name, children[name], unit)]
    axes.append(_consume(path, out, children[out], unit * shared))
    counts = []
    for name, child in children.items():
        where = _join(path, name)
        counts += [(where, a, shared) for a in _HEADS if getattr(child, a, None) == heads]
        counts += [(where, a, shared * unit) for a in _ALL_HEADS if getattr(child, a, None) == inner]
    return Dim(_join(path, "heads"), size, tuple(axes), tuple(counts))


def _units(name: str, path: str, children: Mapping[str, nn.Module], makers: Iterable[str], reader: str) -> Dim:
    size = _sizes(children[reader])[1]
    axes = [axis for maker in makers for axis in _produce(path, maker, children[maker])]
    for child, part in children.items():
        if _norm_size(part) == size and "." not in child:
            axes += _carry(path, child, part)
    axes.append(_consume(path, reader, children[reader]))
    return Dim(name, size, tuple(axes))


def _channels(path: str, children: Mapping[str, nn.Module], parts: tuple[str, ...], reader: str) -> Dim:
    """The inner channels of a convolutional block, all convolutions inside it at once."""
    axes: list[Axis] = []
    size = _sizes(children[reader])[1]
    for i, name in enumerate(parts):
        part: Any = children[name]
        if _norm_size(part) is not None:
            axes += _carry(path, name, part)
        elif getattr(part, "groups", 1) > 1:  # one filter per channel
            axes += [Axis(_join(path, f"{name}.{n}"), 0, "carry") for n, _ in part.named_parameters(recurse=False)]
        else:
            axes += _produce(path, name, part)
            if i:
                axes.append(_consume(path, name, part))
    if "se.conv_reduce" in children:
        axes.append(_consume(path, "se.conv_reduce", children["se.conv_reduce"]))
        axes += _produce(path, "se.conv_expand", children["se.conv_expand"])
    axes.append(_consume(path, reader, children[reader]))
    return Dim(_join(path, "channels"), size, tuple(axes))


def _kernel(path: str, name: str, part: Any) -> Iterator[Dim]:
    """The side of square filters, one per channel; the smaller ones are the middle of the bigger."""
    sides = set(part.kernel_size)
    if len(sides) == 1 and (side := sides.pop()) > 1 and part.groups == part.in_channels:
        axes = tuple(Axis(_join(path, f"{name}.weight"), dim, "carry") for dim in (2, 3))
        yield Dim(_join(path, "kernel"), side, axes, central=True)


def _chain(path: str, part: nn.Sequential) -> Iterator[Dim]:
    """The units between two linear layers of a plain chain."""
    last: str | None = None
    between: list[str] = []
    children = dict(part.named_children())
    for name, child in children.items():
        if isinstance(child, nn.Linear):
            if last is not None and _sizes(children[last])[0] == child.in_features:
                axes = _produce(path, last, children[last])
                axes += [axis for norm in between for axis in _carry(path, norm, children[norm])]
                axes.append(_consume(path, name, child))
                yield Dim(_join(path, f"{last}.channels"), child.in_features, tuple(axes))
            last, between = name, []
        elif _norm_size(child) is not None:
            between.append(name)
        elif any(True for _ in child.parameters()) or isinstance(child, nn.Flatten | nn.Unflatten):
            last = None


def find_depths(module: nn.Module) -> Iterator[Depth]:
    """The lists of repeated layers of a model, also of one under parametrizations.

    Example:
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> [d.name for d in find_depths(nn.ModuleDict({"body": Sequential(*(nn.MultiheadAttention(4, 1) for _ in "ab"))}))]
        ['body']
    """
    found: list[str] = []
    for name, part in module.named_modules():
        layers = list(part.children()) if isinstance(part, nn.ModuleList | nn.Sequential) else []
        plain = any(isinstance(layer, nn.Sequential | nn.ModuleList) or _single(layer) for layer in layers)
        alike = len({type(layer) for layer in layers}) == 1 < len(layers)
        if alike and not plain and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            yield Depth(name, len(layers), tuple(i for i, layer in enumerate(layers) if not _keeps_shape(layer)))


def _widths(module: nn.Module, depths: Mapping[str, Depth], dims: Mapping[str, Dim]) -> Iterator[Dim]:
    """The width of each encoder: what its layers read from and add to."""
    stacks = [path for path in depths if any(name.startswith(f"{path}.") and name.endswith(".heads") for name in dims)]
    roots = [_root(stack, stacks) for stack in stacks]
    for stack, root in zip(stacks, roots, strict=True):
        inner = {axis.tensor: axis for dim in dims.values() if dim.name.startswith(f"{stack}.") for axis in dim.axes}
        reader = next(a for d in dims.values() if d.name.startswith(f"{stack}.") for a in d.axes if a.side == "consume")
        parameters = dict(module.named_parameters(remove_duplicate=False))
        size = parameters[reader.tensor].shape[1 - reader.dim]
        axes = list(_width_axes(module, stack, root, size, inner))
        counts = [
            (path, name, 1)
            for path, part in module.named_modules()
            if _inside(path, root)
            for name in _WIDTHS
            if vars(part).get(name) == size
        ]
        yield Dim(_join(root, "width"), size, tuple(axes), tuple(counts))


def _width_axes(module: nn.Module, stack: str, root: str, size: int, inner: Mapping[str, Axis]) -> Iterator[Axis]:
    for path, part in module.named_modules():
        if not _inside(path, root) and _PROJECTIONS.get(path) != root:
            continue
        for name, tensor in part.named_parameters(recurse=False):
            axis = _width_axis(part, path, name, tensor, size, inner)
            if axis is None and _norm_size(part) == size and name in ("weight", "bias"):
                axis = Axis(_join(path, name), 0, "carry")
            elif axis is None and not list(part.children()) and _has_layout(part):
                continue
            elif axis is None and tensor.shape[-1:] == (size,):  # a scale in a layer; a class token, positions
                side: Side = "carry" if _inside(path, stack) else "produce"
                axis = Axis(_join(path, name), tensor.ndim - 1, side)
            if axis is not None:
                yield axis
                if path not in _PROJECTIONS and axis.tensor not in inner and _square(part, name):
                    yield Axis(axis.tensor, 1 - axis.dim, "produce")  # a pooler gives what it gets


def _width_axis(
    part: nn.Module, path: str, name: str, tensor: Tensor, size: int, inner: Mapping[str, Axis]
) -> Axis | None:
    """The axis of a linear layer, convolution or embedding that runs over the width, if one does."""
    full, known = _join(path, name), inner.get(_join(path, name))
    if isinstance(part, nn.Embedding):
        return Axis(full, 1, "produce") if tensor.shape[1] == size else None
    if not _has_layout(part):
        return None
    if name == "bias":
        weight = inner.get(_join(path, "weight"))
        squared = path not in _PROJECTIONS and _square(part, "weight")
        adds = weight.side == "consume" if weight is not None else squared or isinstance(part, nn.Conv2d)
        return Axis(full, 0, "produce") if adds and len(tensor) == size else None
    if known is not None:  # inside a layer: the axis that heads and hidden units do not run over
        return Axis(full, 1 - known.dim, "produce" if known.side == "consume" else "consume")
    if isinstance(part, nn.Conv2d):
        return Axis(full, 0, "produce") if tensor.shape[0] == size else None
    into = 1 if isinstance(part, nn.Linear) else 0
    read, rest = divmod(tensor.shape[into], size)  # DINOv2's classifier reads two tokens, one after the other
    return Axis(full, into, "consume", groups=read) if rest == 0 and read in (1, 2) else None


def _square(part: nn.Module, name: str) -> bool:
    return name == "weight" and _linear(part) and len(set(_sizes(part))) == 1


def _has_layout(part: nn.Module) -> bool:
    return _linear(part) or isinstance(part, nn.Conv2d | nn.Embedding)


def _root(stack: str, stacks: list[str]) -> str:
    """The outermost module around a list of layers that has no other such list inside."""
    names = stack.split(".")
    for n in range(len(names)):
        root = ".".join(names[:n])
        if not any(other != stack and _inside(other, root) for other in stacks):
            return root
    return stack


def _produce(path: str, name: str, part: nn.Module, unit: int = 1, groups: int = 1) -> list[Axis]:
    transposed = not isinstance(part, nn.Linear | nn.Conv2d)
    axes = [Axis(_join(path, f"{name}.weight"), 1 if transposed else 0, "produce", unit, groups)]
    if getattr(part, "bias", None) is not None:
        axes.append(Axis(_join(path, f"{name}.bias"), 0, "produce", unit, groups))
    return axes


def _consume(path: str, name: str, part: nn.Module, unit: int = 1) -> Axis:
    transposed = not isinstance(part, nn.Linear | nn.Conv2d)
    return Axis(_join(path, f"{name}.weight"), 0 if transposed else 1, "consume", unit)


def _carry(path: str, name: str, part: nn.Module) -> list[Axis]:
    tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    return [Axis(_join(path, f"{name}.{n}"), 0, "carry") for n, t in tensors if t.ndim == 1]


def _linear(part: nn.Module | None) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"  # transformers' linear layer of GPT-2


def _sizes(part: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer or a convolution."""
    rows, columns = getattr(part, "weight").shape[:2]  # noqa: B009
    return (rows, columns) if isinstance(part, nn.Linear | nn.Conv2d) else (columns, rows)


def _norm_size(part: nn.Module) -> int | None:
    """The size of what a norm is over; None for other modules."""
    if "Norm" not in type(part).__name__ or isinstance(part, nn.GroupNorm):
        return None
    weight = getattr(part, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 1 else None


def _single(layer: nn.Module) -> bool:
    return not any(True for _ in layer.children())


def _keeps_shape(layer: nn.Module) -> bool:
    """Whether a model works without this layer."""
    skip = getattr(layer, "has_skip", True)
    return bool(skip) and getattr(layer, "downsample", None) is None


def _inside(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _check_plain(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if parametrize.is_parametrized(part):
            raise UsageError(
                "a model under a parametrization is not cut",
                where=path or type(module).__name__,
                found=", ".join(part.parametrizations),
                expected="plain weights",
                fix="finalise it first",
            )
