"""Families: measured, picked by budget, saved and loaded."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from limbeck.convert.record import save_student
from limbeck.core.errors import UsageError
from limbeck.data import TensorSource
from limbeck.family import Family
from limbeck.nn.elastic import Elastic, MakeElastic
from limbeck.nn.space import Space

SPACE = Space({"0.channels": (4, 8, 16), "3.channels": (4, 16)})
SOURCE = TensorSource(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


@pytest.fixture(scope="module")
def family():
    return Family.of(Elastic(net(), SPACE), SOURCE, SOURCE, count=6)


def test_members_are_counted_as_they_are(family):
    assert len(family.members) == 6
    assert [m.parameters for m in family.members] == sorted(m.parameters for m in family.members)
    for member in family.members:
        small = family.module(member.arch)
        assert member.parameters == sum(p.numel() for p in small.parameters())
        assert member.latency > 0
        assert member.metric == "top1"
    a, b = family.members[-1].arch["0.channels"], family.members[-1].arch["3.channels"]
    assert family.members[-1].flops == 2 * (6 * a + a * b + b * 3)


def test_what_is_picked_is_the_best_within_the_budget(family):
    limit = family.members[3].parameters
    small, member = family.pick(parameters=limit)
    fitting = [m for m in family.members if m.parameters <= limit]
    assert member.quality == max(m.quality for m in fitting)
    assert sum(p.numel() for p in small.parameters()) == member.parameters
    assert family.pick()[1].quality == max(m.quality for m in family.members)
    assert family.pick(flops=family.members[0].flops)[1].flops <= family.members[0].flops


def test_its_statistics_are_its_own_and_the_models_stay(family):
    before = family.elastic.model[1].running_mean.clone()
    small, _ = family.pick(parameters=family.members[0].parameters)
    x = SOURCE.batch(torch.arange(60), 0).x
    torch.testing.assert_close(small[1].running_mean, small[0](x).mean(0), rtol=1e-4, atol=1e-5)
    assert family.elastic.model[1].running_mean.equal(before)


def test_the_front_is_not_beaten(family):
    front = family.front()
    assert front
    for a, b in pairwise(front):
        assert a.flops < b.flops
        assert a.quality < b.quality


def test_a_family_comes_back(family, tmp_path):
    elastic, record = MakeElastic(SPACE)(net())
    save_student(tmp_path, elastic, [record])
    family.save(tmp_path)
    again = Family.load(tmp_path, SOURCE, net())
    assert again.members == list(family.members)
    x = torch.ones(1, 6)
    assert again.pick(parameters=200)[0](x).shape == (1, 3)
    with pytest.raises(UsageError, match="need data"):
        Family.load(tmp_path, module=net()).pick()


def test_what_is_not_there_is_said(family, tmp_path):
    with pytest.raises(UsageError, match="within the budget"):
        family.pick(parameters=10)
    with pytest.raises(UsageError, match="not timed"):
        Family.of(Elastic(net(), SPACE), SOURCE, count=2, latency=False).pick(latency=1.0)
    with pytest.raises(UsageError, match="no elastic model"):
        Family.of(net(), SOURCE)
    elastic, record = MakeElastic(Space({"0.channels": (4, 8)}))(net())
    save_student(tmp_path, elastic, [record])
    with pytest.raises(UsageError, match="not measured"):
        Family.load(tmp_path, SOURCE, net())
    family.save(tmp_path)
    with pytest.raises(UsageError, match="another space"):
        Family.load(tmp_path, SOURCE, net())
