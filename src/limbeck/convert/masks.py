"""Models whose heads, hidden units and width are under gates that learn which of them can go."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils import parametrize

from limbeck.convert.parametrized import Finalise
from limbeck.convert.slicing import Slice
from limbeck.convert.structure import Axis, Dim, structure
from limbeck.core.errors import UsageError
from limbeck.nn.hard_concrete import HardConcrete


class Gates(nn.Module):
    """The gates of a model, by dimension, and their present values.

    Args:
        dims: The dimensions.
        initial: `alpha` at the start.
        sizes: Numbers in each prunable tensor, by name.
        total: How many prunable numbers there were before any was pruned. Default: those there are.
    """

    def __init__(
        self, dims: Sequence[Dim], initial: float, sizes: Mapping[str, int] | None = None, total: int | None = None
    ) -> None:
        super().__init__()
        self.names = [dim.name for dim in dims]
        self.sizes = dict(sizes or {})
        self.total = total or sum(self.sizes.values())
        self.runs: dict[str, list[int]] = {name: [] for name in self.sizes}  # the gates that each tensor is under
        for place, dim in enumerate(dims):
            for axis in dim.axes:
                if axis.tensor in self.runs:
                    self.runs[axis.tensor].append(place)
        self.gates = nn.ModuleList(HardConcrete(dim.size, initial) for dim in dims)
        self.drawn: list[Tensor] | None = None

    def sample(self, generator: torch.Generator | None = None) -> None:
        """Draw the gates of this step, which all weights see until the next draw."""
        self.drawn = [gate.sample(generator) for gate in self]

    def value(self, place: int) -> Tensor:
        """The gates of a dimension: those drawn last in training, else the deterministic ones."""
        if self.training and self.drawn is not None:
            return self.drawn[place]
        return self.gates[place]()

    def probabilities(self) -> dict[str, Tensor]:
        """`P(z > 0)` of each unit, by dimension."""
        return {name: gate.open_probability() for name, gate in zip(self.names, self, strict=True)}

    def sparsity(self) -> Tensor:
        """The share of prunable numbers that is expected to be gone: `1 - sum_tensors prod_axes mean P(z > 0) numel / total`.

        Prunable are the tensors that heads, channels and hidden units run over; embeddings, norms and projections are not.

        Returns:
            Scalar with a gradient in the gates.
        """
        open_ = [gate.open_probability().mean() for gate in self]
        left = torch.zeros((), device=open_[0].device)
        for name, places in self.runs.items():
            share = torch.full((), float(self.sizes[name]), device=left.device)
            for place in places:
                share = share * open_[place]
            left = left + share
        return 1 - left / self.total

    def kept(self) -> dict[str, list[int]]:
        """The units that stay, by dimension; of a model without values, as a plan has it, all."""
        if is_fake(self.gates[0].alpha):
            return {name: list(range(len(gate.alpha))) for name, gate in zip(self.names, self, strict=True)}
        return {name: gate.kept().tolist() for name, gate in zip(self.names, self, strict=True)}

    def clamp_(self) -> None:
        """Keep all `alpha` within their bounds, after each update."""
        for gate in self:
            gate.clamp_()

    def forward(self, x: Any) -> Any:
        """What it is given: a chain of layers may have it as its last."""
        return x

    def __iter__(self) -> Iterator[HardConcrete]:
        return iter(self.gates)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "drawn": None}  # it has a graph, and belongs to one step


class Gated(nn.Module):
    """A parametrization: one axis of a weight times the gates of its dimension.

    Args:
        gates: All gates; not a submodule, since they belong to the model.
        place: Which dimension.
        axis: Where on the weight it runs.
    """

    def __init__(self, gates: Gates, place: int, axis: Axis) -> None:
        super().__init__()
        self.shared = (gates,)
        self.place, self.axis = place, axis

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        z = self.shared[0].value(self.place).repeat_interleave(self.axis.unit).repeat(self.axis.groups)
        return weight * z.view([-1 if d == self.axis.dim else 1 for d in range(weight.ndim)])


class GatedLayerNorm(nn.Module):
    """A layer norm over those channels whose gates are not 0; the others give 0.

    Args:
        norm: The layer norm.
        gates: All gates.
        place: Those of its width.
    """

    def __init__(self, norm: nn.LayerNorm, gates: Gates, place: int) -> None:
        super().__init__()
        self.norm, self.place, self.shared = norm, place, (gates,)  # a tuple, so that gates are the model's alone

    def forward(self, x: Tensor) -> Tensor:
        """The normed channels `[..., D]`."""
        open_ = (self.shared[0].value(self.place) != 0).to(x.dtype)
        count = open_.sum()
        mean = (x * open_).sum(-1, keepdim=True) / count
        centred = (x - mean) * open_
        normed = centred / (centred.square().sum(-1, keepdim=True) / count + self.norm.eps).sqrt()
        return (normed * self.norm.weight + self.norm.bias) * open_


@dataclass(frozen=True)
class AddMasks:
    """Copy a model and put gates on some of its dimensions; evaluated with all gates open it is the model, up to their softness.

    Gates of heads and hidden units scale what reads them, which is the mask on their outputs; gates of a width scale what adds to
    it, and layer norms look at open channels only.

    Args:
        dims: Globs of dimensions; see `limbeck.convert.structure`.
        initial: `alpha` of the gates at the start.
        total: What the sparsity of the gates is a share of: the prunable numbers of a bigger model that this one was part of.
            Default: of this one.

    Raises:
        UsageError: The model has none of them, norms of a width that are no layer norms, or weights of a width that are tied.

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> gated, record = AddMasks(("*.channels",))(mlp(4, 8, 3))
        >>> gated.gates.kept()
        {'0.channels': [0, 1, 2, 3, 4, 5, 6, 7]}
    """

    dims: Sequence[str] = ("*.heads", "*.ffn")
    initial: float = 2.5
    total: int | None = None

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The gated model, in `gates` its `Gates`, and the record that rebuilds it."""
        parts = structure(module).dims
        names = [name for name in parts if any(fnmatchcase(name, glob) for glob in self.dims)]
        if not names:
            raise UsageError("the model has no such dimension", where="dims", found=list(self.dims))
        counted = {axis.tensor for dim in parts.values() if not dim.name.endswith("width") for axis in dim.axes}
        sizes = {name: p.numel() for name, p in module.named_parameters(remove_duplicate=False) if name in counted}
        record = {
            "kind": f"{__name__}:add_masks", "dims": names, "initial": self.initial, "sizes": sizes,
            "total": self.total or sum(sizes.values()),
        }  # fmt: skip
        return add_masks(copy.deepcopy(module), record), record


