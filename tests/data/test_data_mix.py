"""MixDistribution: what it does to means and deviations, exactly."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data.mix import mix_distribution, symmetric_beta


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.rand(5, 3, 7, 6, generator=seeded(), dtype=torch.float64) * torch.tensor([0.2, 1.0, 3.0]).view(1, 3, 1, 1)
PARTNER = torch.tensor([3, 0, 4, 1, 2])


def moments(x):
    return x.mean((2, 3)), (x.var((2, 3)) + 1e-6).sqrt()


def test_weight_one_and_being_ones_own_partner_change_nothing():
    own = torch.arange(5)
    for found in (mix_distribution(X, weight=torch.ones(5)), mix_distribution(X, partner=own, generator=seeded())):
        torch.testing.assert_close(found, X, rtol=0, atol=1e-6)


def test_the_mean_is_mixed_and_the_content_stays():
    weight = torch.linspace(0, 1, 5, dtype=torch.float64)
    found = mix_distribution(X, weight=weight, partner=PARTNER)
    (mean, deviation), (new_mean, _) = moments(X), moments(found)
    w = weight[:, None]
    torch.testing.assert_close(new_mean, w * mean + (1 - w) * mean[PARTNER])
    scale = w * deviation + (1 - w) * deviation[PARTNER]
    content = (found - new_mean[..., None, None]) / scale[..., None, None]
    torch.testing.assert_close(content, (X - mean[..., None, None]) / deviation[..., None, None])


def test_weight_zero_takes_the_partners_style():
    found = moments(mix_distribution(X, weight=torch.zeros(5), partner=PARTNER))
    for new, old in zip(found, moments(X), strict=True):
        torch.testing.assert_close(new, old[PARTNER], rtol=1e-4, atol=1e-6)  # the epsilon


def test_scaling_channels_before_or_after_is_the_same():
    """So images may be normalised already; the epsilon alone tells them apart."""
    scale, shift = torch.tensor([4.0, 0.5, 2.0]).view(3, 1, 1), torch.tensor([1.0, -2.0, 0.3]).view(3, 1, 1)
    mixed = mix_distribution(X, generator=seeded(1))
    again = mix_distribution(X * scale + shift, generator=seeded(1))
    torch.testing.assert_close(again, mixed * scale + shift, rtol=1e-3, atol=1e-3)


def test_a_constant_image_stays_finite_and_the_draws_follow_the_generator():
    x = X.clone()
    x[0] = 0.5
    found = mix_distribution(x, generator=seeded(2))
    assert found.isfinite().all()
    assert torch.equal(found, mix_distribution(x, generator=seeded(2)))
    assert not torch.equal(found, mix_distribution(x, generator=seeded(3)))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 4.0])
def test_the_weights_are_of_the_beta_distribution(alpha):
    draws = symmetric_beta(alpha, 50_000, generator=seeded(4)).double()
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    fourth = (draws - 0.5).pow(4).mean().item()  # 3 / (16 (2a + 1) (2a + 3))
    assert fourth == pytest.approx(3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), rel=0.04)


@pytest.mark.parametrize(
    ("x", "alpha"),
    [(torch.rand(3, 4), 0.1), (torch.rand(2, 3, 1, 1), 0.1), (torch.ones(2, 3, 4, 4).long(), 0.1), (X, 0.0)],
)
def test_what_it_refuses(x, alpha):
    with pytest.raises(UsageError):
        mix_distribution(x, alpha=alpha)
