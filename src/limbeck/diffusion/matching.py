"""One step of distribution matching, and a discriminator inside the network that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.roles import Role, Roles, find, held
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.guidance import Scale
from limbeck.diffusion.objectives import Elements, per_sample, surrogate
from limbeck.diffusion.sampler import Experts, shares
from limbeck.diffusion.schedule import EDM, Schedule
from limbeck.diffusion.scores import (
    Gradient,
    Weight,
    denoising_loss,
    matching_gradient,
    noisy,
    predicted,
    schedule_of,
)
from limbeck.losses.adversarial import Game, discriminator_loss, generator_loss

LIMIT = 10.0  # of a discriminator's scores, as in the code of SiD


def matching_updates(
    m: Roles,
    batch: Batch,
    x: Tensor,
    *,
    teacher: str = "teacher",
    guidance: Scale = 1.0,
    gradient: Gradient = "dmd",
    times: tuple[float, float] = (0.02, 0.98),
    fake_times: tuple[float, float] = (0.001, 1.0),
    dropout: float = 0.0,
    every: int = 1,
    elements: Elements = "mean",
    more: Mapping[str, Callable[[], Tensor]] | None = None,
) -> Iterator[Update]:
    """The student's update by the gap of two scores, in one step of `every`, and `fake`'s by the student's samples (DMD, DMD2).

    Args:
        m: The roles `student`, `fake` and `teacher`.
        batch: With the conditions `y`, where there are some, and `id`.
        x: The student's samples `[B, ...]`, in its graph where it learns in this step.
        teacher: The role whose distribution is aimed at.
        guidance: Of that role; `fake` is not guided.
        gradient: See `matching_gradient`.
        times: Between which shares of the schedule samples are judged.
        fake_times: Between which `fake` learns.
        dropout: Share of samples for which `fake` is told nothing.
        every: Steps of `fake` for one of the student.
        elements: Whether a sample's elements are averaged or added up.
        more: What is added to the losses of `student` and `fake`, computed when it is their turn.
    """
    draws, condition, more = Draws(m, batch), batch.get("y"), more or {}
    if m.every(every):
        logs: dict[str, Tensor] = {}
        gap = matching_gradient(
            m, draws, x, condition, teacher=teacher, guidance=guidance, times=times, gradient=gradient, logs=logs
        )
        logs["gap"] = per_sample(gap.square()).sqrt().mean()
        with held(m.fake):
            loss = surrogate(x, gap, elements)
            loss = loss + more["student"]() if "student" in more else loss
            yield Update("student", loss, logs=logs)
        del loss
    weight = follower_weight(schedule_of(m.fake))
    loss = denoising_loss(
        m, "fake", draws, x, condition, times=fake_times, dropout=dropout, weight=weight, elements=elements
    )
    yield Update("fake", loss + more["fake"]() if "fake" in more else loss)


def follower_weight(schedule: Schedule) -> Weight:
    """By what `fake` learns: `1 / sigma^2 + 1 / sigma_data^2` under EDM (Karras et al. 2022), else the error of the noise.

    Example:
        >>> follower_weight(EDM())(torch.ones(1), torch.ones(1))
        tensor([5.])
    """
    if isinstance(schedule, EDM):
        return lambda alpha, sigma: (1 / sigma**2 + 1 / schedule.data**2).to(alpha)
    return bounded


def bounded(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`(alpha / sigma)^2`, at most 10^4: the squared error of the noise, but where there is hardly any."""
    return ((alpha / sigma) ** 2).clamp(max=1e4)


def discriminator_scores(role: Role, path: str, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """The mean over channels of what a part of a denoiser gives, as scores of real and generated samples (SiDA, 2025).

    Args:
        role: The denoiser; of experts each sample's own answers.
        path: Of the part, whose output is `[B, C, ...]`.
        x_t: Noisy samples `[B, ...]`.
        t: Times `[B]`.
        condition: Class labels or embeddings.

    Returns:
        `[B, ...]`, within 10.
    """
    if not isinstance(role.module, Experts):
        return _scores(role.upto(x_t, path, t=t, condition=condition))
    found = shares(role.module.route(t, condition), len(role.module.experts))
    parts = []
    for k, rows in found:
        own = None if condition is None else condition[rows]
        expert = Role(role.name, role.module.experts[k])
        parts.append(discriminator_scores(expert, path, x_t[rows], t[rows], own))
    return torch.cat(parts)[torch.cat([rows for _, rows in found]).argsort()]


def predicted_and_scored(
    role: Role, path: str, x_t: Tensor, t: Tensor, condition: Tensor | None = None, scale: Scale = 1.0
) -> tuple[Tensor, Tensor]:
    """What `predicted` and `discriminator_scores` give, in one pass where the denoiser is one network.

    Args:
        role: The denoiser.
        path: Of the part.
        x_t: Noisy samples `[B, ...]`.
        t: Times `[B]`.
        condition: Class labels or embeddings, which the scores are for.
        scale: Of the guidance of the prediction.
    """
    unasked = condition is not None and not isinstance(scale, Tensor) and scale == 0  # only the empty condition is
    if isinstance(role.module, Experts) or unasked:
        return predicted(role, x_t, t, condition, scale), discriminator_scores(role, path, x_t, t, condition)
    taken: list[Tensor] = []

    def denoise(x: Tensor, **given: Any) -> Tensor:
        found, taps = role.features(x, path, **given)
        taken.append(taps[path])
        return found

    found = predicted(role, x_t, t, condition, scale, denoise)
    return found, _scores(taken[0][: len(x_t)])  # under guidance the second half is that of the empty condition


def _scores(output: Tensor) -> Tensor:
    return output.mean(1).clamp(-LIMIT, LIMIT)


def fooling(
    m: Roles,
    draws: Draws,
    path: str,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    times: tuple[float, float] = (0.02, 0.98),
    game: Game = "softplus",
) -> Tensor:
    """How badly the student's samples pass for real ones with `fake`, whose part is the discriminator.

    Args:
        m: The roles.
        draws: Of the batch; `telling` draws the same noise and times.
        path: Of the discriminator in `fake`.
        x: The student's samples `[B, ...]`, in its graph.
        condition: Of them.
        times: Between which shares of the schedule.
        game: See `limbeck.losses.adversarial`.
    """
    x_t, t = noisy(schedule_of(m.fake), draws, "discriminator", x, *times)
    return generator_loss(discriminator_scores(m.fake, path, x_t, t, condition), game)


def telling(
    m: Roles,
    draws: Draws,
    path: str,
    real: Tensor,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    times: tuple[float, float] = (0.02, 0.98),
    game: Game = "softplus",
) -> Tensor:
    """How badly `fake` tells real samples from the student's, at the same times with the same noise.

    Args:
        m: The roles.
        draws: Of the batch.
        path: Of the discriminator in `fake`.
        real: Real samples `[B, ...]`.
        x: The student's; no gradient reaches them.
        condition: Of both.
        times: Between which shares of the schedule.
        game: See `limbeck.losses.adversarial`.
    """
    schedule = schedule_of(m.fake)
    (true, t), (made, _) = (noisy(schedule, draws, "discriminator", s, *times) for s in (real, x.detach()))
    high, low = (discriminator_scores(m.fake, path, s, t, condition) for s in (true, made))
    return discriminator_loss(high, low, game)


def check_discriminator(m: Roles, path: str) -> None:
    """There is such a part in what follows the student.

    Raises:
        UsageError: There is none.
    """
    module = m["fake" if "fake" in m else "teacher"].module
    find(module.experts[0] if isinstance(module, Experts) else module, path, "fake")
