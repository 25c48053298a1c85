"""One network that is many: a sub-network is called on the big one's own weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.convert.slicing import Piece, cut, fill
from limbeck.convert.structure import Structure, structure
from limbeck.nn.space import Arch, Space

_CACHED = 256  # structures of sub-networks that are kept, without weights

# Where a tensor of a skeleton goes, and where the big tensor it is a part of comes from.
_Wire = tuple[dict[str, Any], str, dict[str, Any], str, Piece]


class Elastic(nn.Module):
    """A model that is called as any of its sub-networks, each a slice of the same weights.

    `forward(x, arch=...)`: which sub-network runs is an argument of the call. Its weights are views of the leading units of the
    model's own, so gradients add up in these, nothing is copied, and units outside get a gradient of exactly zero. Running
    statistics are the whole model's alone: sub-networks use them in evaluation mode and never write them, so a sub-network is
    judged after `limbeck.evaluate.recalibrate` on an extracted copy.

    Args:
        module: The whole model, of any class that `structure` knows.
        space: Its sub-networks.
        dropout: Whether units and layers are dropped in sub-networks too, or in the whole model alone.

    Raises:
        UsageError: The model has not the dimensions of the space.

    Example:
        >>> import torch
        >>> from limbeck.nn.mlp import mlp
        >>> net = Elastic(mlp(4, 8, 3), Space({"0.channels": (2, 4, 8)}))
        >>> net(torch.ones(1, 4), arch={"0.channels": 2}).sum().backward()
        >>> net.model[0].weight.grad.abs().sum(1).count_nonzero().item() <= 2
        True
    """

    def __init__(self, module: nn.Module, space: Space, dropout: bool = False) -> None:
        super().__init__()
        self.model, self.space, self.dropout = module, space, dropout
        self._structure: Structure = structure(module)
        self._cache: OrderedDict[Any, tuple[nn.Module, list[_Wire]]] = OrderedDict()
        for arch in (space.smallest(), space.largest()):
            cut(module, arch, self._structure)  # a space of another model fails here

    def forward(self, *args: Any, arch: Arch | None = None, **kwargs: Any) -> Any:
        """What the sub-network, or without one the whole model, gives."""
        if arch is None:
            return self.model(*args, **kwargs)
        skeleton, wires = self._wired(arch)
        if skeleton.training != self.model.training:
            skeleton.train(self.model.training)
        for target, name, source, big, piece in wires:
            target[name] = piece.of(source[big])
        return skeleton(*args, **kwargs)

    def extract(self, arch: Arch) -> nn.Module:
        """A plain module of its own with copies of a sub-network's weights, in the mode that the model is in."""
        self.space.check(arch)
        skeleton, pieces = cut(self.model, dict(arch), self._structure)
        return fill(skeleton, pieces, self.model)

    def _wired(self, arch: Arch) -> tuple[nn.Module, list[_Wire]]:
        key = tuple(arch.get(name) for name in self.space)
        found = self._cache.pop(key, None)
        if found is None:
            self.space.check(arch)
            skeleton, pieces = cut(self.model, dict(arch), self._structure)
            _quiet(skeleton, self.dropout)
            found = skeleton, _wires(skeleton, pieces, self.model)
        self._cache[key] = found
        while len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Skeletons hold views with a graph, and are made again when they are asked for.
        return {**self.__dict__, "_cache": OrderedDict()}


def _wires(skeleton: nn.Module, pieces: Mapping[str, Piece], whole: nn.Module) -> list[_Wire]:
    """All the places that hold tensors, so that a call looks nothing up by name; shared tensors in each of theirs."""
    homes: dict[str, tuple[dict[str, Any], str]] = {}
    for path, part in whole.named_modules():
        for store in (part._parameters, part._buffers):
            homes |= {f"{path}.{name}" if path else name: (store, name) for name, t in store.items() if t is not None}
    by_tensor: dict[int, Piece] = {}
    wires: list[_Wire] = []
    for path, part in skeleton.named_modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                piece = by_tensor.get(id(tensor)) or pieces[f"{path}.{name}" if path else name]
                by_tensor[id(tensor)] = piece
                wires.append((store, name, *homes[piece.name], piece))
    return wires


def _quiet(skeleton: nn.Module, dropout: bool) -> None:
    """A sub-network writes no running statistics and, where it is not asked to, drops no units."""
    for part in skeleton.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            part.momentum = 0.0
            part._buffers["num_batches_tracked"] = None
        for name in () if dropout else ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


@dataclass(frozen=True)
class MakeElastic:
    """Copy a model into an elastic one.

    Args:
        space: Its sub-networks.
        dropout: As in `Elastic`.

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> net, record = MakeElastic(Space({"0.channels": (2, 8)}))(mlp(4, 8, 3))
        >>> record["choices"]
        {'0.channels': [2, 8]}
    """

    space: Space
    dropout: bool = False

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The elastic model, and the record that rebuilds it."""
        record = {
            "kind": f"{__name__}:make_elastic",
            "choices": {name: list(sizes) for name, sizes in self.space.choices.items()},
            "together": [list(group) for group in self.space.together],
            "dropout": self.dropout,
        }
        skeleton, pieces = cut(module, {})
        return make_elastic(fill(skeleton, pieces, module), record), record


def make_elastic(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """An elastic model around a module, from the record of its conversion."""
    choices = {name: tuple(sizes) for name, sizes in record["choices"].items()}
    return Elastic(module, Space(choices, record["together"]), record["dropout"])


@dataclass(frozen=True)
class Extract:
    """Take one sub-network out of an elastic model.

    Args:
        arch: The sub-network.

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> net = Elastic(mlp(4, 8, 3), Space({"0.channels": (2, 8)}))
        >>> Extract({"0.channels": 2})(net)[0][0].out_features
        2
    """

    arch: Arch

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The plain module, and the record that rebuilds it."""
        return extract(module, self.record), self.record

    @property
    def record(self) -> dict[str, Any]:
        """Plain data that take the same sub-network again."""
        return {"kind": f"{__name__}:extract", "arch": dict(self.arch)}


def extract(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """One sub-network of an elastic model, from the record of its conversion."""
    assert isinstance(module, Elastic)
    return module.extract(record["arch"])
