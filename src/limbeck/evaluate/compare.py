"""Means, spreads and confidence intervals over seeds or samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Args:
        mean: The estimate.
        low: Lower end.
        high: Upper end.
        level: Confidence level, such as 0.95.
        count: Values (or pairs) it rests on.

    Example:
        >>> interval = paired_interval([0.92, 0.94, 0.93], [0.90, 0.91, 0.90])
        >>> interval.above(0), interval.below(0)
        (True, False)
        >>> print(interval)
        +0.02667 [+0.01232, +0.04101]
    """

    mean: float
    low: float
    high: float
    level: float
    count: int

    def above(self, value: float) -> bool:
        """Whether the whole interval lies above `value`."""
        return self.low > value

    def below(self, value: float) -> bool:
        """Whether the whole interval lies below `value`."""
        return self.high < value

    def __str__(self) -> str:
        return f"{self.mean:+.4g} [{self.low:+.4g}, {self.high:+.4g}]"


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator).

    Args:
        values: At least one number.

    Returns:
        Mean and deviation; the deviation of a single value is NaN, as it has none.

    Example:
        >>> mean_deviation([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    t = torch.as_tensor(values, dtype=torch.float64)
    return t.mean().item(), t.std().item() if len(t) > 1 else math.nan


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t confidence interval of a mean: `mean +- t s / sqrt(n)`, n - 1 degrees of freedom.

    Args:
        values: One number per seed, at least two.
        level: Confidence level in (0, 1).

    Raises:
        UsageError: Fewer than two values, one that is not finite, or a level outside (0, 1).

    Example:
        >>> print(interval([1.0, 2.0, 3.0]))
        +2 [-0.4841, +4.484]
    """
    _check(values, level)
    mean, deviation = mean_deviation(values)
    margin = t_quantile(level, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - margin, mean + margin, level, len(values))


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t confidence interval of the mean of `a - b`, paired by position (one pair per seed).

    Exact for normal differences at any number of seeds; what a handful of seeds needs.

    Args:
        a: One number per seed.
        b: The other arm, with the same seeds in the same order.
        level: Confidence level in (0, 1).

    Raises:
        UsageError: The lengths differ, there are fewer than two pairs, or a value is not finite.

    Example:
        >>> print(paired_interval([0.92, 0.94, 0.93], [0.90, 0.91, 0.90]))
        +0.02667 [+0.01232, +0.04101]
    """
    return interval(_differences(a, b), level)


def bootstrap_interval(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of `a - b`, paired by position (one pair per test sample).

    For many pairs of any distribution, such as per-sample hits of two models; too narrow for fewer than about twenty.

    Args:
        a: One number per sample.
        b: The other model on the same samples in the same order.
        level: Confidence level in (0, 1).
        draws: Resamples.
        seed: Of the resampling.

    Raises:
        UsageError: The lengths differ, there are fewer than two pairs, or a value is not finite.

    Example:
        >>> print(bootstrap_interval([1.0] * 60 + [0.0] * 40, [1.0] * 40 + [0.0] * 60))
        +0.2 [+0.13, +0.28]
    """
    difference = _differences(a, b)
    _check(difference, level)
    values, generator = torch.tensor(difference, dtype=torch.float64), torch.Generator().manual_seed(seed)
    # One draw at a time keeps memory at [N], however many samples there are.
    means = torch.stack(
        [values[torch.randint(len(values), values.shape, generator=generator)].mean() for _ in range(draws)]
    )
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(values.mean().item(), low, high, level, len(values))


def t_quantile(level: float, freedom: int) -> float:
    """The t for which `P(|T| <= t) = level`, for Student's distribution.

    The probability is a finite sum in the angle `atan(t / sqrt(n))` (Abramowitz and Stegun, Handbook of Mathematical
    Functions, 26.7.3 and 26.7.4), inverted by bisection.

    Args:
        level: Probability in (0, 1).
        freedom: Degrees of freedom n, >= 1.

    Example:
        >>> round(t_quantile(0.95, 4), 4)
        2.7764
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_probability(middle, freedom) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _t_probability(angle: float, freedom: int) -> float:
    """`P(|T| <= sqrt(n) tan(angle))`."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (i - 1) / i
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if len(a) != len(b):
        raise UsageError("paired values differ in number", found=f"{len(a)} and {len(b)}", fix="use the same seeds")
    return [x - y for x, y in zip(a, b, strict=True)]


def _check(values: Sequence[float], level: float) -> None:
    if len(values) < 2:
        raise UsageError("an interval needs a spread", found=f"{len(values)} value", expected="two or more seeds")
    if bad := [v for v in values if not math.isfinite(v)]:
        raise UsageError("an interval needs finite values", found=bad)
    if not 0 < level < 1:
        raise UsageError("a confidence level lies between 0 and 1", where="level", found=level)
