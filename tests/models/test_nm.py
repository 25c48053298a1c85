"""N:M masks: exactly N of each M, and what they cost."""

import pytest
import torch
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.nn.nm import MaskedNM, ScaledNM, nm_bits, nm_mask, violations

PATTERNS = [(2, 4), (1, 8), (4, 8), (3, 4), (1, 1)]


def weights():
    rng = torch.Generator().manual_seed(0)
    return {"random": torch.randn(6, 24, generator=rng), "tied": torch.ones(6, 24), "zero": torch.zeros(6, 24)}


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kind", ["random", "tied", "zero"])
def test_exactly_n_of_each_m(n, m, kind):
    weight = weights()[kind]
    mask = nm_mask(weight, n, m)
    assert mask.view(6, -1, m).sum(-1).eq(n).all()
    assert violations(weight * mask, n, m) == 0


def test_the_largest_stay_and_scale_does_not_matter():
    weight = weights()["random"]
    mask = nm_mask(weight, 2, 4)
    kept = weight.abs().masked_fill(~mask, torch.inf).view(6, -1, 4).amin(-1)
    gone = weight.abs().masked_fill(mask, 0).view(6, -1, 4).amax(-1)
    assert (kept >= gone).all()
    assert nm_mask(3.7 * weight, 2, 4).equal(mask)
    assert nm_mask(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), 2, 4).tolist() == [[True, False, True, False]]


def test_groups_run_along_the_inputs_whatever_the_layout():
    weight = weights()["random"]
    assert nm_mask(weight.T, 2, 4, dim=0).equal(nm_mask(weight, 2, 4).T)
    filters = torch.randn(3, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    assert nm_mask(filters, 2, 4).flatten(1).equal(nm_mask(filters.flatten(1), 2, 4))


def test_pairs_stay_together():
    weight = weights()["random"]
    mask = nm_mask(weight, 4, 8, pairs=True)
    pairs = mask.view(6, -1, 4, 2)
    assert pairs[..., 0].equal(pairs[..., 1])
    assert pairs[..., 0].sum(-1).eq(2).all()
    norms = weight.view(6, -1, 4, 2).norm(dim=-1)
    assert nm_mask(norms.flatten(1), 2, 4).view(6, -1, 4).equal(pairs[..., 0])


def test_storage_counts_where_the_values_are():
    assert nm_bits(2, 4, 16) / (4 * 16) == 36 / 64
    assert nm_bits(2, 4, 8) / (4 * 8) == 20 / 32
    assert nm_bits(4, 8, 4, pairs=True) / (8 * 4) == 20 / 32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nm_mask(torch.ones(2, 6), 2, 4), "do not divide the inputs"),
        (lambda: nm_mask(torch.ones(2, 8), 5, 4), "no N:M pattern"),
        (lambda: nm_mask(torch.ones(2, 8), 0, 4), "no N:M pattern"),
        (lambda: nm_mask(torch.ones(2, 8), 1, 4, pairs=True), "even numbers"),
        (lambda: ScaledNM(torch.ones(2, 24), 1, 2, 4, blocks=5), "blocks of factors"),
        (lambda: ScaledNM(torch.ones(2, 24), 1, 2, 8, blocks=2), "blocks of factors"),
    ],
)
def test_numbers_that_do_not_fit_are_named(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_masked_weights_are_used_and_all_of_them_learn():
    weight = nn.Parameter(weights()["random"])
    masked = MaskedNM(weight.detach(), 1, 2, 4)
    used = masked(weight)
    assert used.equal(weight.detach() * masked.mask)
    used.backward(torch.full_like(weight, 2.0))
    assert weight.grad.eq(2).all()
    weight.grad = None
    fixed = MaskedNM(weight.detach(), 1, 2, 4, dense_gradient=False)
    fixed(weight).backward(torch.full_like(weight, 2.0))
    assert weight.grad.equal(2.0 * fixed.mask)


@pytest.mark.parametrize("dim", [1, 0])
def test_factors_scale_blocks_of_columns_and_fold_away(dim):
    weight = weights()["random"]
    weight = weight if dim else weight.T.contiguous()
    scaled = ScaledNM(weight, dim, 2, 4, blocks=2)
    assert scaled(weight).equal(weight)
    scaled.scale.data.copy_(torch.arange(1.0, 13.0).view(6, 2))
    plain, factors = (weight if dim else weight.T), scaled.scale.repeat_interleave(12, 1)
    folded = scaled.finalise(weight) if dim else scaled.finalise(weight).T
    torch.testing.assert_close(folded, plain * factors * nm_mask(plain, 2, 4))
    assert folded.ne(0).equal(nm_mask(plain, 2, 4))
    assert (scaled(weight) if dim else scaled(weight).T).equal(plain * factors)
