"""Noise schedules and what networks predict, in one notation: `x_t = alpha_t x_0 + sigma_t eps`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

Prediction = Literal["sample", "epsilon", "v_prediction", "flow_prediction"]
PREDICTIONS = ("sample", "epsilon", "v_prediction", "flow_prediction")


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise: `shift t / (1 + (shift - 1) t)`.

    Example:
        >>> shifted(torch.tensor([0.75, 0.5, 0.25]), 5.0)
        tensor([0.9375, 0.8333, 0.6250])
    """
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Schedule:
    """How much of the sample and how much noise `x_t` holds at time t, from 0 (clean) to `last` (noise).

    What networks predict, by the names of diffusers: `sample` is `x_0`; `epsilon` the noise; `v_prediction`
    `v = alpha eps - sigma x_0`; `flow_prediction` `u = eps - x_0`. `convert` turns each into each other.
    """

    ends_in_noise: ClassVar[bool] = False  # whether nothing of the sample is left at the last time

    @property
    def last(self) -> float:
        """The time of pure noise."""
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the sample at times `[...]`."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise at times `[...]`."""
        raise NotImplementedError

    def factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha_t` and `sigma_t` of times `[B]`, in the shape to multiply `like` `[B, ...]` with, fp32 or wider."""
        t = t.to(like.device, torch.promote_types(t.dtype, torch.float32))
        shape = (-1, *(1,) * (like.ndim - 1))
        return self.alpha(t).view(shape), self.sigma(t).view(shape)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`x_t` of samples `[B, ...]` at times `[B]`."""
        alpha, sigma = self.factors(t, x_0)
        return alpha * x_0 + sigma * noise

    def from_noise(self, x_t: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """`x_t` and t; without t, `x_t` is standard normal noise, and becomes where `begin` has it at the last time."""
        if t is not None:
            return x_t, t
        t = torch.full((len(x_t),), self.last, device=x_t.device)
        return self.begin(x_t, t), t

    def begin(self, z: Tensor, t: Tensor) -> Tensor:
        """Where the first step of a sampler finds its noise: `sigma_t z`, at the last time `sqrt(alpha_T^2 + sigma_T^2) z`.

        A table ends with a little of the sample, which a sampler does not have. What stands there instead has the spread of what
        the network was trained on: the noise itself, as SwiftBrush, LCM and diffusers (`init_noise_sigma`) begin. Before the end
        it is `sigma_t z`, noise added to nothing, as SiD begins.

        Args:
            z: Standard normal `[B, ...]`.
            t: Times `[B]`.

        Example:
            >>> table, z = Table.scaled_linear(), torch.ones(2, 1)
            >>> table.begin(z, torch.tensor([1.0, 0.0])).flatten()
            tensor([1.0000, 0.0292])
        """
        alpha, sigma = self.factors(t, z)
        last = (t >= self.last).view(sigma.shape).to(z.device)
        return torch.where(last, (alpha**2 + sigma**2).sqrt(), sigma).to(z.dtype) * z

    def check_beginning(self, prediction: str | None, t: float | None = None) -> None:
        """That a network can say something of the sample at the time of the first step.

        Args:
            prediction: What it predicts.
            t: The time; None is the last.

        Raises:
            UsageError: There is noise alone, and the noise is all that it predicts.

        Example:
            >>> RectifiedFlow().check_beginning("flow_prediction")
        """
        if self.ends_in_noise and prediction == "epsilon" and (t is None or t >= self.last):
            raise UsageError(
                "a network that predicts the noise knows nothing of the sample where there is noise alone",
                where="prediction", found=f"epsilon at the last time of {type(self).__name__}",
                expected="v_prediction, flow_prediction or sample, or a schedule that keeps a little of the sample (Table)",
                fix="begin a little before the end, such as times=(0.99, ...)",
            )  # fmt: skip

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, of: Prediction, to: Prediction) -> Tensor:
        """One prediction as another; not finite where x_t holds nothing of what is asked.

        That is the noise at sigma = 0, from the sample, and the sample at alpha = 0, from the noise.

        Args:
            value: What a network predicted `[B, ...]`.
            x_t: What it was given `[B, ...]`.
            t: Times `[B]`.
            of: What the value is.
            to: What is wanted.

        Raises:
            UsageError: There is no such prediction.

        Example:
            >>> x_t, t = torch.ones(1, 2), torch.tensor([0.25])
            >>> RectifiedFlow().convert(torch.zeros(1, 2), x_t, t, "sample", "epsilon")
            tensor([[4., 4.]])
        """
        for name in (of, to):
            if name not in PREDICTIONS:
                raise UsageError(
                    "there is no such prediction", where="prediction", found=name, expected=", ".join(PREDICTIONS)
                )
        if of == to:
            return value
        alpha, sigma = self.factors(t, x_t)
        if of == "sample":
            x_0 = value
        elif of == "epsilon":
            x_0 = (x_t - sigma * value) / alpha
        elif of == "v_prediction":
            x_0 = (alpha * x_t - sigma * value) / (alpha**2 + sigma**2)
        else:
            x_0 = (x_t - sigma * value) / (alpha + sigma)
        if to == "sample":
            return x_0
        if of == "epsilon":
            noise = value
        elif of == "v_prediction":
            noise = (sigma * x_t + alpha * value) / (alpha**2 + sigma**2)
        elif of == "flow_prediction":
            noise = (x_t + alpha * value) / (alpha + sigma)
        else:
            noise = (x_t - alpha * x_0) / sigma
        if to == "epsilon":
            return noise
        return alpha * noise - sigma * x_0 if to == "v_prediction" else noise - x_0

    def step(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """`x_s` on the straight way from `x_t` to what is predicted: a step of DDIM, for flows one of Euler's method.

        Args:
            x_0: The prediction at t `[B, ...]`.
            x_t: Where it was made.
            t: Times `[B]`.
            s: Earlier times `[B]`.
        """
        noise = self.convert(x_0, x_t, t, "sample", "epsilon")
        return self.add_noise(x_0, noise, s)

    def at(self, share: Tensor) -> Tensor:
        """The time at a share of the schedule, from 0 to 1."""
        return share * self.last

    def step_at(self, share: Tensor) -> Tensor:
        """The time of a sampler's step at a share of the schedule: `at`, but that flows shift their steps."""
        return self.at(share)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha_{t|s}` and `sigma_{t|s}` of `x_t = alpha_{t|s} x_s + sigma_{t|s} eps`, for `s < t` `[...]`."""
        ratio = self.alpha(t) / self.alpha(s)
        return ratio, (self.sigma(t) ** 2 - ratio**2 * self.sigma(s) ** 2).clamp_min(0).sqrt()

    def grid(self, steps: int) -> Tensor:
        """Times `[steps + 1]` from `last` down to 0, at even distances."""
        return torch.linspace(self.last, 0.0, steps + 1)


@dataclass(frozen=True)
class Cosine(Schedule):
    """`alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`: variance preserving.

    Example:
        >>> Cosine().alpha(torch.tensor([0.0, 0.5])).square()
        tensor([1.0000, 0.5000])
    """

    ends_in_noise: ClassVar[bool] = True

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the sample."""
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise."""
        return torch.sin(math.pi / 2 * t)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """`alpha = 1 - t`, `sigma = t`.

    Args:
        shift: Moves the steps of samplers towards noise: `t' = shift t / (1 + (shift - 1) t)`; not the times of training.
    """

    ends_in_noise: ClassVar[bool] = True

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise UsageError("the shift is out of range", where="shift", found=self.shift, expected="above 0")

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the sample."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise."""
        return t

    def step_at(self, share: Tensor) -> Tensor:
        """The time of a sampler's step, shifted."""
        return shifted(share, self.shift)

    def grid(self, steps: int) -> Tensor:
        """Times `[steps + 1]` from 1 down to 0, shifted.

        Example:
            >>> RectifiedFlow(shift=5.0).grid(4)
            tensor([1.0000, 0.9375, 0.8333, 0.6250, 0.0000])
        """
        return self.step_at(super().grid(steps))


