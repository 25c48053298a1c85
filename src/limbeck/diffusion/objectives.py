"""What few-step generators learn by: gaps between the scores of the teacher and of the generator's own distribution."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

Elements = Literal["mean", "sum"]


def surrogate(x: Tensor, gradient: Tensor, elements: Elements = "mean") -> Tensor:
    """A loss whose gradient on samples is given: `1/2 ||x - sg(x - g)||^2`, mean over the batch.

    Args:
        x: Generated samples `[B, ...]`.
        gradient: `g` `[B, ...]`; numbers that are not finite count as 0, no gradient reaches them.
        elements: Whether a sample's elements are averaged or added up; the two differ by a factor of their number, which is a
            learning rate: the public codes of DMD and SwiftBrush average, that of VSD adds up.

    Example:
        >>> x = torch.zeros(2, 3, requires_grad=True)
        >>> surrogate(x, torch.ones(2, 3), "sum").backward()
        >>> x.grad
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    target = (x - gradient.nan_to_num(0.0, 0.0, 0.0)).detach()
    return per_sample(0.5 * (x - target).square(), elements).mean()


def check_elements(elements: str) -> None:
    """`elements` is a reduction.

    Raises:
        UsageError: It is neither `mean` nor `sum`.
    """
    if elements not in ("mean", "sum"):
        raise UsageError("elements is out of range", where="elements", found=elements, expected="mean | sum")


def per_sample(values: Tensor, elements: Elements = "mean") -> Tensor:
    """The mean or sum over all but the first dimension `[B]`.

    Raises:
        UsageError: `elements` is neither.
    """
    check_elements(elements)
    flat = values.flatten(1)
    return flat.mean(1) if elements == "mean" else flat.sum(1)


@torch.no_grad()
def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """`(D_fake - D_real) / mean|x - D_real|`: the gradient of distribution matching (Yin et al. 2024), the mean per sample.

    Args:
        x: Generated samples `[B, ...]`.
        real: The teacher's prediction of `x_0` at a noisy version of them.
        fake: That of the network that follows the generator.

    Example:
        >>> dmd_gradient(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 5.0]]))
        tensor([[0., 1.]])
    """
    scale = per_sample((x - real).abs()).view(-1, *(1,) * (x.ndim - 1))
    return ((fake - real) / scale).nan_to_num(0.0, 0.0, 0.0)


def vsd_gradient(real: Tensor, fake: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`alpha sigma (D_fake - D_real)`: `sigma^2 (e_real - e_fake)`, as `e = (x_t - alpha D) / sigma` (Wang et al. 2023).

    Args:
        real: The teacher's prediction of `x_0` at a noisy version of generated samples `[B, ...]`.
        fake: That of the network that follows the generator.
        alpha: Of the schedule at their times, in a shape to multiply with.
        sigma: The same of the noise.

    Example:
        >>> one = torch.ones(1, 1)
        >>> vsd_gradient(one, 3 * one, 0.5 * one, 0.5 * one)
        tensor([[0.5000]])
    """
    return alpha * sigma * (fake - real)


def velocity_gradient(real: Tensor, fake: Tensor, weight: Tensor | float) -> Tensor:
    """`w (v - u)`: descent along it takes samples from where their own velocity `u` leads to where the teacher's `v` does.

    Both are velocities of a rectified flow from samples to noise, so the gap is `vsd_gradient`'s with another weight:
    `v - u = (alpha + sigma) (D_fake - D_real) / sigma` (MDT-dist, 2025; `w` is `1 - t` in the paper, 2 in its code).

    Args:
        real: The teacher's velocity at noisy samples `[B, ...]`.
        fake: That of the generator's own samples.
        weight: In a shape to multiply with.

    Example:
        >>> velocity_gradient(torch.ones(1, 2), torch.zeros(1, 2), 2.0)
        tensor([[2., 2.]])
    """
    return weight * (real - fake)


def sid_loss(
    x: Tensor, real: Tensor, fake: Tensor, alpha: float = 1.0, weight: Tensor | None = None, elements: Elements = "sum"
) -> Tensor:
    """`w (D_real - D_fake) [(D_real - x) - alpha (D_real - D_fake)]`, mean over the batch (Zhou et al. 2024).

    Gradients go to `x` and, through the noisy sample, through both networks: neither prediction may be detached.

    Args:
        x: Generated samples `[B, ...]`.
        real: The teacher's prediction of `x_0`, in the graph.
        fake: That of the network that follows the generator, in the graph.
        alpha: Between 0.5 and 1.2; with an exact `fake` the loss is `(1 - alpha)` times the squared gap, in expectation.
        weight: `[B]`; default `1 / mean|x - D_real|` of each sample, without gradient.
        elements: Whether a sample's elements are averaged or added up.

    Example:
        >>> sid_loss(torch.zeros(1, 1), torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        tensor(0.5000)
    """
    if weight is None:
        weight = 1 / per_sample((x - real).abs()).detach().clamp_min(1e-5)
    gap = real - fake
    return (weight * per_sample(gap * ((real - x) - alpha * gap), elements)).mean()
