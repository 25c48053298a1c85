"""How what a network says changes along a path in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Derivative = Literal["difference", "jvp"]


@torch.no_grad()
def total_derivative(
    f: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    velocity: Tensor,
    *,
    how: Derivative = "difference",
    dt: float = 0.01,
    value: Tensor | None = None,
) -> Tensor:
    """`d f(x_t, t) / dt` along `dx_t / dt = v`, without gradient.

    Args:
        f: A function of samples `[B, ...]` and times `[B]`.
        x_t: Where.
        t: When, not below `dt` for differences.
        velocity: `v` `[B, ...]`.
        how: `difference`, `(f(x_t, t) - f(x_t - v dt, t - dt)) / dt`, at fp32 or wider; or `jvp`, exact, by forward-mode
            differentiation, which not every attention kernel has.
        dt: Of the difference.
        value: `f(x_t, t)`, where it is known already; under autocast both values are computed without it, at full precision.

    Example:
        >>> x, t = torch.tensor([[3.0]]), torch.tensor([0.5])
        >>> total_derivative(lambda x, t: x * t[:, None], x, t, torch.tensor([[2.0]]), how="jvp")
        tensor([[4.]])
    """
    if how == "jvp":
        found: Tensor = torch.func.jvp(f, (x_t, t), (velocity.to(x_t.dtype), torch.ones_like(t)))[1]
        return found.detach()
    if torch.is_autocast_enabled(x_t.device.type):  # a small difference of numbers in half precision is rounding
        x_t, value = x_t.float(), None
    with torch.autocast(x_t.device.type, enabled=False):
        value = f(x_t, t) if value is None else value
        before = f(x_t - dt * velocity.to(x_t.dtype), t - dt)
    wide = torch.promote_types(value.dtype, torch.float32)
    return (value.detach().to(wide) - before.to(wide)) / dt


def bounded(derivative: Tensor, floor: float = 0.1) -> Tensor:
    """`d / (|d| + 0.1)` with the norm of each sample, as the code of MDT-dist has it; shorter than 1.

    Args:
        derivative: `[B, ...]`.
        floor: What is added to the norm.

    Example:
        >>> bounded(torch.tensor([[0.3, 0.4]]))
        tensor([[0.5000, 0.6667]])
    """
    norm = derivative.flatten(1).norm(dim=1).view(-1, *(1,) * (derivative.ndim - 1))
    return derivative / (norm + floor)
