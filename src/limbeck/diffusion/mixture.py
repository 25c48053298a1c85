"""Teachers without error: mixtures of Gaussians, whose denoiser, score and Jacobian are known at every time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.diffusion.schedule import Cosine, Schedule


class GaussianMixture(nn.Module):
    """The exact denoiser `E[x_0 | x_t]` of `sum_k w_k N(mu_k, s_k^2 I)`, with classes where components have labels.

    It is called as a `Denoiser` is; gradients through it are exact too. What a method's generator must end as is known: with
    this teacher, its samples are to be distributed as `sample` draws them.

    Args:
        means: `[K, D]`.
        std: Standard deviations, one or `[K]`.
        schedule: The noise schedule.
        weights: `[K]`, default equal.
        labels: The class of each component `[K]`; the label beyond the last class is the empty condition.

    Raises:
        UsageError: Numbers of components differ, or a std or weight is out of range.

    Example:
        >>> two = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.1, Cosine())
        >>> two(torch.tensor([[0.9]]), torch.tensor([0.1])).round(decimals=1)
        tensor([[1.]])
    """

    means: Tensor
    std: Tensor
    weights: Tensor
    labels: Tensor | None
    null: Tensor | None

    def __init__(
        self,
        means: Tensor,
        std: float | Sequence[float] | Tensor,
        schedule: Schedule | None = None,
        weights: Sequence[float] | Tensor | None = None,
        labels: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        count = len(means)
        stds = torch.as_tensor(std, dtype=means.dtype).expand(count).clone()
        shares = torch.ones(count) if weights is None else torch.as_tensor(weights)
        for name, found in (("weights", shares), ("labels", labels)):
            if found is not None and len(found) != count:
                raise UsageError("components differ in number", where=name, found=len(found), expected=count)
        if not count or (stds <= 0).any() or (shares < 0).any() or not shares.sum() > 0:
            raise UsageError(
                "this is no mixture", where="means, std, weights", found=f"{count} components, std {std}, weights {weights}",
                expected="components, each of a std above 0 and a weight of 0 or more",
            )  # fmt: skip
        self.schedule = schedule or Cosine()
        self.register_buffer("means", means)
        self.register_buffer("std", stds)
        self.register_buffer("weights", (shares / shares.sum()).to(means.dtype))
        self.register_buffer("labels", None if labels is None else torch.as_tensor(labels))
        self.register_buffer("null", None if self.labels is None else self.labels.max() + 1)

    def forward(self, x_t: Tensor, t: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """`E[x_0 | x_t]` `[B, ...]` at times `[B]`, of a class where `condition` `[B]` is given."""
        x_t, t = self.schedule.from_noise(x_t, t)
        shares, centres, _, _ = self._parts(x_t, t, condition)
        return (shares.unsqueeze(-1) * centres).sum(1).view_as(x_t)

    def score(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`grad log p_t(x_t)` `[B, ...]`, at time 0 too."""
        shares, _, _, pulls = self._parts(x_t, t, condition)
        return (shares.unsqueeze(-1) * pulls).sum(1).view_as(x_t)

    def jacobian(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`d E[x_0 | x_t] / d x_t` `[B, D, D]` for `x_t` `[B, D]`."""
        shares, centres, slopes, pulls = self._parts(x_t, t, condition)
        mean_pull = (shares.unsqueeze(-1) * pulls).sum(1, keepdim=True)
        outer = torch.einsum("bk,bki,bkj->bij", shares, centres, pulls - mean_pull)
        eye = torch.eye(x_t.shape[1], dtype=x_t.dtype, device=x_t.device)
        return outer + (shares * slopes).sum(1)[:, None, None] * eye

    def sample(self, count: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Tensor:
        """Draws `[N, D]`; with classes `[N]` from these.

        Raises:
            UsageError: No component has such a class.
        """
        weights = self.weights.expand(count, -1)
        if condition is not None and self.labels is not None:
            weights = weights * self._allowed(condition)
            if len(unknown := condition[weights.sum(1) == 0]):
                raise UsageError(
                    "no component has such a class", where="condition", found=int(unknown[0]),
                    expected=f"0 to {int(self.labels.max())}, or {int(self.labels.max()) + 1} for all",
                )  # fmt: skip
        chosen = torch.multinomial(weights, 1, replacement=True, generator=generator)[:, 0]
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self.std[chosen, None] * noise

    def log_prob(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`log p_t(x_t)` `[B]`."""
        return self._logits(x_t.flatten(1), *self.schedule.factors(t, x_t.flatten(1)), condition).logsumexp(1)

    def null_like(self, condition: Tensor) -> Tensor:
        """The empty condition, once for each sample of `condition` `[B]`.

        Raises:
            UsageError: The components have no labels.
        """
        if self.null is None:
            raise UsageError("this mixture has no classes", where="labels", fix="GaussianMixture(..., labels=[...])")
        return self.null.to(condition).expand_as(condition)

    def _logits(self, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        """The logarithm of each component's share of the density `[B, K]`, over that of its classes."""
        variance = (alpha * self.std) ** 2 + sigma**2  # [B, K]
        gaps = (x[:, None] - alpha[:, :, None] * self.means).square().sum(-1)
        logits = self.weights.log() - gaps / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log()
        if condition is None or self.labels is None:
            return logits
        allowed = self._allowed(condition)
        inside = (allowed * self.weights).sum(1, keepdim=True).log()
        return logits.masked_fill(~allowed, -torch.inf) - inside

    def _parts(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per component: its share `[B, K]`, its mean of x_0 `[B, K, D]`, the slope of that, and the pull on x_t."""
        x = x_t.flatten(1)
        alpha, sigma = self.schedule.factors(t, x)
        shares = self._logits(x, alpha, sigma, condition).softmax(1)
        variance = (alpha * self.std) ** 2 + sigma**2
        slopes = alpha * self.std**2 / variance
        gaps = x[:, None] - alpha[:, :, None] * self.means  # [B, K, D]
        return shares, self.means + slopes.unsqueeze(-1) * gaps, slopes, -gaps / variance.unsqueeze(-1)

    def _allowed(self, condition: Tensor) -> Tensor:
        assert self.labels is not None
        assert self.null is not None
        condition = condition[:, None]
        return (condition == self.labels) | (condition == self.null)


def ring(
    modes: int = 8, radius: float = 2.0, std: float = 0.1, schedule: Schedule | None = None, classes: int | None = None
) -> GaussianMixture:
    """Components at even distances on a circle in two dimensions.

    Args:
        modes: Their number.
        radius: Of the circle.
        std: Standard deviation of each.
        schedule: The noise schedule.
        classes: Neighbours on the circle have classes 0, 1, ..., `classes - 1`, and so on; None for none.

    Example:
        >>> ring(4).means.norm(dim=1)
        tensor([2., 2., 2., 2.])
    """
    angles = 2 * math.pi * torch.arange(modes) / modes
    labels = None if classes is None else torch.arange(modes) % classes
    return GaussianMixture(radius * torch.stack([angles.cos(), angles.sin()], 1) + 0.0, std, schedule, labels=labels)


def grid(
    side: int = 5, spacing: float = 1.0, std: float = 0.08, schedule: Schedule | None = None, falling: bool = False
) -> GaussianMixture:
    """Components on a square grid around the origin.

    Args:
        side: Of the square, in components.
        spacing: Between neighbours.
        std: Standard deviation of each.
        schedule: The noise schedule.
        falling: Whether weights fall from component to component, each 0.9 of the one before.
    """
    line = spacing * (torch.arange(side) - (side - 1) / 2)
    means = torch.cartesian_prod(line, line)
    return GaussianMixture(means, std, schedule, weights=0.9 ** torch.arange(len(means)) if falling else None)


def scattered(
    dim: int = 64, modes: int = 10, std: float = 0.3, schedule: Schedule | None = None, seed: int = 0
) -> GaussianMixture:
    """Components, each a class, with means drawn from `N(0, I)` in many dimensions.

    Args:
        dim: Dimensions.
        modes: Components.
        std: Standard deviation of each.
        schedule: The noise schedule.
        seed: Of the means.
    """
    means = torch.randn(modes, dim, generator=torch.Generator().manual_seed(seed))
    return GaussianMixture(means, std, schedule, labels=torch.arange(modes))
