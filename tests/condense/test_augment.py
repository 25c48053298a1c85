"""Views as functions of keys: the same anywhere, differentiable, and what they keep."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data.augment import DSA, Mixing, Views, augment

ALL = (*DSA, "roll", "crop", "dsa")


def images(n=6, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_a_view_follows_from_its_key_alone(name):
    x, keys = images(), torch.arange(6)
    found = augment(x, keys, (name,))
    assert found.shape == x.shape
    assert augment(x[3:], keys[3:], (name,)).equal(found[3:])
    assert not found.equal(augment(x, keys + 100, (name,)))


@pytest.mark.parametrize("name", ALL)
def test_one_key_is_one_draw_for_all(name):
    x = images(1).expand(4, -1, -1, -1)
    found = augment(x, torch.tensor([3]), (name,))
    torch.testing.assert_close(found, found[:1].expand_as(found))


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_right(name):
    x = images(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, torch.arange(2), (name,)), (x,))


def test_rolling_keeps_every_pixel_and_shifting_brings_zeros():
    x, keys = images() + 1, torch.arange(6)
    rolled, shifted = augment(x, keys, ("roll",)), augment(x, keys, ("shift",))
    assert rolled.flatten(1).sort().values.equal(x.flatten(1).sort().values)
    assert (shifted == 0).any()
    for whole, seen in zip(x, shifted, strict=True):  # one way for the whole image
        ways = [whole.roll((dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert any(torch.where(seen == 0, way, seen).equal(way) for way in ways)
    assert ((shifted == 0) | torch.isin(shifted, x)).all()


def test_half_are_flipped():
    x = images(1).expand(2000, -1, -1, -1)
    flipped = (augment(x, torch.arange(2000), ("flip",)) != x).flatten(1).any(1).double().mean()
    assert 0.45 < flipped < 0.55


def test_one_of_six_is_drawn_by_the_key():
    x, keys = images(1).expand(600, -1, -1, -1), torch.arange(600)
    found = augment(x, keys, ("dsa",))
    each = {name: augment(x, keys, (name,)) for name in DSA}
    same = torch.stack([(found - there).flatten(1).abs().amax(1) == 0 for there in each.values()])  # [6, B]
    assert same.any(0).all()
    rows, ambiguous = (
        (found != x).flatten(1).any(1),
        same.sum(0) > 1,
    )  # a flip that is none looks like a shift by nothing
    shares = same[:, rows & ~ambiguous].double().sum(1) / 600
    assert shares[0] > 0.12
    assert shares.min() > 0.05  # half of the flips change nothing
    assert shares.max() < 0.22


@pytest.mark.parametrize("key", range(12))
def test_all_images_of_a_step_see_one_operation(key):
    x, keys = images(), torch.tensor([key])
    found = augment(x, keys, ("dsa",))
    assert any(found.equal(augment(x, keys, (name,))) for name in DSA)
    assert found.equal(augment(x, keys, ("dsa",)))
    assert found[2:].equal(augment(x[2:], keys, ("dsa",)))


def test_scales_and_shifts_reach_as_far_as_published():
    """DSA: factors uniform in [1 / 1.2, 1.2], shifts of up to an eighth of the size, rounded."""
    from limbeck.data.augment import _moved, _scale

    u = torch.tensor([[0.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(2, 1, 32, 32)
    middle = _scale(x, u)[:, 0, 16, 12:20] / x[:, 0, 16, 12:20]
    torch.testing.assert_close(middle[0].mean(), torch.tensor(1 / 1.2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(middle[1].mean(), torch.tensor(1.2).double(), atol=1e-6, rtol=0)
    for size, reach in ((8, 1), (32, 4), (64, 8), (224, 28)):
        image = torch.ones(1, 1, size, size)
        seen = _moved(image, torch.tensor([[0.0, 0.9999, 0.0, 0.0]]), cyclic=False)
        assert int((seen[0, 0].sum(1) == 0).sum()) == reach
        assert int((seen[0, 0].sum(0) == 0).sum()) == reach


def test_mixing_is_linear_in_targets():
    z, partner = torch.randn(4, 3), torch.tensor([1, 0, 3, 2])
    for share in (1.0, 0.3):
        total = Mixing(partner, share).targets(z) + Mixing(partner, 1 - share).targets(z)
        torch.testing.assert_close(total, z + z[partner])
    assert Mixing(partner, 1.0).samples(z).equal(z)


def test_a_boxs_area_is_the_partners_share():
    x = torch.zeros(8, 1, 16, 16)
    x[1::2] = 1
    shares = []
    for epoch in range(50):
        for _, see in Views(8, mixing="cutmix", seed=1).epoch(epoch, 8):
            mixed, mixing = see(x)
            own = x[:, 0, 0, 0]
            expected = mixing.share * own + (1 - mixing.share) * own[mixing.partner]
            torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
            shares.append(mixing.share)
    assert min(shares) < 0.3
    assert max(shares) > 0.9


def test_an_epoch_is_the_same_again_and_each_is_another():
    views = Views(4, ("shift",), "mixup", seed=3)
    x = torch.rand(10, 1, 8, 8)

    def seen(epoch):
        return [(rows.tolist(), see(x[rows])[0]) for rows, see in views.epoch(epoch, 10)]

    one, again, other = seen(0), seen(0), seen(1)
    assert all(a == b and p.equal(q) for (a, p), (b, q) in zip(one, again, strict=True))
    assert [r for r, _ in one] != [r for r, _ in other]
    assert sorted(row for rows, _ in one for row in rows) == list(range(10))


def test_a_last_sample_alone_joins_the_batch_before():
    assert [len(rows) for rows, _ in Views(4).epoch(0, 9)] == [4, 5]
    assert [len(rows) for rows, _ in Views(4).epoch(0, 1)] == [1]


def test_unknown_operations():
    with pytest.raises(UsageError, match="no such augmentation"):
        augment(images(), torch.arange(6), ("blur",))
