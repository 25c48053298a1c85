"""Generators of a few steps, and several denoisers as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from limbeck.core.errors import UsageError
from limbeck.diffusion.sampling import Noise, few_step
from limbeck.diffusion.schedule import Schedule


class Sampler(nn.Module):
    """A denoiser with the steps in which it makes samples: standard normal noise in, samples out.

    With a time it is the denoiser itself, so it can be trained as it is and run by `few_step` or `flow`; without, it takes all
    its steps. It says how it is to be used: a student that is saved, judged or exported as a `Sampler` samples in its steps.

    Args:
        denoiser: A `Denoiser`, or a module with `schedule` that is called as `(x_t, t, condition)`.
        times: Of the steps, falling, above 0; the first is where the noise lies.
        noise: What a step adds to the sample of the one before, see `few_step`.

    Raises:
        UsageError: Times are not falling, or the first is beyond the schedule's last, or the network says nothing there.

    Example:
        >>> from limbeck.diffusion import ring
        >>> fast = Sampler(ring(8), times=(0.99, 0.5))
        >>> fast(torch.randn(64, 2, generator=torch.Generator().manual_seed(0))).shape, fast.steps
        (torch.Size([64, 2]), 2)
    """

    times: Tensor

    def __init__(self, denoiser: nn.Module, times: Sequence[float], noise: Noise = "fresh") -> None:
        super().__init__()
        falling = all(a > b for a, b in pairwise(times))
        if not times or not falling or times[-1] <= 0 or noise not in ("fresh", "fixed", "ddim"):
            raise UsageError(
                "these are no steps from noise to samples", where="times, noise", found=f"{list(times)}, {noise}",
                expected="falling times above 0, and fresh | fixed | ddim",
            )  # fmt: skip
        schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
        if times[0] > schedule.last * (1 + 1e-6):
            raise UsageError(
                "the first step is beyond the schedule",
                where="times",
                found=times[0],
                expected=f"at most {schedule.last}",
            )
        schedule.check_beginning(getattr(denoiser, "prediction", None), float(times[0]))
        self.denoiser, self.noise = denoiser, noise
        self.register_buffer("times", torch.tensor([float(t) for t in times]), persistent=False)

    @property
    def schedule(self) -> Schedule:
        """The denoiser's."""
        schedule: Any = self.denoiser.schedule
        return schedule

    @property
    def null(self) -> Tensor | None:
        """The denoiser's empty condition."""
        null: Any = getattr(self.denoiser, "null", None)
        return null

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.times)

    def null_like(self, condition: Tensor) -> Tensor:
        """The empty condition, once for each sample of `condition` `[B, ...]`."""
        denoiser: Any = self.denoiser
        return denoiser.null_like(condition)

    def forward(
        self, x_t: Tensor, t: Tensor | None = None, condition: Tensor | None = None, expert: int | None = None
    ) -> Tensor:
        """`x_0` at times `[B]`, by one expert where it is named; without them samples, made of the noise `x_t` in all steps."""
        if t is not None:
            chosen = {} if expert is None else {"expert": expert}
            return self.denoiser(x_t, t=t, condition=condition, **chosen)
        return few_step(self.denoiser, x_t, self.schedule, self.times, condition, noise=self.noise)


class Experts(nn.Module):
    """Several denoisers as one: the time or the condition of a sample tells which of them answers.

    Args:
        experts: Denoisers of one schedule and one empty condition.
        bounds: By time: falling, one fewer than experts; expert k answers above `bounds[k]`, the last below all. Choose them
            between the times of steps, not at one.
        owners: By class: the expert of each class `[C]`; the empty condition and conditions beyond go to the first.

    Raises:
        UsageError: Neither or both are given, or they do not fit the experts.

    Example:
        >>> from limbeck.diffusion import GaussianMixture
        >>> ends = [GaussianMixture(torch.full((1, 2), v), 0.1) for v in (-1.0, 1.0)]
        >>> both = Experts(ends, bounds=(0.5,))
        >>> both(torch.zeros(2, 2), torch.tensor([0.9, 0.1]))[:, 0].sign()
        tensor([-1.,  1.])
    """

    bounds: Tensor | None
    owners: Tensor | None

    def __init__(
        self, experts: Sequence[nn.Module], bounds: Sequence[float] | None = None, owners: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        fits = bounds is not None and len(bounds) == len(experts) - 1 and sorted(bounds, reverse=True) == list(bounds)
        named = owners is not None and set(owners) == set(range(len(experts)))
        if (bounds is None) == (owners is None) or not (fits or named):
            raise UsageError(
                "it is not clear which expert answers", where="bounds, owners", found=f"{bounds}, {owners}",
                expected=f"{len(experts) - 1} falling times, or an expert of {len(experts)} for each class",
            )  # fmt: skip
        self.experts = nn.ModuleList(experts)
        self.register_buffer("bounds", None if bounds is None else torch.tensor(bounds), persistent=False)
        self.register_buffer("owners", None if owners is None else torch.tensor(owners), persistent=False)

    @property
    def schedule(self) -> Schedule:
        """The schedule of all."""
        first: Any = self.experts[0]
        return first.schedule

    @property
    def null(self) -> Tensor | None:
        """The empty condition of all."""
        null: Any = getattr(self.experts[0], "null", None)
        return null

    def null_like(self, condition: Tensor) -> Tensor:
        """The empty condition, once for each sample of `condition` `[B, ...]`."""
        first: Any = self.experts[0]
        return first.null_like(condition)

    def route(self, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Which expert answers each sample `[B]`, for times and conditions `[B]`.

        Raises:
            UsageError: Experts have classes of their own, and conditions are no class numbers.
        """
        if self.bounds is not None:
            return (t[:, None] <= self.bounds.to(t)).sum(1)
        assert self.owners is not None
        if condition is not None and condition.ndim != 1:
            raise UsageError(
                "experts by class know no embeddings", where="condition", found=list(condition.shape),
                expected="class numbers [B]", fix="give experts bounds in time, or class numbers as conditions",
            )  # fmt: skip
        if condition is None:
            return torch.zeros(len(t), dtype=torch.int64, device=t.device)
        inside = condition < len(self.owners)
        return torch.where(inside, self.owners[condition.clamp(max=len(self.owners) - 1)], 0)

    def forward(
        self, x_t: Tensor, t: Tensor | None = None, condition: Tensor | None = None, expert: int | None = None
    ) -> Tensor:
        """`x_0` of each sample by its own expert, or of all by the one that is named, which spares reading the times."""
        x_t, t = self.schedule.from_noise(x_t, t)
        if expert is not None:
            return self.experts[expert](x_t, t=t, condition=condition)
        chosen = self.route(t, condition)
        found = shares(chosen, len(self.experts))
        if len(found) == 1:
            return self.experts[found[0][0]](x_t, t=t, condition=condition)
        parts = []
        for k, rows in found:
            own = None if condition is None else condition[rows]
            parts.append(self.experts[k](x_t[rows], t=t[rows], condition=own))
        return torch.cat(parts)[torch.cat([rows for _, rows in found]).argsort()]


def shares(chosen: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """The rows of each of `count` experts that some samples `[B]` chose; in a plan, which has no values, equal shares.

    Example:
        >>> shares(torch.tensor([2, 0, 2]), 3)
        [(0, tensor([1])), (2, tensor([0, 2]))]
    """
    if is_fake(chosen):
        parts = torch.arange(len(chosen), device=chosen.device).tensor_split(count)
        return [(k, rows) for k, rows in enumerate(parts) if len(rows)]
    return [(k, (chosen == k).nonzero()[:, 0]) for k in chosen.unique().tolist()]
