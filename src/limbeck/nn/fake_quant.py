"""Weights on a grid of few values, as a parametrization: quantised in the forward pass, learnt as if they were not."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError

Granularity = Literal["tensor", "channel", "bucket"]
_FLAT = 1e-10  # below it all weights of a group are equal


class RoundThrough(torch.autograd.Function):
    """`round(x)`, half to even, with the gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The nearest whole numbers."""
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient as it comes."""
        return grads[0]


class FakeQuant(nn.Module):
    """A parametrization that puts a weight on a grid of `2^bits` values per group, with a straight-through gradient.

    Symmetric: `s round(w / s)`, `s = max|w| / (2^(bits - 1) - 1)`, so that 0 stays 0 and a sparse weight sparse. Otherwise
    min-max: `beta + alpha round((2^bits - 1) u) / (2^bits - 1)`, `u = (w - beta) / alpha`, `beta = min w`,
    `alpha = max w - min w` (Polino, Pascanu and Alistarh 2018, with buckets). Scales follow the weight and have no gradient.

    Args:
        weight: The weight.
        dim: The axis of its inputs; channels are along the other one.
        bits: 2 to 16.
        granularity: Which weights share a scale: all, those of one output, or `bucket` consecutive ones.
        bucket: Weights of a bucket; the last is filled up with its last weight, which changes nothing.
        symmetric: Which grid.

    Raises:
        UsageError: The bits are out of range, or a word is unknown.

    Example:
        >>> w = torch.tensor([[1.0, -0.5, 0.2]])
        >>> FakeQuant(w, 1, bits=2)(w)
        tensor([[1., -0., 0.]])
        >>> FakeQuant(w, 1, bits=2, symmetric=False)(w)
        tensor([[ 1.0000, -0.5000,  0.0000]])
    """

    def __init__(
        self,
        weight: Tensor,
        dim: int,
        bits: int = 8,
        granularity: Granularity = "channel",
        bucket: int = 256,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 16 or bucket < 1:
            raise UsageError(
                "bits are out of range", where="bits", found=bits, expected="2 to 16, buckets of 1 or more"
            )
        if granularity not in ("tensor", "channel", "bucket"):
            raise UsageError(
                "unknown word", where="granularity", found=granularity, expected="tensor, channel or bucket"
            )
        self.dim, self.bits, self.granularity, self.bucket, self.symmetric = dim, bits, granularity, bucket, symmetric

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on the grid."""
        groups = self._groups(weight)
        if self.symmetric:
            levels = 2 ** (self.bits - 1) - 1
            top = groups.detach().abs().amax(-1, keepdim=True)
            scale = torch.where(top < _FLAT, 1.0, top / levels)
            found = RoundThrough.apply(groups / scale) * scale
        else:
            levels = 2**self.bits - 1
            low, high = groups.detach().aminmax(dim=-1, keepdim=True)
            scale = torch.where(high - low < _FLAT, 1.0, high - low) / levels
            found = RoundThrough.apply((groups - low) / scale) * scale + low
        return self._whole(found, weight)

    @torch.no_grad()
    def finalise(self, weight: Tensor) -> Tensor:
        """The weight that stays."""
        return self.forward(weight)

    def _groups(self, weight: Tensor) -> Tensor:
        if self.granularity == "tensor":
            return weight.reshape(1, -1)
        if self.granularity == "channel":
            return (weight.T if self.dim == 0 and weight.ndim == 2 else weight).flatten(1)
        flat = weight.reshape(-1)
        if flat.numel() <= self.bucket:
            return flat[None]
        missing = -flat.numel() % self.bucket
        return (
            torch.cat([flat, flat[-1:].expand(missing)]).view(-1, self.bucket)
            if missing
            else flat.view(-1, self.bucket)
        )

    def _whole(self, groups: Tensor, weight: Tensor) -> Tensor:
        if self.granularity == "channel" and self.dim == 0 and weight.ndim == 2:
            return groups.T.reshape(weight.shape)
        return groups.reshape(-1)[: weight.numel()].view(weight.shape)


def quantised_bits(
    weight: Tensor,
    bits: int,
    *,
    granularity: Granularity = "channel",
    bucket: int = 256,
    symmetric: bool = True,
    dim: int = 1,
) -> int:
    """Bits of storage of a quantised weight: the codes, and a scale of 32 bits per group, with its offset where there is one.

    Args:
        weight: The weight.
        bits: Of a code.
        granularity: Which weights share a scale.
        bucket: Weights of a bucket.
        symmetric: Whether groups have no offset.
        dim: The axis of the inputs.

    Example:
        >>> quantised_bits(torch.ones(4, 256), 4, granularity="bucket", symmetric=False)
        4352
    """
    channels = weight.shape[1 - dim] if weight.ndim == 2 else weight.shape[0]
    groups = {"tensor": 1, "channel": channels, "bucket": math.ceil(weight.numel() / bucket)}[granularity]
    return weight.numel() * bits + groups * (32 if symmetric else 64)