def add_masks(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Put gates on a model in place, as a record says."""
    parts = structure(module)
    dims = [parts.dims[name] for name in record["dims"]]
    gates = Gates(dims, record["initial"], record["sizes"], record["total"]).to(next(module.parameters()).device)
    names = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    shared = {id(p) for p in module.parameters() if names.count(id(p)) > 1}
    for place, dim in enumerate(dims):
        side = "produce" if dim.name.rpartition(".")[2] == "width" else "consume"
        for axis in dim.axes:
            path, _, name = axis.tensor.rpartition(".")
            part = module.get_submodule(path)
            if axis.side == side:
                if id(getattr(part, name)) in shared:  # the gate is on one of its uses, and would fold into all
                    fix = "leave this dimension out, or untie the weights"
                    raise UsageError(
                        "a weight that is used twice has no gates", where=axis.tensor, found=dim.name, fix=fix
                    )
                parametrize.register_parametrization(part, name, Gated(gates, place, axis), unsafe=True)
            elif side == "produce" and axis.side == "carry" and name == "weight":
                _gate_norm(module, path, gates, place)
    module.add_module("gates", gates)
    return module.train(module.training)


def _gate_norm(module: nn.Module, path: str, gates: Gates, place: int) -> None:
    norm = module.get_submodule(path)
    if not isinstance(norm, nn.LayerNorm):
        found = type(norm).__name__
        raise UsageError("a width whose norms are no layer norms has no gates", where=path, found=found)
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, GatedLayerNorm(norm, gates, place))


@dataclass(frozen=True)
class PruneMasked:
    """Copy a gated model without its gates and the units that are shut; what it computes in evaluation stays.

    The gates of units that stay fold into the weights.

    Raises:
        UsageError: The model has no gates.

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> gated, _ = AddMasks(("*.channels",))(mlp(4, 8, 3))
        >>> gated.gates.gates[0].alpha.data[3:] = -4.0
        >>> pruned, record = PruneMasked()(gated)
        >>> pruned[0].out_features, torch.allclose(pruned(torch.ones(1, 4)), gated.eval()(torch.ones(1, 4)), atol=1e-6)
        (3, True)
    """

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The smaller model, and the record that rebuilds it."""
        gates = getattr(module, "gates", None)
        if not isinstance(gates, Gates):
            raise UsageError("this model has no gates", where=type(module).__name__, fix="AddMasks first")
        record = {"kind": f"{__name__}:prune_masked", "keep": gates.kept()}
        return prune_masked(copy.deepcopy(module).eval(), record).train(module.training), record


def prune_masked(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """A gated model without gates and without the units that a record does not keep."""
    plain, _ = Finalise()(module)
    for path, part in list(plain.named_modules()):
        if isinstance(part, GatedLayerNorm):
            parent, _, name = path.rpartition(".")
            setattr(plain.get_submodule(parent), name, part.norm)
    del plain.gates
    return Slice(record["keep"])(plain)[0]