@dataclass(frozen=True)
class EDM(Schedule):
    """`alpha = 1`, `sigma = t`, from 0.002 to 80 (Karras et al. 2022).

    Args:
        smallest: The least noise of the grid before 0.
        largest: The most.
        rho: How the grid is bent.
        data: Standard deviation of the data, `sigma_data`.
    """

    smallest: float = 0.002
    largest: float = 80.0
    rho: float = 7.0
    data: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.smallest < self.largest and self.rho > 0 and self.data > 0):
            raise UsageError(
                "these are no noise levels", where="smallest, largest, rho, data",
                found=f"{self.smallest}, {self.largest}, {self.rho}, {self.data}",
                expected="0 < smallest < largest, rho and data above 0",
            )  # fmt: skip

    @property
    def last(self) -> float:
        """The most noise."""
        return self.largest

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the sample."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise."""
        return t

    def at(self, share: Tensor) -> Tensor:
        """The noise level at a share of the bent grid."""
        low, high = self.smallest ** (1 / self.rho), self.largest ** (1 / self.rho)
        return (low + share * (high - low)) ** self.rho

    def begin(self, z: Tensor, t: Tensor) -> Tensor:
        """`sigma_t z` at all times, as the codes of EDM, consistency models and DMD2 begin: 80 z, not `sqrt(1 + 80^2) z`."""
        return self.factors(t, z)[1].to(z.dtype) * z

    def grid(self, steps: int) -> Tensor:
        """Noise levels `[steps + 1]` from the largest to the smallest, then 0."""
        powers = torch.linspace(self.largest ** (1 / self.rho), self.smallest ** (1 / self.rho), max(steps, 2))
        return torch.cat([powers[:steps] ** self.rho, torch.zeros(1)])


