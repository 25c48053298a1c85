"""N:M sparsity: of every M consecutive weights along the inputs, N are kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError


def nm_mask(weight: Tensor, n: int, m: int, *, dim: int = 1, pairs: bool = False) -> Tensor:
    """Which weights an N:M pattern keeps: the N of largest magnitude in each group of M, exactly N where several are equal.

    Groups follow each other along the inputs: for a linear layer `[out, in]` along `dim=1`, for a convolution
    `[out, in, kh, kw]` along its flattened `in kh kw`, for GPT-2's transposed layers `[in, out]` along `dim=0`.

    Args:
        weight: At least two-dimensional.
        n: Kept of each group, 1 to `m`.
        m: Size of a group; divides the number of inputs.
        dim: The axis of the inputs, 0 or 1.
        pairs: Whether neighbours stay or go together, chosen by their norm (4-bit tensor cores take 4:8 in pairs).

    Returns:
        Boolean, of the shape of `weight`; True is kept.

    Raises:
        UsageError: The numbers do not fit each other or the weight.

    Example:
        >>> nm_mask(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 2, 4)
        tensor([[ True, False,  True, False]])
        >>> nm_mask(torch.tensor([[3.0, 0.0, 2.0, 2.0, 1.0, 0.0, 2.0, 1.0]]), 4, 8, pairs=True).int()
        tensor([[1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.int32)
    """
    check_pattern(weight, n, m, dim, pairs)
    rows = weight.detach().movedim(dim, -1) if weight.ndim == 2 else weight.detach().flatten(1)
    score = rows.unflatten(-1, (-1, m)).abs()  # [..., groups, m]
    if pairs:
        score = score.unflatten(-1, (-1, 2)).norm(dim=-1)
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(-1, score.topk(n // 2 if pairs else n, dim=-1).indices, True)
    kept = (kept.repeat_interleave(2, -1) if pairs else kept).flatten(-2)
    return kept.movedim(-1, dim).contiguous() if weight.ndim == 2 else kept.view(weight.shape)


def check_pattern(weight: Tensor, n: int, m: int, dim: int = 1, pairs: bool = False, where: str = "the weight") -> None:
    """Raise a `UsageError` where an N:M pattern does not fit a weight.

    Example:
        >>> check_pattern(torch.ones(3, 8), 2, 4)
    """
    inputs = weight.shape[dim] if weight.ndim == 2 else math.prod(weight.shape[1:])
    if not 0 < n <= m or (pairs and (n % 2 or m % 2)):
        expected = "even numbers, 0 < N <= M" if pairs else "0 < N <= M"
        raise UsageError("this is no N:M pattern", where=where, found=f"{n}:{m}", expected=expected)
    if inputs % m:
        raise UsageError(
            "the groups of an N:M pattern do not divide the inputs",
            where=where,
            found=f"{inputs} inputs for {n}:{m}",
            expected=f"a multiple of {m}",
            fix="exclude this layer, or take another pattern",
        )


def violations(weight: Tensor, n: int, m: int, *, dim: int = 1) -> int:
    """Groups of M that have more than N weights other than 0.

    Example:
        >>> violations(torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), 2, 4)
        1
    """
    check_pattern(weight, n, m, dim)
    rows = weight.movedim(dim, -1) if weight.ndim == 2 else weight.flatten(1)
    return int((rows.unflatten(-1, (-1, m)).count_nonzero(-1) > n).sum())


def nm_bits(n: int, m: int, bits: int, *, pairs: bool = False) -> float:
    """Bits of storage per group of M weights: the values kept, and where they are.

    Args:
        n: Kept of each group.
        m: Size of a group.
        bits: Bits of a value.
        pairs: Whether neighbours stay or go together, and share an index.

    Returns:
        Bits; a dense group has `m * bits`.

    Example:
        >>> nm_bits(2, 4, 16), nm_bits(2, 4, 8), nm_bits(4, 8, 4, pairs=True)
        (36.0, 20.0, 20.0)
    """
    kept, places = (n // 2, m // 2) if pairs else (n, m)
    return float(n * bits + kept * math.ceil(math.log2(places)))


class StraightThrough(torch.autograd.Function):
    """`weight * mask`, whose gradient in the weight is that of the product."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        """The masked weight."""
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient, unmasked."""
        return grads[0], None


class MaskedNM(nn.Module):
    """A parametrization that masks a weight to an N:M pattern; the gradient goes straight through to all of it.

    `forward(W) = mask * W`, with the gradient of `W` that of the masked weight (SR-STE, Zhou et al. 2021, without its decay,
    which belongs to the optimizer). The mask changes where `refresh` is called.

    Args:
        weight: The weight.
        dim: The axis of its inputs.
        n: Kept of each group.
        m: Size of a group.
        pairs: Whether neighbours stay or go together.
        dense_gradient: False gives masked weights no gradient: a mask that stays as it is.

    Example:
        >>> masked = MaskedNM(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 1, n=2, m=4)
        >>> masked(torch.ones(1, 4))
        tensor([[1., 0., 1., 0.]])
    """

    mask: Tensor

    def __init__(
        self, weight: Tensor, dim: int, n: int, m: int, pairs: bool = False, dense_gradient: bool = True
    ) -> None:
        super().__init__()
        self.n, self.m, self.dim, self.pairs, self.dense_gradient = n, m, dim, pairs, dense_gradient
        self.register_buffer("mask", nm_mask(weight, n, m, dim=dim, pairs=pairs))

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Choose the mask anew by the present weight."""
        self.mask.copy_(nm_mask(weight, self.n, self.m, dim=self.dim, pairs=self.pairs))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        return StraightThrough.apply(weight, self.mask) if self.dense_gradient else weight * self.mask

    def finalise(self, weight: Tensor) -> Tensor:
        """The weight that stays, zeros exactly zero."""
        return weight * self.mask


class ScaledNM(nn.Module):
    """CAST's parametrization: a dense weight, scaled by learnt factors of blocks of its columns, and the mask it will end with.

    `forward(W)[r, c] = W[r, c] A[r, floor(c n / C)]` (Huang et al. 2025). Nothing is masked until `finalise`: an optimizer
    (`limbeck.optim.AdamS`) drives what the mask leaves out to zero, and the factors undo what that takes from the rows.

    Args:
        weight: The weight `[R, C]`, or `[C, R]` with `dim=0`.
        dim: The axis of its inputs.
        n: Kept of each group.
        m: Size of a group.
        blocks: Factors per row; 0 scales nothing.

    Example:
        >>> scaled = ScaledNM(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 1, n=2, m=4, blocks=1)
        >>> scaled(torch.ones(1, 4)).tolist(), scaled.finalise(torch.ones(1, 4)).tolist()
        ([[1.0, 1.0, 1.0, 1.0]], [[1.0, 0.0, 1.0, 0.0]])
    """

    mask: Tensor

    def __init__(self, weight: Tensor, dim: int, n: int, m: int, blocks: int = 2) -> None:
        super().__init__()
        self.n, self.m, self.dim, self.blocks = n, m, dim, blocks
        self.register_buffer("mask", nm_mask(weight, n, m, dim=dim))
        rows = weight.movedim(dim, -1).shape[0] if weight.ndim == 2 else weight.shape[0]
        columns = weight.numel() // rows
        if blocks and (columns % blocks or (columns // blocks) % m):
            raise UsageError(
                "the blocks of factors do not divide the inputs",
                where="scale_blocks",
                found=f"{columns} inputs in {blocks} blocks, groups of {m}",
                expected="blocks of whole groups",
            )
        self.scale = nn.Parameter(weight.new_ones(rows, blocks)) if blocks else None

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Choose the mask anew by the present weight, unscaled."""
        self.mask.copy_(nm_mask(weight, self.n, self.m, dim=self.dim))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        if self.scale is None:
            return weight
        if weight.ndim == 2 and self.dim == 0:
            return (weight.unflatten(0, (self.blocks, -1)) * self.scale.T[:, None]).flatten(0, 1)
        return (weight.reshape(len(weight), self.blocks, -1) * self.scale[..., None]).view(weight.shape)

    def finalise(self, weight: Tensor) -> Tensor:
        """The masked and scaled weight."""
        return self.forward(weight * self.mask)
