"""From noise to samples: along the probability flow, or in a few steps of a generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.diffusion.guidance import Scale, guided
from limbeck.diffusion.schedule import Schedule

Noise = Literal["fresh", "fixed", "ddim"]
GradientSteps = Literal["last", "all"]


@torch.no_grad()
def flow(
    denoise: Any,
    z: Tensor,
    schedule: Schedule,
    steps: int = 50,
    condition: Tensor | None = None,
    null: Tensor | None = None,
    scale: Scale = 1.0,
) -> Tensor:
    """Samples along the probability flow: DDIM, for rectified flows Euler's method.

    Args:
        denoise: Called as `denoise(x_t, t=t, condition=condition)`.
        z: Standard normal noise `[B, ...]`.
        schedule: The denoiser's.
        steps: Calls of the denoiser (of twice the batch with guidance).
        condition: Class labels `[B]` or embeddings.
        null: The empty condition, for guidance.
        scale: Of guidance.

    Raises:
        UsageError: No steps, or a network that says nothing where there is noise alone.

    Example:
        >>> from limbeck.diffusion import ring
        >>> teacher = ring(8)
        >>> x = flow(teacher, torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), teacher.schedule, 30)
        >>> bool(((x.norm(dim=1) - 2).abs() < 0.5).all())
        True
    """
    if steps < 1:
        raise UsageError("samples take a step or more", where="steps", found=steps, expected="1 or more")
    schedule.check_beginning(getattr(denoise, "prediction", None))
    times = schedule.grid(steps).to(z.device)
    x = schedule.begin(z, times[:1].expand(len(z)))
    for t, s in zip(times[:-1].unbind(), times[1:].unbind(), strict=True):
        now, then = t.expand(len(x)), s.expand(len(x))
        if condition is None or null is None:
            x_0 = denoise(x, t=now, condition=condition)
        else:
            x_0 = guided(denoise, x, now, condition, null, scale)
        x = schedule.step(x_0, x, now, then)
    return x


def few_step(
    generator: Callable[..., Tensor],
    z: Tensor,
    schedule: Schedule,
    times: Tensor,
    condition: Tensor | None = None,
    noise: Noise = "fresh",
    fresh: Callable[[int], Tensor] | None = None,
    upto: int | None = None,
    gradient_steps: GradientSteps = "last",
) -> Tensor:
    """Samples of a generator of one or a few steps.

    The first step begins with the noise (`Schedule.begin`); step i predicts `x_0` from `alpha x_0 + sigma n` at its time: the
    prediction of the step before with noise again, drawn anew (`fresh`), the first noise once more (`fixed`), or that which the
    step before saw (`ddim`).

    Args:
        generator: Called as `generator(x_t, t=t, condition=condition)`; returns `x_0`.
        z: Standard normal noise `[B, ...]`.
        schedule: The generator's.
        times: Of the steps `[K]`, falling, above 0.
        condition: Class labels `[B]` or embeddings.
        noise: What is added again.
        fresh: Gives the noise of step `i >= 1` `[B, ...]`; default: torch's generator.
        upto: Steps to take, 1 to K; default all. Times stay those of K steps.
        gradient_steps: Whether the gradient goes through the last of the steps alone, or through all of them.

    Raises:
        UsageError: There is no such noise, or no such step.

    Example:
        >>> from limbeck.diffusion import ring
        >>> teacher = ring(8)
        >>> x = few_step(teacher, torch.zeros(1, 2), teacher.schedule, torch.tensor([0.99]))
        >>> x.abs().max() < 1e-3
        tensor(True)
    """
    last = len(times) if upto is None else upto
    if noise not in ("fresh", "fixed", "ddim") or not 1 <= last <= len(times):
        raise UsageError("there are no such steps", where="noise, upto", found=f"{noise}, {last} of {len(times)}")
    added, x_0 = z, z
    for i in range(last):
        t = times[i].to(z.device).expand(len(z))
        if i and noise == "fresh":
            added = torch.randn_like(z) if fresh is None else fresh(i)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (gradient_steps == "all" or i == last - 1)):
            x_t = schedule.begin(z, t) if i == 0 else schedule.add_noise(x_0, added, t)
            x_0 = generator(x_t, t=t, condition=condition)
            if noise == "ddim" and i < last - 1:
                added = schedule.convert(x_0, x_t, t, "sample", "epsilon")
    return x_0
