"""One batch over all processes, for losses that compare every sample with every other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gathered(x: Tensor) -> Tensor:
    """The samples of all processes, in the order of their ranks; those of this process keep their gradient.

    A loss of all samples, the same in every process, whose gradients are then averaged over processes (weighted by their
    samples) has the gradient of one big batch: the gradient of this process's samples is scaled for that here.

    Args:
        x: `[B, ...]`; B may differ between processes.

    Returns:
        `[sum of B, ...]`; in a single process `x` itself.

    Example:
        >>> all_gathered(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    counts = [int(size) for size in sizes]
    padded = x.detach().new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    own = _Scaled.apply(x, sum(counts) / len(x))
    return torch.cat([own if r == rank else part[:n] for r, (part, n) in enumerate(zip(parts, counts, strict=True))])


class _Scaled(torch.autograd.Function):
    """The same tensor, its gradient times a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None
