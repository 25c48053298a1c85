"""How far the statistics of a batch are from those that a network remembers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

Moments = Sequence[tuple[Tensor, Tensor]]


def moments(x: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    Args:
        x: `[B, C, ...]`.
        groups: Equal parts of the batch, one after another, each with moments of its own.

    Returns:
        Two tensors `[C]`, fp32 at least; `[groups, C]` where there are some.

    Example:
        >>> mean, variance = moments(torch.tensor([[1.0], [3.0]]))
        >>> mean.item(), variance.item()
        (2.0, 1.0)
    """
    x = x if groups is None else x.unflatten(0, (groups, -1))
    dims = [0, *range(2, x.ndim)] if groups is None else [1, *range(3, x.ndim)]
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.mean(dims), x.var(dims, correction=0)


def statistics_distance(
    found: Moments, remembered: Moments, *, variance_weight: float = 1.0, first: float = 10.0
) -> Tensor:
    r"""The distance of a batch's statistics to running ones, summed over layers.

    $\sum_l c_l (\lVert \mu_l - m_l \rVert_2 + r \lVert s_l - v_l \rVert_2)$, $c_1$ = `first`, other $c_l = 1$ (Yin et al. 2020,
    with the plain norms of SRe2L, Yin et al. 2023; r of DWA, Du et al. 2024).

    Args:
        found: `(mean, variance)` of each layer's input, each `[C_l]`, or `[G, C_l]` of groups; gradients reach them.
        remembered: The layer's running mean and variance.
        variance_weight: `r`, 0 or more.
        first: Factor of the first layer.

    Returns:
        A scalar, or `[G]`.

    Raises:
        UsageError: There are no layers, or the two differ in number.

    Example:
        >>> a, b = [(torch.zeros(2), torch.ones(2))], [(torch.tensor([3.0, 4.0]), torch.ones(2))]
        >>> statistics_distance(a, b, first=1.0).item(), statistics_distance(a, a).item()
        (5.0, 0.0)
    """
    if not found or len(found) != len(remembered):
        raise UsageError(
            "there is no statistic for each layer", where="statistics_distance", found=len(found),
            expected=f"{len(remembered)}, one or more",
        )  # fmt: skip
    terms = []
    for k, ((mean, variance), (m, v)) in enumerate(zip(found, remembered, strict=True)):
        distance = _norm(mean - m) + variance_weight * _norm(variance - v)
        terms.append(distance if k else first * distance)
    return torch.stack(terms).sum(0)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)
