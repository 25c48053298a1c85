"""Signs that a few-step training goes wrong: in the numbers it logs, and in what a teacher says of noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from limbeck.core.limits import Limit
from limbeck.diffusion.denoiser import Denoiser, EDMDenoiser
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.objectives import per_sample
from limbeck.diffusion.schedule import Prediction, Schedule

# What a method with a network `fake` takes as its `limits`.
FOLLOWER_LIMITS = (
    Limit(
        "error/fake", 10.0, over="error/teacher",
        what="'fake' has lost the student's samples: it denoises them far worse than the teacher, which never saw them",
        fix="divide optim.fake.lr by 3, set optim.fake.clip, or let fake take more steps for one of the student",
    ),
    Limit(
        "size", 4.0, what="the student's samples grow out of the range of samples, whose root mean square is about 1",
        fix="lower the guidance, or divide optim.student.lr by 3; `limbeck doctor` looks at the teacher's own samples",
    ),
)  # fmt: skip


@torch.no_grad()
def note_signs(logs: MutableMapping[str, Tensor] | None, x: Tensor, real: Tensor, fake: Tensor) -> None:
    """Add to a log what `FOLLOWER_LIMITS` are about.

    Args:
        logs: Of an update; None for nowhere.
        x: Generated samples `[B, ...]`.
        real: The teacher's prediction of them from noisy ones.
        fake: That of the network that follows the generator.

    Example:
        >>> logs = {}
        >>> note_signs(logs, torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), 4.0))
        >>> {name: value.item() for name, value in logs.items()}
        {'size': 1.0, 'error/teacher': 1.0, 'error/fake': 9.0}
    """
    if logs is None:
        return
    logs["size"] = per_sample(x.detach().square()).sqrt().mean()
    logs["error/teacher"] = per_sample((real - x).detach().square()).mean()
    logs["error/fake"] = per_sample((fake - x).detach().square()).mean()


def network_of(module: nn.Module) -> Denoiser | None:
    """The denoiser inside a sampler or experts whose network predicts what it is declared to; None for other modules.

    Under EDM's preconditioning and on schedules that never come near pure noise there is nothing to judge.
    """
    inner: Any = module
    while not isinstance(inner, Denoiser):
        inner = getattr(inner, "denoiser", None) or next(iter(getattr(inner, "experts", [])), None)
        if inner is None:
            return None
    last = torch.tensor(inner.schedule.last)
    blind = isinstance(inner, EDMDenoiser) or float(inner.schedule.alpha(last)) > 0.2
    return None if blind else inner


@torch.no_grad()
def share_of_noise(net: Denoiser, noise: Tensor, condition: Tensor | None = None) -> float:
    """How much of pure noise is in what a network gives for it: near 1 if it predicts the noise or `eps - x_0`, else near 0.

    Args:
        net: The denoiser.
        noise: Standard normal `[B, ...]`.
        condition: Class labels `[B]` or embeddings.
    """
    t = torch.full((len(noise),), net.schedule.last, device=noise.device)
    x_t = net.schedule.begin(noise, t)
    return _slope(_raw(net, x_t, t, condition), noise)


@torch.no_grad()
def share_of_sample(net: Denoiser, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> float:
    """How much of samples with hardly any noise is in what a network gives for them: 1 for the sample, -1 for `eps - x_0`, near 0
    for the noise and for v.

    Args:
        net: The denoiser.
        x: Real samples `[B, ...]`.
        noise: Standard normal, of their shape.
        condition: Class labels `[B]` or embeddings.
    """
    t = net.schedule.at(torch.full((len(x),), 0.05, device=x.device))
    x_t = net.schedule.add_noise(x, noise, t).to(x.dtype)
    return _slope(_raw(net, x_t, t, condition), x)


@torch.no_grad()
def relative_error(
    net: Denoiser, prediction: Prediction, x: Tensor, noise: Tensor, condition: Tensor | None = None
) -> float:
    """The error of `x_0` in the middle of the schedule, were the network's output this prediction, over that of the best linear
    guess: below 1 for a network that knows the samples.

    Args:
        net: The denoiser.
        prediction: What it is taken for.
        x: Samples `[B, ...]`.
        noise: Standard normal, of their shape.
        condition: Class labels `[B]` or embeddings.
    """
    schedule, mean = net.schedule, x.mean(0, keepdim=True)
    variance, found = (x - mean).square().mean(), []
    for share in (0.3, 0.5, 0.7):
        t = schedule.at(torch.full((len(x),), share, device=x.device))
        alpha, sigma = schedule.factors(t, x)
        x_t = schedule.add_noise(x, noise, t).to(x.dtype)
        linear = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)
        told = schedule.convert(_raw(net, x_t, t, condition), x_t, t, prediction, "sample")
        found.append((told - x).square().mean() / (linear - x).square().mean())
    return float(torch.stack(found).mean())


def likely_prediction(
    net: Denoiser, noise: Tensor, condition: Tensor | None = None, x: Tensor | None = None
) -> tuple[str, ...]:
    """What a network predicts, told from what it says of pure noise and, where there are some, of real samples.

    Args:
        net: The denoiser.
        noise: Standard normal `[B, ...]`, some hundred numbers.
        condition: Class labels `[B]` or embeddings.
        x: Real samples, of the same shape.

    Returns:
        One prediction; two that cannot be told apart without samples; none where the network says nothing of noise, nor enough of
        samples: it predicts v or samples, or it is not trained.

    Example:
        >>> from limbeck.diffusion.schedule import Cosine
        >>> likely_prediction(Denoiser(lambda x, t: x, Cosine(), "v_prediction"), torch.randn(64, 4))
        ('epsilon', 'flow_prediction')
    """
    if share_of_noise(net, noise, condition) > 0.5:
        both = ("epsilon", "flow_prediction")
        return both if x is None else (both[share_of_sample(net, x, noise, condition) < -0.4],)
    if x is None:
        return ()
    if share_of_sample(net, x, noise, condition) > 0.6:
        return ("sample",)
    return ("v_prediction",) if relative_error(net, "v_prediction", x, noise, condition) < 0.9 else ()


def warn_if_misdeclared(module: nn.Module, x: Tensor, condition: Tensor | None = None) -> None:
    """Warn of a network that is declared to predict v or samples and returns the noise that it is given.

    One pass; what `limbeck doctor` tells beyond it needs real samples.

    Args:
        module: A denoiser, a sampler or experts; others pass.
        x: What samples look like `[B, ...]`; its values do not matter.
        condition: Class labels `[B]` or embeddings.
    """
    net = network_of(module)
    if net is None or not isinstance(x, Tensor) or is_fake(x) or net.prediction not in ("v_prediction", "sample"):
        return
    count = max(len(x), -(-256 // x[0].numel()))
    noise = torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
    if condition is not None:
        condition = condition.repeat(-(-count // len(condition)), *(1,) * (condition.ndim - 1))[:count]
    try:
        share = share_of_noise(net, noise, condition)
    except Exception:  # what does not fit is told by the checks of shapes
        return
    if share > 0.5:
        warnings.warn(
            f"the teacher is declared to predict {net.prediction}, and of pure noise it returns {share:.0%}: it seems to predict "
            "epsilon or flow_prediction",
            stacklevel=3,
        )


def size_under_guidance(
    denoise: Callable[..., Tensor], noise: Tensor, condition: Tensor, null: Tensor, scale: float, schedule: Schedule
) -> float:
    """The spread of guided samples over that of unguided ones, both in ten steps from the same noise.

    They begin a little before the end of the schedule, where a prediction of the noise may tell nothing of the sample.

    Args:
        denoise: Called as `denoise(x_t, t=t, condition=condition)`.
        noise: Standard normal `[B, ...]`.
        condition: Class labels `[B]` or embeddings.
        null: The empty condition, in the same form.
        scale: Of guidance.
        schedule: The denoiser's.
    """
    spreads = []
    for k in (1.0, scale):
        times = schedule.at(torch.linspace(0.95, 0.0, 11)).to(noise.device)
        x = (torch.hypot(*schedule.factors(times[:1], noise)) * noise).to(noise.dtype)
        for t, s in zip(times[:-1].unbind(), times[1:].unbind(), strict=True):
            now = t.expand(len(x))
            x = schedule.step(guided(denoise, x, now, condition, null, k), x, now, s.expand(len(x))).to(noise.dtype)
        spreads.append((x - x.mean(0)).square().mean().sqrt())
    return float(spreads[1] / spreads[0].clamp_min(1e-12))


def _raw(net: Denoiser, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """What the network itself says."""
    return net._raw(x_t, net.time_scale * t, condition)


def _slope(y: Tensor, x: Tensor) -> float:
    return float((y * x).sum() / x.square().sum())
