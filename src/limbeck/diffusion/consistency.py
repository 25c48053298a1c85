"""Consistency distillation in the form of latent consistency models: boundary, grid of times, and the teacher's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.diffusion.guidance import Scale
from limbeck.diffusion.schedule import Schedule
from limbeck.diffusion.scores import predicted, schedule_of

TIMESTEPS = 1000  # what the scale of the boundary counts in, whatever the schedule


def boundary(t: Tensor, scaling: float = 10.0, data: float = 0.5) -> tuple[Tensor, Tensor]:
    """`c_skip = d^2 / ((k s)^2 + d^2)` and `c_out = k s / sqrt((k s)^2 + d^2)` (Luo et al. 2023), 1 and 0 at time 0.

    Args:
        t: Times as shares of the schedule, in [0, 1]; `s = 999 t` is the timestep.
        scaling: `k`; 10 for LCM, 4 for MCM. Already at timestep 1 the sample counts for hardly anything.
        data: `d`, the standard deviation of the data.

    Example:
        >>> boundary(torch.tensor([0.0, 1.0]))
        (tensor([1.0000e+00, 2.5050e-09]), tensor([0., 1.]))
    """
    s = scaling * (TIMESTEPS - 1) * t
    return data**2 / (s**2 + data**2), s / (s**2 + data**2).sqrt()


def consistent(
    denoise: Callable[..., Tensor],
    x_t: Tensor,
    t: Tensor,
    condition: Tensor | None = None,
    *,
    last: float = 1.0,
    scaling: float = 10.0,
) -> Tensor:
    """`f(x_t, t) = c_skip x_t + c_out D(x_t, t)`, which at time 0 is `x_t`.

    Args:
        denoise: Called as `denoise(x_t, t=t, condition=condition)`; returns `x_0`.
        x_t: Noisy samples `[B, ...]`.
        t: Times `[B]`.
        condition: Class labels `[B]` or embeddings.
        last: The schedule's time of pure noise.
        scaling: Of `boundary`.
    """
    skip, out = (c.view(-1, *(1,) * (x_t.ndim - 1)).to(x_t.dtype) for c in boundary(t / last, scaling))
    return skip * x_t + out * denoise(x_t, t=t, condition=condition)


def solver_times(schedule: Schedule, count: int = 50) -> Tensor:
    """The times between which the teacher steps `[count + 1]`, rising: timesteps 0, then 19, 39, ..., 999 for 50 steps.

    The first is timestep 0, at which a table has a little noise, as in the code of LCM and MCM.

    Example:
        >>> from limbeck.diffusion.schedule import Table
        >>> (999 * solver_times(Table.scaled_linear(), 4)).round().tolist()
        [0.0, 249.0, 499.0, 749.0, 999.0]
    """
    if not 1 <= count < TIMESTEPS:
        raise UsageError("there are no such steps", where="count", found=count, expected=f"1 to {TIMESTEPS - 1}")
    places = torch.arange(count + 1) * (TIMESTEPS // count) - 1
    places[-1] = TIMESTEPS - 1
    return schedule.step_at(places.clamp_min(0) / (TIMESTEPS - 1))


def sampling_times(schedule: Schedule, steps: int, count: int = 50) -> Tensor:
    """The times of a sampler of few steps `[steps]`, falling, out of those that were trained: at 999, 759, 499, 259 for 4 of 50.

    Raises:
        UsageError: There are not as many.

    Example:
        >>> from limbeck.diffusion.schedule import Table
        >>> (999 * sampling_times(Table.scaled_linear(), 4)).round().tolist()
        [999.0, 759.0, 499.0, 259.0]
    """
    if not 1 <= steps <= count:
        raise UsageError("there are no such steps", where="steps", found=steps, expected=f"1 to {count}")
    falling = solver_times(schedule, count)[1:].flip(0)
    return falling[torch.arange(steps) * count // steps]


def pure_noise(schedule: Schedule, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Where samplers begin, see `Schedule.begin`, at the last time, and that time `[B]`.

    Args:
        schedule: The schedule.
        noise: Standard normal `[B, ...]`.
    """
    t = torch.full((len(noise),), schedule.last, device=noise.device)
    return schedule.begin(noise, t), t


def consistency_pair(
    teacher: Role,
    student: Callable[..., Tensor],
    target: Callable[..., Tensor],
    x_0: Tensor,
    noise: Tensor,
    index: Tensor,
    condition: Tensor | None = None,
    *,
    scale: Scale = 1.0,
    count: int = 50,
    scaling: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """What the student predicts at a time, and what the target predicts one step of the teacher earlier, without gradient.

    Args:
        teacher: The denoiser that steps, by DDIM.
        student: Called as a denoiser, in the graph.
        target: The network that gives the target: the student itself, or an average of it.
        x_0: Clean samples `[B, ...]`.
        noise: Standard normal `[B, ...]`.
        index: Steps `[B]`, 0 to `count - 1`; at the last `x_t` is the noise itself, whatever the schedule holds there.
        condition: Class labels `[B]` or embeddings.
        scale: Of the teacher's guidance, 1 for none; `w` of LCM is `scale - 1`.
        count: Steps of the grid, see `solver_times`.
        scaling: Of `boundary`.
    """
    schedule = schedule_of(teacher)
    times = solver_times(schedule, count).to(x_0.device)
    t, s = times[index + 1], times[index]
    with torch.no_grad():
        last = (index == count - 1).view(-1, *(1,) * (x_0.ndim - 1))
        x_t = torch.where(last, pure_noise(schedule, noise)[0], schedule.add_noise(x_0, noise, t).to(x_0.dtype))
        x_s = schedule.step(predicted(teacher, x_t, t, condition, scale), x_t, t, s).to(x_0.dtype)
        y = consistent(target, x_s, s, condition, last=schedule.last, scaling=scaling)
    return consistent(student, x_t, t, condition, last=schedule.last, scaling=scaling), y
