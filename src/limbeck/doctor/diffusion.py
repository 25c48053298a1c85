"""Checks of few-step methods: is the teacher what it is declared to be, and are samples in its range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.data.noise import Noise
from limbeck.diffusion.schedule import EDM, Schedule
from limbeck.diffusion.signs import likely_prediction, network_of, size_under_guidance
from limbeck.doctor.exam import Call, Exam, Skip
from limbeck.doctor.finding import Finding

_FEW, _NUMBERS = 16, 256  # samples at most; numbers of noise at least
_SMALL, _LARGE = 0.2, 3.0  # standard deviations that samples have, in pixels from -1 to 1 or in scaled latents
_WIDER = 2.0


def prediction(exam: Exam) -> Finding | None:
    """The teacher's network predicts what it is declared to."""
    call = _teacher(exam)
    net = network_of(exam.models.teacher.module)
    if net is None:
        raise Skip("the teacher declares no prediction that could be judged")
    x, condition = _samples(exam, call), _condition(exam, call)
    x = None if x is None or not _SMALL < float(x.std()) < _LARGE else x  # far from what it knows
    count = _count(call) if x is None else len(x)
    if condition is not None:
        condition = condition.repeat(-(-count // len(condition)), *(1,) * (condition.ndim - 1))[:count]
    likely = likely_prediction(net, _noise(exam, call, count), condition, x)
    if not likely and net.prediction in ("epsilon", "flow_prediction"):
        return Finding(
            "prediction",
            "warning",
            "the teacher says nothing of pure noise, which a network of its prediction returns",
            where="roles.teacher.prediction",
            found=net.prediction,
            expected="v_prediction or sample; or trained weights",
            fix="look at whether its weights were loaded, and at `prediction_type` in the model's scheduler_config.json",
        )
    if not likely or net.prediction in likely:
        return None
    return Finding(
        "prediction",
        "error",
        "the teacher predicts something else than is declared",
        where="roles.teacher.prediction",
        found=net.prediction,
        expected=" or ".join(likely)
        + ", by what it says of pure noise"
        + (" and of the data" if x is not None else ""),
        fix=f'Denoiser(net, schedule, "{likely[0]}"); scheduler_config.json of the model says it as `prediction_type`',
    )


def sample_scale(exam: Exam) -> Finding | None:
    """Real samples have the scale that noise is added at."""
    x = _samples(exam, _teacher(exam))
    if x is None:
        raise Skip("the data are no samples of a diffusion model")
    schedule: Any = exam.models.teacher.module.schedule
    unit = 2 * schedule.data if isinstance(schedule, EDM) else 1.0
    deviation = float(x.std()) / unit
    if _SMALL < deviation < _LARGE:
        return None
    return Finding(
        "sample_scale",
        "warning",
        f"the samples are {'large' if deviation > 1 else 'small'} beside the noise that is added to them",
        where="data.x",
        found=f"standard deviation {deviation * unit:.3g}",
        expected=f"about {unit:g}",
        fix="multiply latents once by the scaling_factor of the autoencoder's config (0.18215 for Stable Diffusion), after "
        "taking off its shift_factor where it has one; bring pixels to -1 to 1",
    )


def guidance(exam: Exam) -> Finding | None:
    """Guided samples of the teacher stay in the range of unguided ones."""
    call = _teacher(exam)
    module, condition, scale = exam.models.teacher.module, _condition(exam, call), _scale(exam.job.method)
    if scale is None or scale <= 1 or condition is None or getattr(module, "null", None) is None:
        raise Skip("the teacher is not guided")
    condition = condition[:_FEW]
    noise = _noise(exam, call, len(condition))
    null, schedule = module.null_like(condition), module.schedule  # type: ignore[operator]
    with torch.no_grad():
        wider = size_under_guidance(module, noise, condition, null, scale, schedule)  # type: ignore[arg-type]
    if wider < _WIDER:
        return None
    return Finding(
        "guidance",
        "warning",
        "guidance drives the teacher's samples out of their range",
        where="method.guidance",
        found=f"at {scale:g}, {wider:.1f} times the spread of unguided samples (ten steps)",
        expected=f"below {_WIDER:g} times",
        fix="lower the scale; what is learned from it is over-saturated",
    )


def _teacher(exam: Exam) -> Call:
    """A call of a teacher that is a denoiser."""
    call = exam.calls.get("teacher")
    schedule = getattr(exam.models.teacher.module, "schedule", None) if call is not None else None
    if call is None or not isinstance(schedule, Schedule) or not call.args or call.kwargs.get("t") is None:
        raise Skip("the teacher is no diffusion model")
    return call


def _count(call: Call) -> int:
    """Samples that have numbers enough between them."""
    return max(_FEW, -(-_NUMBERS // call.args[0][0].numel()))


def _condition(exam: Exam, call: Call) -> Tensor | None:
    """The batch's conditions, if the teacher is told some."""
    return None if call.kwargs.get("condition") is None else exam.batch.get("y")


def _samples(exam: Exam, call: Call) -> Tensor | None:
    """The batch, if it holds real samples."""
    x = exam.batch.get("x")
    real = isinstance(x, Tensor) and x.shape[1:] == call.args[0].shape[1:] and x.is_floating_point()
    return x[: _count(call)] if real and not isinstance(exam.stage.data, Noise) else None


def _noise(exam: Exam, call: Call, count: int) -> Tensor:
    like: Tensor = call.args[0]
    return torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(exam.seed)).to(like)


def _scale(method: Any) -> float | None:
    """The largest scale of guidance that a method names for its teacher."""
    given = [getattr(method, name, None) for name in ("guidance", "vd_guidance")]
    flat = [v for value in given for v in (value if isinstance(value, tuple) else (value,))]
    return max((float(v) for v in flat if isinstance(v, int | float)), default=None)
