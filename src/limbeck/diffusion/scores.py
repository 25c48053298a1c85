"""The network that follows a generator's distribution, and what it and the teacher say about a generated sample."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.guidance import Scale, guided
from limbeck.diffusion.objectives import Elements, dmd_gradient, per_sample, vsd_gradient
from limbeck.diffusion.schedule import Schedule
from limbeck.diffusion.signs import note_signs, warn_if_misdeclared

Weight = Callable[[Tensor, Tensor], Tensor]  # of alpha and sigma
Gradient = Literal["dmd", "vsd"]


def epsilon_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`(alpha / sigma)^2`: the squared error of the sample becomes that of the noise."""
    return (alpha / sigma) ** 2


def schedule_of(role: Role) -> Schedule:
    """The noise schedule of a role.

    Raises:
        UsageError: The module is no denoiser.
    """
    schedule = getattr(role.module, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise UsageError(
            "this role is no denoiser", where=f"roles.{role.name}", found=type(role.module).__name__,
            expected="limbeck.diffusion.Denoiser or a module with `schedule`, called as (x_t, t, condition)",
            fix="Denoiser(net, schedule, prediction)",
        )  # fmt: skip
    return schedule


def noisy(schedule: Schedule, draws: Draws, name: str, x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Samples with noise at times drawn from `[low, high]`, as shares of the schedule; and these times `[B]`."""
    t = schedule.at(low + (high - low) * draws.uniform(f"{name} time")).to(x.device)
    return schedule.add_noise(x, draws.normal(f"{name} noise", x), t).to(x.dtype), t


def predicted(
    role: Role,
    x_t: Tensor,
    t: Tensor,
    condition: Tensor | None,
    scale: Scale = 1.0,
    denoise: Callable[..., Tensor] | None = None,
) -> Tensor:
    """A role's prediction of `x_0`, under guidance where there is a condition; `denoise` may be called in its place."""
    denoise = denoise or role
    if condition is None:
        return denoise(x_t, t=t)
    module: Any = role.module
    if isinstance(scale, float | int) and scale == 1:
        return denoise(x_t, t=t, condition=condition)
    return guided(denoise, x_t, t, condition, module.null_like(condition), scale)


def dropped(role: Role, condition: Tensor | None, draws: Draws, share: float) -> Tensor | None:
    """The condition, in a share of the samples the empty one."""
    if condition is None or not share:
        return condition
    module: Any = role.module
    gone = (draws.uniform("dropout") < share).to(condition.device).view(-1, *(1,) * (condition.ndim - 1))
    return torch.where(gone, module.null_like(condition), condition)


def denoising_loss(
    m: Roles,
    role: str,
    draws: Draws,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    times: tuple[float, float] = (0.02, 1.0),
    dropout: float = 0.0,
    weight: Weight = epsilon_weight,
    elements: Elements = "mean",
    guidance: Scale = 1.0,
) -> Tensor:
    """The weighted squared error of a role's prediction of samples, mean over the batch; no gradient reaches the samples.

    Args:
        m: The roles.
        role: The one that learns.
        draws: Of the batch; times and noise are its own.
        x: Samples `[B, ...]`.
        condition: Class labels `[B]` or embeddings.
        times: Between which shares of the schedule.
        dropout: Share of samples that get the empty condition.
        weight: Of the squared error of `x_0`, from alpha and sigma.
        elements: Whether a sample's elements are averaged or added up.
        guidance: Of the prediction that learns.
    """
    schedule = schedule_of(m[role])
    x = x.detach()
    x_t, t = noisy(schedule, draws, role, x, *times)
    found = predicted(m[role], x_t, t, dropped(m[role], condition, draws, dropout), guidance)
    factor = weight(*schedule.factors(t, x))
    return per_sample(factor * (found - x).square(), elements).mean()


@torch.no_grad()
def matching_gradient(
    m: Roles,
    draws: Draws,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    teacher: str = "teacher",
    guidance: Scale = 1.0,
    times: tuple[float, float] = (0.02, 0.98),
    gradient: Gradient = "dmd",
    logs: MutableMapping[str, Tensor] | None = None,
) -> Tensor:
    """The gradient of distribution matching on samples `[B, ...]`, at a random time each (Yin et al. 2024), for `surrogate`.

    Args:
        m: The roles; `fake` follows the samples and is not guided.
        draws: Of the batch.
        x: Generated samples `[B, ...]`.
        condition: Class labels `[B]` or embeddings.
        teacher: The role whose distribution is aimed at.
        guidance: Of that role.
        times: Between which shares of the schedule.
        gradient: The gap of the predictions over `mean|x - D_teacher|` of each sample (`dmd`), or times `alpha sigma`, which
            is `sigma^2 (e_teacher - e_fake)` (`vsd`).
        logs: Is given the numbers of `limbeck.diffusion.signs`.
    """
    schedule = schedule_of(m[teacher])
    x_t, t = noisy(schedule, draws, "matching", x.detach(), *times)
    real, fake = predicted(m[teacher], x_t, t, condition, guidance), predicted(m.fake, x_t, t, condition)
    note_signs(logs, x, real, fake)
    if gradient == "dmd":
        return dmd_gradient(x, real, fake)
    return vsd_gradient(real, fake, *schedule.factors(t, x))


def check_denoisers(m: Roles, *names: str, batch: Batch | None = None) -> None:
    """The roles are denoisers under one schedule; warns of a teacher that predicts something else than is declared.

    Args:
        m: The roles.
        names: Of them, those that there are.
        batch: Samples or noise of their shape, and conditions; without it the teacher's prediction is taken as declared.

    Raises:
        UsageError: One is not, or schedules differ.
    """
    schedules = {name: schedule_of(m[name]) for name in names if name in m}
    if len(set(schedules.values())) > 1:
        found = ", ".join(f"{name}: {type(s).__name__}" for name, s in schedules.items())
        raise UsageError("the roles have different noise schedules", where="roles", found=found, expected="one for all")
    if batch is not None and "teacher" in m:
        warn_if_misdeclared(m.teacher.module, batch.x, batch.get("y"))


def check_follower(m: Roles) -> None:
    """There is a role `fake`, or the teacher can be copied into one that learns.

    Raises:
        UsageError: The teacher has no parameters, as an exact one has none.
    """
    if "fake" not in m and not any(True for _ in m.teacher.module.parameters()):
        raise UsageError(
            "a copy of this teacher cannot learn", where="roles.fake", found=type(m.teacher.module).__name__,
            fix="give a role fake: a denoiser of the same schedule",
        )  # fmt: skip


def check_samples(samples: Tensor, noise: Tensor) -> None:
    """What a student makes has the shape of the noise that it is given.

    Args:
        samples: The student's.
        noise: `batch.x`.

    Raises:
        UsageError: The shapes differ.
    """
    if samples.shape != noise.shape:
        raise UsageError(
            "the student makes other samples than noise is given", where="roles.student", found=list(samples.shape),
            expected=list(noise.shape),
        )  # fmt: skip