@dataclass(frozen=True)
class Table(Schedule):
    """A variance-preserving schedule given by `alpha_t^2` at whole timesteps, as diffusers keeps it (`alphas_cumprod`).

    Time t in [0, 1] is timestep `t (N - 1)`; between two, `alpha^2` is interpolated.

    Args:
        alphas_cumprod: N numbers, falling.
    """

    alphas_cumprod: Sequence[float]

    @classmethod
    def scaled_linear(cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Table:
        """The schedule of Stable Diffusion.

        Example:
            >>> Table.scaled_linear().alpha(torch.tensor([1.0])).square()
            tensor([0.0047])
        """
        roots = [start**0.5 + (end**0.5 - start**0.5) * i / (steps - 1) for i in range(steps)]
        return cls(tuple(accumulate((1 - root**2 for root in roots), mul)))  # plain numbers, on any device

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 0.0001, end: float = 0.02) -> Table:
        """The schedule of Ho et al. 2020, and of PixArt.

        Example:
            >>> Table.linear().alpha(torch.tensor([0.5])).square()
            tensor([0.0782])
        """
        betas = [start + (end - start) * i / (steps - 1) for i in range(steps)]
        return cls(tuple(accumulate((1 - beta for beta in betas), mul)))

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the sample."""
        return self._squared(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise."""
        return (1 - self._squared(t)).sqrt()

    def step_at(self, share: Tensor) -> Tensor:
        """The time of a whole timestep, for the schedulers of diffusers know no others: 999, 749, 499, 249 for 4 of 1000.

        Example:
            >>> (999 * Table.linear().step_at(0.625 * torch.tensor([1.0, 0.75, 0.5, 0.25]))).round().tolist()
            [624.0, 468.0, 312.0, 156.0]
        """
        count = len(self.alphas_cumprod)
        place = (count * share.double() - 1e-3).ceil() - 1  # what fp32 puts above a whole number is one
        return (place.clamp(0, count - 1) / (count - 1)).to(share.dtype)

    def _squared(self, t: Tensor) -> Tensor:
        table = torch.tensor(self.alphas_cumprod, device=t.device, dtype=t.dtype)
        place = t * (len(table) - 1)
        low = place.floor().clamp(0, len(table) - 2)
        rows = low.long()
        return torch.lerp(table[rows], table[rows + 1], place - low)
