"""Games of a generator and a discriminator: values at zero, relations between the games, penalties by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import UsageError
from limbeck.losses.adversarial import discriminator_loss, generator_loss, gradient_penalty

REAL, FAKE = torch.tensor([-3.0, 0.2, 2.0]), torch.tensor([0.5, -4.0, 1.0])


def test_at_scores_of_zero():
    zero = torch.zeros(3)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero, "hinge").item() == 2


def test_softplus_is_cross_entropy():
    entropy = F.binary_cross_entropy_with_logits
    expected = entropy(REAL, torch.ones(3)) + entropy(FAKE, torch.zeros(3))
    torch.testing.assert_close(discriminator_loss(REAL, FAKE), expected)
    torch.testing.assert_close(generator_loss(FAKE), entropy(FAKE, torch.ones(3)))


def test_wgan_is_the_hinge_less_two():
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, "wgan") + 2, discriminator_loss(REAL, FAKE, "hinge"))


def test_maps_of_scores_are_averaged_over_places():
    maps = torch.randn(3, 4, 4)
    each = generator_loss(maps, "hinge", "none")
    torch.testing.assert_close(each, -maps.flatten(1).mean(1))


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_penalty_of_a_linear_map(target):
    x, w = torch.randn(5, 3, requires_grad=True), torch.tensor([1.0, 2.0, 2.0], requires_grad=True)
    loss = gradient_penalty(x @ w, x, target)
    assert loss.item() == pytest.approx((3 - target) ** 2, rel=1e-4)
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * (3 - target) * w.detach() / 3, rtol=1e-4, atol=1e-5)


def test_unknown_games():
    with pytest.raises(UsageError, match="unknown game"):
        generator_loss(FAKE, "chess")
