"""The gap of two guided scores on generated samples: what variational score distillation of one step is made of."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from limbeck.core.roles import Roles
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.guidance import Scale, guided
from limbeck.diffusion.objectives import vsd_gradient
from limbeck.diffusion.scores import noisy, predicted, schedule_of
from limbeck.diffusion.signs import note_signs


def alpha_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`alpha^2 (alpha / sigma)^2`: the error of the noise, both sides multiplied by alpha, as in SwiftBrush's code."""
    return alpha**2 * (alpha / sigma) ** 2


def drawn_scale(guidance: tuple[float, float], draws: Draws) -> Tensor:
    """Scales of guidance, one drawn for each sample `[B]`.

    Args:
        guidance: The ends of the range.
        draws: Of the batch.
    """
    low, high = guidance
    return low + (high - low) * draws.uniform("guidance")


@torch.no_grad()
def score_gap(
    m: Roles,
    draws: Draws,
    x: Tensor,
    condition: Tensor | None,
    *,
    scale: Scale,
    fake_scale: Scale,
    times: tuple[float, float],
    negative: Tensor | None = None,
    logs: MutableMapping[str, Tensor] | None = None,
) -> Tensor:
    """`sigma^2 (e_teacher - e_fake)` on generated samples `[B, ...]`, at a random time each, for `surrogate`.

    Args:
        m: The roles; `fake` follows the samples.
        draws: Of the batch.
        x: Generated samples `[B, ...]`.
        condition: Class labels `[B]` or embeddings.
        scale: Of the teacher's guidance.
        fake_scale: Of that of `fake`; another one moves the place of rest away from the teacher's distribution.
        times: Between which shares of the schedule.
        negative: What the teacher is guided away from in the place of the empty condition, in the form of `condition`.
        logs: Is given the numbers of `limbeck.diffusion.signs`.
    """
    schedule = schedule_of(m.teacher)
    x_t, t = noisy(schedule, draws, "student", x.detach(), *times)
    if negative is None or condition is None:
        real = predicted(m.teacher, x_t, t, condition, scale)
    else:
        real = guided(m.teacher, x_t, t, condition, negative, scale)
    own = predicted(m.fake, x_t, t, condition, fake_scale)
    note_signs(logs, x, real, own)
    return vsd_gradient(real, own, *schedule.factors(t, x))
