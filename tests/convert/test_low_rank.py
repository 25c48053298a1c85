"""Low-rank factors: nearest by the singular values, or on the inputs that count."""

import pytest
import torch
from torch import nn

from limbeck.convert.low_rank import LowRank, LowRankLinear, MergeLowRank, factors, grams_of
from limbeck.convert.parametrized import Finalise, Parametrize
from limbeck.convert.record import load_student, save_student
from limbeck.convert.slicing import Slice
from limbeck.core.errors import UsageError
from limbeck.nn.nm import violations

X = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.05, 3, 16))
W = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def test_full_rank_is_the_weight_and_the_error_is_the_tail():
    left, right = factors(W, 12)
    torch.testing.assert_close(left @ right, W, rtol=0, atol=1e-5)
    s = torch.linalg.svdvals(W)
    for rank in (1, 4, 9):
        left, right = factors(W, rank)
        torch.testing.assert_close((W - left @ right).square().sum(), s[rank:].square().sum())
        torch.testing.assert_close(left.square().sum(0), right.square().sum(1))  # split evenly


def test_on_given_inputs_the_error_is_the_least_there_is():
    gram = X.T @ X
    for rank in (2, 6):
        plain, white = (X @ (W - left @ right).T for left, right in (factors(W, rank), factors(W, rank, gram)))
        s = torch.linalg.svdvals(X @ W.T)  # of outputs: no matrix of this rank is nearer
        torch.testing.assert_close(white.square().sum(), s[rank:].square().sum(), rtol=1e-3, atol=1e-3)
        assert white.square().sum() < plain.square().sum()


def test_grams_are_of_the_inputs_of_each_layer():
    model = net().train()
    grams = grams_of(model, X.split(64), ["0", "2"])
    torch.testing.assert_close(grams["0"], X.T @ X)
    inner = model[:2](X)
    torch.testing.assert_close(grams["2"], inner.T @ inner)
    assert model.training
    thin, _ = LowRank(rank=4, grams=grams)(model)
    coarse, _ = LowRank(rank=4)(model)
    assert (thin[0](X) - model[0](X)).norm() < (coarse[0](X) - model[0](X)).norm()


def test_ranks_follow_the_ratio_and_layers_that_gain_nothing_stay():
    thin, record = LowRank(ratio=2.0, include=["*"])(net())
    assert record["ranks"] == {"0": 5, "2": 5, "4": 1}
    assert isinstance(thin[0], LowRankLinear)
    assert sum(p.numel() for p in thin[0].parameters()) == 5 * (16 + 32) + 32
    same, _ = LowRank(rank=3, include=["*"])(net())
    assert isinstance(same[4], nn.Linear)  # 3 x (16 + 3) is more than 16 x 3
    with pytest.raises(UsageError, match="becomes smaller"):
        LowRank(ratio=0.5)(net())
    with pytest.raises(UsageError, match="Gram"):
        LowRank(grams={"0": torch.eye(3)})(net())


def test_factors_are_multiplied_out_again():
    thin, _ = LowRank(ratio=2.0)(net())
    dense, record = MergeLowRank()(thin)
    torch.testing.assert_close(dense(X), thin(X), rtol=1e-5, atol=1e-5)
    assert [type(part) for part in dense] == [type(part) for part in net()]
    assert record["paths"] == ["0", "2"]
    with pytest.raises(UsageError, match="nothing to merge"):
        MergeLowRank()(dense)


def test_sliced_then_low_rank_then_sparse_comes_back(tmp_path):
    one, first = Slice({"0.channels": 24})(net())
    two, second = LowRank(rank=8)(one)
    three, third = Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4}, include=["*.first", "*.second"])(two)
    four, fourth = Finalise()(three)
    assert four(X).equal(three(X))
    assert violations(four[0].second.weight, 2, 4) == 0
    five, fifth = MergeLowRank()(four)
    for name, student, records in (
        ("unfinished", three, [first, second, third]),
        ("sparse", four, [first, second, third, fourth]),
        ("merged", five, [first, second, third, fourth, fifth]),
    ):
        save_student(tmp_path / name, student, records)
        assert load_student(tmp_path / name, net())(X).equal(student.eval()(X))
