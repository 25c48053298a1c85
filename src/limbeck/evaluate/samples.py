"""How far two sets of samples are apart, and how much there is in one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.core.errors import UsageError, require


@torch.no_grad()
def energy_distance(x: Tensor, y: Tensor) -> float:
    """`2 E|X - Y| - E|X - X'| - E|Y - Y'|`, 0 for equal distributions; pairs of a sample with itself are left out.

    Args:
        x: `[N, ...]`.
        y: `[M, ...]`.

    Returns:
        The distance, in the unit of the samples; with few samples of one distribution it may be a little below 0.

    Example:
        >>> energy_distance(torch.zeros(3, 1), torch.ones(3, 1))
        2.0
    """
    a, b = _flat(x, y)
    return float(2 * torch.cdist(a, b).mean() - _mean_distance(a) - _mean_distance(b))


@torch.no_grad()
def mmd(x: Tensor, y: Tensor, bandwidth: float = 1.0) -> float:
    """The squared maximum mean discrepancy under `exp(-|x - y|^2 / (2 bandwidth^2))`, without bias (Gretton et al. 2012).

    Example:
        >>> mmd(torch.zeros(3, 1), 100 * torch.ones(3, 1))
        2.0
    """
    a, b = _flat(x, y)

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return (-torch.cdist(p, q).square() / (2 * bandwidth**2)).exp()

    inner = sum((kernel(p, p).sum() - len(p)) / (len(p) * (len(p) - 1)) for p in (a, b))
    return float(inner - 2 * kernel(a, b).mean())


@torch.no_grad()
def wasserstein(x: Tensor, y: Tensor) -> float:
    """The exact 1-Wasserstein distance of equally many samples, by the best assignment; needs scipy.

    Raises:
        UsageError: The sets are not of one size.

    Example:
        >>> wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]))
        2.0
    """
    a, b = _flat(x, y)
    if len(a) != len(b):
        raise UsageError("the sets differ in size", where="wasserstein", found=f"{len(a)} and {len(b)}")
    costs = torch.cdist(a, b).cpu().numpy()
    rows, columns = require("scipy.optimize", extra="vision").linear_sum_assignment(costs)
    return float(costs[rows, columns].mean())


@torch.no_grad()
def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 128, seed: int = 0) -> float:
    """The mean 1-Wasserstein distance of equally many samples seen along random directions.

    Raises:
        UsageError: The sets are not of one size.

    Example:
        >>> round(sliced_wasserstein(torch.zeros(4, 1), torch.full((4, 1), 3.0)), 4)
        3.0
    """
    a, b = _flat(x, y)
    if len(a) != len(b):
        raise UsageError("the sets differ in size", where="sliced_wasserstein", found=f"{len(a)} and {len(b)}")
    ways = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed)).to(a)
    ways = ways / ways.norm(dim=0)
    return float(((a @ ways).sort(0).values - (b @ ways).sort(0).values).abs().mean())


@torch.no_grad()
def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The distance of FID on features: `|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))` (Heusel et al. 2017).

    Args:
        x: Features `[N, D]`, N above 1.
        y: `[M, D]`.

    Example:
        >>> round(frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])), 6)
        1.0
    """
    a, b = (v.double() for v in _flat(x, y))
    means = (a.mean(0) - b.mean(0)).square().sum()
    first, second = a.T.cov().view(a.shape[1], -1), b.T.cov().view(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float(means + first.trace() + second.trace() - 2 * cross)


@torch.no_grad()
def mode_coverage(x: Tensor, means: Tensor, std: float | Tensor, within: float = 3.0) -> dict[str, float]:
    """How samples lie on the modes of a known mixture.

    Args:
        x: `[N, D]`.
        means: Centres of the modes `[K, D]`.
        std: Their standard deviations, one or `[K]`.
        within: How many of these a sample of D dimensions may lie off, times the root of D.

    Returns:
        `modes`, those that at least one sample lies on; `on_mode`, the share of samples that lie on some; `total_variation`,
        how far the shares of the modes are from equal ones; `spread`, the standard deviation inside modes over the true one.

    Example:
        >>> mode_coverage(torch.tensor([[0.0], [0.1], [9.0]]), torch.tensor([[0.0], [5.0]]), 0.1)["modes"]
        1.0
    """
    x, means = _flat(x, means)
    stds = torch.as_tensor(std, dtype=means.dtype).expand(len(means))
    distances = torch.cdist(x, means) / (stds * means.shape[1] ** 0.5)
    nearest = distances.argmin(1)
    on = distances.amin(1) <= within
    counts = torch.bincount(nearest[on], minlength=len(means)).double()
    shares = counts / counts.sum().clamp_min(1)
    spread = distances.amin(1)[on].square().mean().sqrt() if on.any() else torch.tensor(0.0)
    return {
        "modes": float((counts > 0).sum()),
        "on_mode": float(on.double().mean()),
        "total_variation": float((shares - 1 / len(means)).abs().sum() / 2),
        "spread": float(spread),
    }


@torch.no_grad()
def density_and_coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Whether samples lie where real ones do, and whether real ones have samples near them (Naeem et al. 2020).

    Args:
        real: Real samples or their features `[N, ...]`, N above k.
        fake: Generated ones `[M, ...]`.
        k: The neighbour, among the real ones, at which a real sample's ball ends.

    Returns:
        `density`, how many balls of real samples a generated one is in, over k: about 1 where the distributions are equal, more
        inside dense regions; `coverage`, the share of real samples with a generated one in their ball, at most 1.

    Raises:
        UsageError: There are too few real samples.

    Example:
        >>> x = torch.arange(8.0)[:, None]
        >>> density_and_coverage(x, x[:1], k=2)
        {'density': 1.0, 'coverage': 0.25}
    """
    a, b = _flat(real, fake)
    if len(a) <= k:
        raise UsageError("there are too few real samples", where="density_and_coverage", found=len(a), expected=k + 1)
    radius = torch.cdist(a, a).kthvalue(k + 1, dim=1).values  # the first is the sample itself
    inside = torch.cdist(a, b) <= radius[:, None]
    return {"density": float(inside.double().sum(0).mean() / k), "coverage": float(inside.any(1).double().mean())}


@torch.no_grad()
def vendi(features: Tensor) -> float:
    """How many different samples there are: the exponential of the entropy of their cosines (Friedman and Dieng 2023).

    Args:
        features: `[N, D]`; normalised here.

    Returns:
        1 for N equal samples, up to N for orthogonal ones.

    Example:
        >>> round(vendi(torch.eye(4)), 3), round(vendi(torch.ones(4, 2)), 3)
        (4.0, 1.0)
    """
    unit = torch.nn.functional.normalize(features.flatten(1).double(), dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-12]
    return float((-(values * values.log()).sum()).exp())


@torch.no_grad()
def log_density_ratio(x: Tensor, y: Tensor, k: int = 5) -> Tensor:
    """`log p_x - log p_y` at every sample of x, from the distances to its k-th neighbours in both (Wang et al. 2009).

    Its mean estimates the Kullback-Leibler divergence of x's distribution from y's.

    Args:
        x: `[N, ...]`, N above k.
        y: `[M, ...]`, M at least k.
        k: The neighbour: larger ones have less variance and more bias.

    Returns:
        `[N]`.

    Raises:
        UsageError: There are too few samples.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2000, 1, generator=g), 1 + torch.randn(2000, 1, generator=g)
        >>> abs(log_density_ratio(x, y).mean().item() - 0.5) < 0.1  # (difference of the means)^2 / 2
        True
    """
    a, b = _flat(x, y)
    if len(a) <= k or len(b) < k:
        found = f"{len(a)} and {len(b)}"
        raise UsageError("there are too few samples", where="log_density_ratio", found=found, expected=f"more than {k}")
    own = torch.cdist(a, a).kthvalue(k + 1, dim=1).values  # the first is the sample itself
    other = torch.cdist(a, b).kthvalue(k, dim=1).values
    tiny = torch.finfo(own.dtype).tiny
    return a.shape[1] * (other.clamp_min(tiny) / own.clamp_min(tiny)).log() + math.log(len(b) / (len(a) - 1))


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.flatten(1).float(), y.flatten(1).float().to(x.device)
    if a.shape[1] != b.shape[1] or not len(a) or not len(b):
        found = f"{list(x.shape)} and {list(y.shape)}"
        raise UsageError("these samples cannot be compared", where="samples", found=found, expected="[N, D] and [M, D]")
    return a, b


def _mean_distance(x: Tensor) -> Tensor:
    return torch.cdist(x, x).sum() / max(1, len(x) * (len(x) - 1))
