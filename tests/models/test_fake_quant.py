"""Fake quantisers: the grid, the gradient, and that a sparse weight stays sparse."""

import pytest
import torch
from torch import nn

from limbeck.convert.parametrized import Finalise, Parametrize
from limbeck.convert.record import load_student, save_student
from limbeck.core.errors import UsageError
from limbeck.nn.fake_quant import FakeQuant, quantised_bits
from limbeck.nn.mlp import mlp
from limbeck.nn.nm import nm_mask, violations

W = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
KINDS = [(g, s) for g in ("tensor", "channel", "bucket") for s in (True, False)]


def groups(weight, granularity, bucket=32):
    if granularity == "tensor":
        return [weight.flatten()]
    return list(weight) if granularity == "channel" else list(weight.flatten().split(bucket))


@pytest.mark.parametrize(("granularity", "symmetric"), KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_values_near_the_weight(granularity, symmetric, bits):
    quant = FakeQuant(W, 1, bits, granularity, bucket=32, symmetric=symmetric)
    found = quant(W)
    for w, q in zip(groups(W, granularity), groups(found, granularity), strict=True):
        assert len(q.unique()) <= 2**bits
        step = 2 * w.abs().max() / (2**bits - 2) if symmetric else (w.max() - w.min()) / (2**bits - 1)
        assert ((w - q).abs() <= step / 2 * 1.001).all()
        if not symmetric:
            torch.testing.assert_close((q.min(), q.max()), (w.min(), w.max()))
    torch.testing.assert_close(quant(found), found)  # what is on the grid stays there
    torch.testing.assert_close(quant.finalise(W), found, rtol=0, atol=0)


def test_the_gradient_goes_straight_through():
    weight = nn.Parameter(W.clone())
    upstream = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    for granularity, symmetric in KINDS:
        weight.grad = None
        FakeQuant(W, 1, 3, granularity, 32, symmetric)(weight).backward(upstream)
        torch.testing.assert_close(weight.grad, upstream)


def test_groups_follow_the_layout():
    assert FakeQuant(W.T, 0, 4)(W.T).equal(FakeQuant(W, 1, 4)(W).T)
    filters = W.view(6, 10, 2, 2)
    assert FakeQuant(filters, 1, 4)(filters).flatten(1).equal(FakeQuant(W, 1, 4)(W))


def test_equal_weights_and_short_ones_are_no_trouble():
    for granularity, symmetric in KINDS:
        for weight in (torch.full((2, 5), 0.3), torch.zeros(3, 3), torch.ones(1, 1)):
            found = FakeQuant(weight, 1, 4, granularity, 4, symmetric)(weight)
            torch.testing.assert_close(found, weight)


def test_what_fills_up_a_bucket_changes_nothing():
    one = FakeQuant(W, 1, 4, "bucket", 64, False)(W)
    last = W.flatten()[192:]
    expected = FakeQuant(last[None], 1, 4, "tensor", 64, False)(last[None])[0]
    torch.testing.assert_close(one.flatten()[192:], expected)


def test_sparse_then_quantised_keeps_the_pattern(tmp_path):
    torch.manual_seed(0)
    net = mlp(8, 16, 3)
    sparse, first = Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4}, include=["0"])(net)
    both, second = Parametrize("limbeck.nn.fake_quant:FakeQuant", {"bits": 8}, include=["*"])(sparse)
    plain, third = Finalise()(both)
    x = torch.randn(4, 8)
    assert plain(x).equal(both(x))
    assert violations(plain[0].weight, 2, 4) == 0
    assert plain[0].weight.ne(0).logical_and(~nm_mask(net[0].weight, 2, 4)).sum() == 0
    assert all(len(row.unique()) <= 255 for row in plain[2].weight)
    save_student(tmp_path, plain, [first, second, third])
    assert load_student(tmp_path, mlp(8, 16, 3))(x).equal(plain(x))


def test_storage_counts_scales():
    weight = torch.ones(4, 300)
    assert quantised_bits(weight, 8) == 1200 * 8 + 4 * 32
    assert quantised_bits(weight, 8, dim=0) == 1200 * 8 + 300 * 32
    assert quantised_bits(weight, 4, granularity="bucket", symmetric=False) == 1200 * 4 + 5 * 64
    assert quantised_bits(weight, 4, granularity="tensor") == 4832


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 20}, {"granularity": "row"}, {"bucket": 0}])
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(UsageError):
        FakeQuant(W, 1, **options)
