"""Distributions of samples that still hold noise: scores between a time s and the end, where no clean sample is known."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.diffusion.objectives import Elements, per_sample
from limbeck.diffusion.schedule import Schedule

Target = Literal["unbiased", "biased"]
IntervalPrediction = Literal["sample", "epsilon", "flow_prediction"]


def between(schedule: Schedule, s: float, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`alpha_s`, `sigma_s`, `alpha_{t|s}` and `sigma_{t|s}`, in the shape to multiply `like` `[B, ...]` with.

    Samples at time 0 are clean, whatever noise the schedule knows there.

    Args:
        schedule: The noise schedule.
        s: The time of the samples.
        t: Later times `[B]`.
        like: Samples.
    """
    alpha, sigma = schedule.factors(t, like)
    if s == 0:
        one = torch.ones((), dtype=alpha.dtype, device=alpha.device)
        return one, torch.zeros_like(one), alpha, sigma
    start = torch.full((1,), s, dtype=alpha.dtype, device=alpha.device)
    alpha_s, sigma_s = schedule.factors(start, like)
    ratio, noise = schedule.transition(start, t.to(start))
    return alpha_s, sigma_s, ratio.view(alpha.shape), noise.view(alpha.shape)


def add_more_noise(schedule: Schedule, x_s: Tensor, noise: Tensor, s: float, t: Tensor) -> Tensor:
    """`x_t = alpha_{t|s} x_s + sigma_{t|s} eps`: samples at time s at later times `[B]`."""
    _, _, ratio, sigma = between(schedule, s, t, x_s)
    return (ratio * x_s + sigma * noise).to(x_s.dtype)


def interval_target(
    schedule: Schedule,
    x_s: Tensor,
    noise: Tensor,
    s: float,
    t: Tensor,
    prediction: IntervalPrediction = "flow_prediction",
    target: Target = "unbiased",
) -> tuple[Tensor, Tensor]:
    """`sigma_{t|s}` times what a network should predict at `x_t`, and `sigma_{t|s}` (Fan et al. 2025).

    With `x_t` of `add_more_noise`, the mean given `x_t` of

    `u = (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_{t|s}) eps - x_s / alpha_s`,
    `x_0 = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_{t|s}) eps`, and `e = sigma_t / sigma_{t|s} eps` (derived)

    is what the exact network predicts: the score of `x_t` is the mean of `-eps / sigma_{t|s}`. Both are multiplied by
    `sigma_{t|s}`, so that nothing is divided by it.

    Args:
        schedule: The noise schedule.
        x_s: Samples at time s `[B, ...]`.
        noise: `eps`, of their shape.
        s: Their time, with `alpha_s` above 0.
        t: Later times `[B]`.
        prediction: What is predicted.
        target: `biased` takes the samples at s for clean ones, `u = eps - x_s`: wrong for s above 0, to compare with.

    Example:
        >>> from limbeck.diffusion.schedule import RectifiedFlow
        >>> x, eps, t = torch.ones(1, 2), torch.full((1, 2), 3.0), torch.tensor([0.5])
        >>> scaled, sigma = interval_target(RectifiedFlow(), x, eps, 0.0, t)
        >>> scaled / sigma
        tensor([[2., 2.]])
    """
    alpha_s, sigma_s, ratio, sigma = between(schedule, s, t, x_s)
    if target == "biased":
        alpha_s, sigma_s = torch.ones_like(alpha_s), torch.zeros_like(sigma_s)
        e, x_0 = sigma * noise, sigma * x_s
    else:
        sigma_t = (ratio**2 * sigma_s**2 + sigma**2).sqrt()
        e, x_0 = sigma_t * noise, sigma * x_s / alpha_s - ratio * sigma_s**2 / alpha_s * noise
    return {"epsilon": e, "sample": x_0, "flow_prediction": e - x_0}[prediction], sigma


def interval_loss(
    schedule: Schedule,
    found: Tensor,
    x_s: Tensor,
    noise: Tensor,
    s: float,
    t: Tensor,
    *,
    target: Target = "unbiased",
    clamp: float = 10.0,
    elements: Elements = "mean",
) -> Tensor:
    """`clamp(1 / sigma_{t|s}^2) ||sigma_{t|s} (u - u_target)||^2`, mean over the batch (Fan et al. 2025).

    Args:
        schedule: The noise schedule.
        found: The network's prediction of `x_0` at `x_t` `[B, ...]`.
        x_s: Samples at time s.
        noise: What `x_t` was made with.
        s: Their time.
        t: Later times `[B]`.
        target: See `interval_target`.
        clamp: The most that the loss is divided by `sigma_{t|s}^2`.
        elements: Whether a sample's elements are averaged or added up.
    """
    x_t = add_more_noise(schedule, x_s, noise, s, t)
    scaled, sigma = interval_target(schedule, x_s, noise, s, t, target=target)
    u = schedule.convert(found, x_t, t, "sample", "flow_prediction")
    weight = (1 / sigma**2).clamp(max=clamp)
    return per_sample(weight * (sigma * u - scaled).square(), elements).mean()


@torch.no_grad()
def interval_gradient(schedule: Schedule, real: Tensor, fake: Tensor, s: float, t: Tensor) -> Tensor:
    """`alpha_t alpha_{t|s} / sigma_t^2 (D_fake - D_real)`: the gradient of the reverse KL at t by the samples at s.

    In velocities of a rectified flow it is `alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2) (u_real - u_fake)`, as the paper
    writes it.

    Args:
        schedule: The noise schedule.
        real: The teacher's prediction of `x_0` `[B, ...]`.
        fake: That of the network that follows the generator.
        s: The time of the samples.
        t: The times of the predictions `[B]`.
    """
    alpha, sigma = schedule.factors(t, real)
    return alpha * between(schedule, s, t, real)[2] / sigma**2 * (fake - real)
