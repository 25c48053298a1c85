"""Gaussian posteriors: the penalty against an integral, its memory, and divergences in closed form."""

import math

import pytest
import torch

from limbeck.losses.independence import gaussian_kl, group_distance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def density(z, mean, logvar):
    return (-((z - mean) ** 2) / (2 * logvar.exp())).exp() / (2 * math.pi * logvar.exp()).sqrt()


def test_the_penalty_is_an_integral():
    mean, logvar, groups = normal(9, 1), 0.5 * normal(9, 1, seed=1), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1])
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    every = density(z, mean, logvar).mean(0)
    expected, square = 0.0, torch.trapezoid(every**2, z)
    for g in range(3):
        own = density(z, mean[groups == g], logvar[groups == g]).mean(0)
        expected += (groups == g).double().mean() ** 2 * torch.trapezoid((own - every) ** 2, z)
    found = group_distance(mean, logvar, groups, 3, normalise=False)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(group_distance(mean, logvar, groups, 3), expected / square, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_pairs_in_parts_are_the_same_penalty_and_gradient(normalise):
    groups, found = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1]), []
    for chunk in (512, 2):
        mean, logvar = normal(9, 3).requires_grad_(), (0.5 * normal(9, 3, seed=1)).requires_grad_()
        loss = group_distance(mean, logvar, groups, 3, normalise=normalise, chunk=chunk)
        found.append([loss.detach(), *torch.autograd.grad(loss, (mean, logvar))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][1].abs().max() > 1e-4


def test_the_gradient_of_the_penalty_is_that_of_differences():
    mean, logvar, groups = (
        normal(5, 2).requires_grad_(),
        normal(5, 2, seed=1).requires_grad_(),
        torch.tensor([0, 1, 1, 0, 1]),
    )
    for normalise in (True, False):
        assert torch.autograd.gradcheck(
            lambda m, v, n=normalise: group_distance(m, v, groups, 2, normalise=n), (mean, logvar)
        )


def test_the_penalty_of_two_points_is_told_by_hand():
    """Two groups of one Gaussian each, d apart: 1/8 of the integral of (p_1 - p_2)^2 in all."""
    d, z = 1.7, 3
    mean = torch.zeros(2, z).double()
    mean[1, 0] = d
    logvar = torch.full((2, z), math.log(0.8), dtype=torch.float64)
    own = (4 * math.pi * 0.8) ** (-z / 2)
    expected = 2 * 0.25 * 0.25 * (2 * own - 2 * own * math.exp(-(d**2) / (4 * 0.8)))
    found = group_distance(mean, logvar, torch.tensor([0, 1]), 2, normalise=False)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_the_penalty_is_zero_for_equal_groups_and_does_not_know_their_names():
    mean, logvar, groups = normal(8, 3), 0.3 * normal(8, 3, seed=1), torch.tensor([0, 1] * 4)
    same = torch.tensor([0] * 8 + [1] * 8)
    twice = group_distance(torch.cat([mean, mean]), torch.cat([logvar, logvar]), same, 2)
    assert twice.item() == pytest.approx(0, abs=1e-12)
    found = group_distance(mean, logvar, groups, 2)
    assert found > 0
    torch.testing.assert_close(group_distance(mean, logvar, 1 - groups, 2), found)
    torch.testing.assert_close(group_distance(mean, logvar, groups, 5), found)  # three are missing
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_distance(mean[order], logvar[order], groups[order], 2), found)


def test_one_group_alone_is_no_penalty_and_has_a_finite_gradient():
    mean = normal(5, 2).requires_grad_()
    loss = group_distance(mean, torch.zeros(5, 2).double(), torch.ones(5, dtype=torch.int64), 2)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    (g,) = torch.autograd.grad(loss, mean)
    assert g.isfinite().all()


def test_many_latents_do_not_underflow():
    mean, groups = normal(20, 64).float(), torch.arange(20) % 2
    found = group_distance(mean, torch.zeros(20, 64), groups, 2)
    assert 0.01 < found < 2
    assert group_distance(mean, torch.zeros(20, 64), groups, 2, normalise=False) < 1e-30


def test_divergences_have_closed_forms():
    mean, other = normal(4, 3), normal(4, 3, seed=1)
    zero = torch.zeros(4, 3).double()
    assert gaussian_kl(mean, zero, mean, zero).item() == 0
    torch.testing.assert_close(gaussian_kl(mean, zero, other, zero), 0.5 * (mean - other).square().sum(1).mean())
    c = 2.5
    logs = torch.full((4, 3), math.log(c)).double()
    assert gaussian_kl(mean, logs, mean, zero).item() == pytest.approx(1.5 * (c - 1 - math.log(c)))
    p = torch.distributions.Normal(mean, (0.5 * logs).exp())
    q = torch.distributions.Normal(other, torch.ones(4, 3).double())
    expected = torch.distributions.kl_divergence(p, q).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, logs, other, zero, reduction="none"), expected)
    standard = gaussian_kl(mean, logs)
    torch.testing.assert_close(standard, gaussian_kl(mean, logs, zero, zero))


def test_pairs_in_parts_are_not_kept_for_the_way_back():
    """What autograd stores of 64 rows grows with rows, not with pairs, when they are taken 8 at a time."""
    largest = {}
    for n, chunk in ((64, 64), (64, 8)):
        sizes = []

        def note(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        mean, logvar = normal(n, 3).requires_grad_(), normal(n, 3, seed=1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            group_distance(mean, logvar, torch.arange(n) % 2, 2, chunk=chunk)
        largest[chunk] = max(sizes)
    assert largest[64] >= 64 * 64 * 3
    assert largest[8] <= 64 * 3
