import math

import pytest
import torch
from scipy import stats

from limbeck.core.errors import UsageError
from limbeck.evaluate.compare import bootstrap_interval, interval, mean_deviation, paired_interval, t_quantile
from limbeck.evaluate.pareto import pareto_front


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 501])
def test_t_quantile_equals_scipy(level, freedom):
    assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-10)


def test_paired_interval_equals_scipy():
    a, b = [0.91, 0.93, 0.90, 0.94, 0.92], [0.90, 0.91, 0.91, 0.92, 0.90]
    ours, expected = paired_interval(a, b, level=0.9), stats.ttest_rel(a, b).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    assert (ours.level, ours.count) == (0.9, 5)


def test_intervals_cover_as_often_as_they_say():
    draw = torch.Generator().manual_seed(0)
    five = torch.randn(1000, 5, generator=draw).tolist()
    many = torch.randn(200, 60, generator=draw).tolist()
    t = sum(i.low <= 0 <= i.high for i in map(interval, five)) / len(five)
    zeros = [0.0] * 60
    boot = [bootstrap_interval(row, zeros, draws=400) for row in many]
    assert t == pytest.approx(0.95, abs=0.02)
    assert sum(i.low <= 0 <= i.high for i in boot) / len(boot) == pytest.approx(0.95, abs=0.04)


def test_equal_arms_have_no_difference():
    result = paired_interval([0.5, 0.7], [0.5, 0.7])
    assert (result.mean, result.low, result.high) == (0, 0, 0)
    assert not result.above(0)
    assert not result.below(0)


def test_bootstrap_is_a_function_of_its_seed():
    a, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).tolist()
    first, again, other = (bootstrap_interval(a, b, draws=200, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_mean_deviation_of_one_value_has_no_spread():
    mean, deviation = mean_deviation([3.0])
    assert mean == 3
    assert math.isnan(deviation)


@pytest.mark.parametrize(
    ("a", "b", "level", "what"),
    [
        ([1.0], [2.0], 0.95, "spread"),
        ([1.0, 2.0], [1.0], 0.95, "differ in number"),
        ([1.0, math.nan], [1.0, 2.0], 0.95, "finite"),
        ([1.0, 2.0], [1.0, 2.0], 95, "between 0 and 1"),
    ],
)
def test_bad_pairs_are_refused(a, b, level, what):
    for function in (paired_interval, bootstrap_interval):
        with pytest.raises(UsageError, match=what):
            function(a, b, level=level)


def test_pareto_front_equals_its_definition():
    values = torch.randint(6, (60, 3), generator=torch.Generator().manual_seed(0)).tolist()
    points = [{"quality": q, "bytes": b, "seconds": s} for q, b, s in values]

    def beats(p, q):
        better = [p["quality"] - q["quality"], q["bytes"] - p["bytes"], q["seconds"] - p["seconds"]]
        return min(better) >= 0 and max(better) > 0

    expected = [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]
    assert pareto_front(points, maximise=["quality"], minimise=["bytes", "seconds"]) == expected


def test_pareto_front_keeps_equals_and_drops_nan():
    points = [{"q": 1.0}, {"q": 1.0}, {"q": math.nan}, {"q": 0.5}]
    assert pareto_front(points, maximise=["q"]) == [0, 1]
    assert pareto_front([], maximise=["q"]) == []


def test_pareto_front_names_what_is_missing():
    with pytest.raises(UsageError, match="bytes"):
        pareto_front([{"q": 1.0}], maximise=["q"], minimise=["bytes"])
    with pytest.raises(UsageError, match="at least one quantity"):
        pareto_front([{"q": 1.0}])
