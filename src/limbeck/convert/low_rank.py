"""Linear layers as products of two thin ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.convert.parametrized import layers_of
from limbeck.core.adapt import call
from limbeck.core.errors import UsageError
from limbeck.evaluate.cost import evaluating


class LowRankLinear(nn.Module):
    """`y = R (L x) + b`: a linear layer of rank r.

    Args:
        inputs: Inputs i.
        outputs: Outputs o.
        rank: r, below both.
        bias: Whether there is one.

    Example:
        >>> LowRankLinear(8, 6, 2)(torch.ones(3, 8)).shape
        torch.Size([3, 6])
    """

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, rank, bias=False)
        self.second = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `[..., o]` of inputs `[..., i]`."""
        return self.second(self.first(x))

    @property
    def weight(self) -> Tensor:
        """The product `[o, i]`."""
        return self.second.weight @ self.first.weight


@dataclass(frozen=True)
class LowRank:
    """Copy a model and factorise its linear layers by their singular values, split evenly between the two factors.

    Args:
        ratio: How many times fewer weights: `r = floor(o i / (ratio (o + i)))` (PELA, Guo et al. 2024). Layers where two factors
            would be no smaller stay.
        rank: The same rank for all, in place of the ratio.
        include: Globs of the layers, as in `Parametrize`.
        exclude: Globs of layers that stay.
        grams: `X^T X` `[i, i]` of a layer's inputs by path, as `grams_of` gives them: then the error that is least is that of the
            outputs on these inputs, `||X (W - R L)^T||_F`, not that of the weights.

    Raises:
        UsageError: No layer is made smaller, or a Gram matrix does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> thin, record = LowRank(ratio=2.0)(net)
        >>> thin[0].first.out_features, record["ranks"]
        (10, {'0': 10})
    """

    ratio: float = 2.0
    rank: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    grams: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The factorised model, and the record that rebuilds it."""
        ranks: dict[str, int] = {}
        for path in layers_of(module, self.include, self.exclude):
            part = module.get_submodule(path)
            if isinstance(part, nn.Linear):
                o, i = part.weight.shape
                rank = self.rank or int(o * i / (self.ratio * (o + i)))
                if 0 < rank * (o + i) < o * i:
                    ranks[path] = rank
        if not ranks:
            found = f"ratio {self.ratio}" if self.rank is None else f"rank {self.rank}"
            raise UsageError(
                "no linear layer becomes smaller",
                where="ratio",
                found=found,
                expected="a higher ratio, or a lower rank",
            )
        record = {"kind": f"{__name__}:low_rank_module", "ranks": ranks}
        thin = low_rank_module(copy.deepcopy(module), record)
        for path, rank in ranks.items():
            old, new = module.get_submodule(path), thin.get_submodule(path)
            assert isinstance(old, nn.Linear)
            assert isinstance(new, LowRankLinear)
            left, right = factors(old.weight, rank, self.grams.get(path))
            with torch.no_grad():
                new.second.weight.copy_(left)
                new.first.weight.copy_(right)
                if old.bias is not None:
                    new.second.bias.copy_(old.bias)
        return thin, record


def low_rank_module(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Replace linear layers by factorised ones in place, structure only, as a record says."""
    for path, rank in record["ranks"].items():
        old = module.get_submodule(path)
        assert isinstance(old, nn.Linear)
        new = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None)
        module = _replace(module, path, new.to(old.weight.device, old.weight.dtype).train(old.training))
    return module


@dataclass(frozen=True)
class MergeLowRank:
    """Copy a model and multiply its factorised layers out again, into plain linear layers.

    Raises:
        UsageError: It has none.

    Example:
        >>> thin, _ = LowRank()(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3)))
        >>> MergeLowRank()(thin)[0][0]
        Linear(in_features=32, out_features=64, bias=True)
    """

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The plain model, and the record that rebuilds it."""
        paths = [path for path, part in module.named_modules() if isinstance(part, LowRankLinear)]
        if not paths:
            raise UsageError("there is nothing to merge", where=type(module).__name__, expected="layers of LowRank")
        record = {"kind": f"{__name__}:merge_low_rank", "paths": paths}
        return merge_low_rank(copy.deepcopy(module), record), record


def merge_low_rank(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Multiply factorised layers out in place, as a record says."""
    for path in record["paths"]:
        old = module.get_submodule(path)
        assert isinstance(old, LowRankLinear)
        weight, bias = old.weight.detach(), old.second.bias
        new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).to(weight.device, weight.dtype)
        with torch.no_grad():
            new.weight.copy_(weight)
            if bias is not None:
                new.bias.copy_(bias)
        module = _replace(module, path, new.train(old.training))
    return module


@torch.no_grad()
def factors(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two factors of rank r that are nearest to a weight, or whose outputs are nearest on given inputs.

    Without `gram`: `W = U S V^T`, `R = U_r S_r^{1/2}`, `L = S_r^{1/2} V_r^T`, with the error `sum_{k > r} s_k^2`. With it the
    same of `W K`, `K K^T = X^T X` (Cholesky), and `L` multiplied by `K^{-1}`.

    Args:
        weight: `[o, i]`.
        rank: r, 1 to the smaller of both.
        gram: `X^T X` `[i, i]`; a ridge of a millionth of its mean diagonal is added.

    Returns:
        `R` `[o, r]` and `L` `[r, i]`, in fp32 or wider.

    Raises:
        UsageError: The Gram matrix is of another size.

    Example:
        >>> left, right = factors(torch.eye(3), 3)
        >>> torch.allclose(left @ right, torch.eye(3), atol=1e-6)
        True
    """
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    root = None
    if gram is not None:
        if gram.shape != (weight.shape[1],) * 2:
            expected = [weight.shape[1]] * 2
            raise UsageError(
                "a Gram matrix does not fit its layer", where="grams", found=list(gram.shape), expected=expected
            )
        gram = gram.to(weight)
        ridge = 1e-6 * gram.diagonal().mean().clamp_min(torch.finfo(weight.dtype).tiny)
        root = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(weight))  # K
        weight = weight @ root
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    half = s[:rank].sqrt()
    left, right = u[:, :rank] * half, half[:, None] * v[:rank]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return left, right


@torch.no_grad()
def grams_of(module: nn.Module, inputs: Iterable[Any], paths: Sequence[str]) -> dict[str, Tensor]:
    """`X^T X` `[i, i]` of the inputs of some layers, summed over batches, in one pass.

    Args:
        module: The model; it runs in evaluation mode.
        inputs: Model inputs, batch by batch.
        paths: Layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> grams_of(net, [torch.ones(4, 2), torch.ones(1, 2)], ["0"])["0"]
        tensor([[5., 5.],
                [5., 5.]])
    """
    found: dict[str, Tensor] = {}

    def add(path: str) -> Any:
        def hook(_part: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].detach().flatten(0, -2).float()
            found[path] = found[path] + x.T @ x if path in found else x.T @ x

        return hook

    hooks = [module.get_submodule(path).register_forward_pre_hook(add(path)) for path in paths]
    try:
        with evaluating(module):
            for x in inputs:
                call(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _replace(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    if not path:
        return new
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
    return module
