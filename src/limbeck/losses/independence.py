"""How far Gaussian posteriors are from each other, and from not knowing a group."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.losses._reduce import Reduction, full_precision, reduce


@full_precision
def gaussian_kl(
    mean: Tensor, logvar: Tensor, other_mean: Tensor | None = None, other_logvar: Tensor | None = None,
    *, reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """`KL(N(m, v) || N(m', v'))` of diagonal Gaussians: `1/2 sum [log v' - log v + (v + (m - m')^2) / v' - 1]`.

    Args:
        mean: `[B, Z]`.
        logvar: Logarithms of the variances `[B, Z]`.
        other_mean: `[B, Z]`; None for the standard normal.
        other_logvar: `[B, Z]`.
        reduction: Over the samples.

    Example:
        >>> gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2))
        tensor(1.)
    """
    m, v = (torch.zeros_like(mean) if t is None else t for t in (other_mean, other_logvar))
    terms = v - logvar + (logvar.exp() + (mean - m).square()) / v.exp() - 1
    return reduce(0.5 * terms.sum(1), reduction)


@full_precision
def group_distance(
    mean: Tensor, logvar: Tensor, groups: Tensor, count: int, *, normalise: bool = True, chunk: int = 512
) -> Tensor:
    """Squared distance covariance of Gaussian posteriors and a group (FairDisCo, Liu et al. 2022):
    `sum_g p_g^2 integral (p(z | g) - p(z))^2 dz`, in closed form.

    0 where the groups' posteriors are the same mixtures. All pairs of the batch are compared, so parts of a batch are another
    loss.

    Args:
        mean: `[B, Z]`.
        logvar: Logarithms of the variances `[B, Z]`.
        groups: Group numbers `[B]`; a batch of one group gives 0.
        count: How many groups there are; some may be missing in the batch.
        normalise: Whether it is over `integral p(z)^2 dz`, which makes it a number of one size whatever Z is; the authors' code
            does not, and has weights of 10^7 instead.
        chunk: Rows whose pairs are in memory at once; of bigger batches they are computed again on the way back.

    Example:
        >>> m, v = torch.tensor([[0.0], [0.0], [0.0], [0.0]]), torch.zeros(4, 1)
        >>> group_distance(m, v, torch.tensor([0, 0, 1, 1]), 2)
        tensor(0.)
    """
    inside = F.one_hot(groups.long(), count).to(mean.dtype)  # [B, G]
    sizes = inside.sum(0)
    sums = torch.zeros(count, count, dtype=mean.dtype, device=mean.device)  # of densities over pairs of groups
    # No pair is denser than the densest sample with itself: its logarithm keeps many latents from underflow.
    top = -0.5 * (logvar + math.log(4 * math.pi)).sum(1).min().detach()
    for part in zip(mean.split(chunk), logvar.split(chunk), inside.split(chunk), strict=True):
        args = (*part, mean, logvar, inside, top)
        if len(mean) > chunk:
            sums = sums + checkpoint(_densities, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = sums + _densities(*args)
    every = sums.sum() / len(mean) ** 2
    same = sums.diagonal() / sizes.clamp_min(1).square()
    across = sums.sum(1) / (sizes.clamp_min(1) * len(mean))
    share = sizes / len(mean)  # 0 for a group that is missing
    found = (share.square() * (every + same - 2 * across)).sum().clamp_min(0)
    return found / every if normalise else found * top.exp()


def _densities(m: Tensor, v: Tensor, own: Tensor, mean: Tensor, logvar: Tensor, inside: Tensor, top: Tensor) -> Tensor:
    """Densities of differences, added up over pairs of groups `[G, G]`, times `exp(-top)`."""
    total = v.exp()[:, None] + logvar.exp()[None]  # [b, B, Z]
    logs = -0.5 * ((m[:, None] - mean[None]).square() / total + (2 * math.pi * total).log()).sum(-1)
    return own.T @ (logs - top).exp() @ inside
