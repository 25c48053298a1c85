"""Exact teachers, the objectives at truth, and distances with a known answer."""

import math

import pytest
import torch
from torch.func import jacrev, vmap

from limbeck.core.errors import UsageError
from limbeck.diffusion import (
    EDM,
    Cosine,
    GaussianMixture,
    RectifiedFlow,
    dmd_gradient,
    grid,
    ring,
    scattered,
    sid_loss,
    surrogate,
)
from limbeck.evaluate import samples

G = torch.Generator().manual_seed(0)
SCHEDULES = {"cosine": Cosine(), "flow": RectifiedFlow(), "edm": EDM()}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def uneven(schedule):
    means = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stds, weights = torch.tensor([0.2, 0.5, 1.0, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 1.0, 0.5])
    return GaussianMixture(means, stds.double(), schedule, weights.double(), labels=[0, 0, 1, 2, 2])


@every
@pytest.mark.parametrize("label", [None, 0, 1, 3])
def test_score_and_jacobian_are_those_of_the_density(schedule, label):
    teacher = uneven(schedule)
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    x = 2 * torch.randn(7, 3, generator=G, dtype=torch.float64)
    c = None if label is None else torch.full((7,), label)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(teacher.log_prob(x, t, c).sum(), x)
    torch.testing.assert_close(teacher.score(x, t, c), slope)
    one = lambda x, t: teacher(x[None], t[None], None if c is None else c[:1])[0]  # noqa: E731
    torch.testing.assert_close(teacher.jacobian(x.detach(), t, c), vmap(jacrev(one))(x.detach(), t))


@every
def test_in_many_dimensions_too(schedule):
    teacher = scattered(64, 10, 0.3, schedule).double()
    t, c = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor([3, 7])
    x = torch.randn(2, 64, generator=G, dtype=torch.float64).requires_grad_()
    for own in (None, c):
        (slope,) = torch.autograd.grad(teacher.log_prob(x, t, own).sum(), x)
        torch.testing.assert_close(teacher.score(x, t, own), slope)
        one = lambda x, t, c: teacher(x[None], t[None], c and torch.tensor([c]))[0]  # noqa: E731
        for i in range(2):
            expected = jacrev(one)(x[i].detach(), t[i], None if own is None else int(own[i]))
            torch.testing.assert_close(teacher.jacobian(x.detach(), t, own)[i], expected)


def test_density_has_mass_one_and_classes_share_it():
    teacher = ring(3, 1.0, 0.3, classes=3)
    line = torch.linspace(-4, 4, 161)
    x = torch.cartesian_prod(line, line)
    t = torch.full((len(x),), 0.3)
    for c in (None, torch.ones(len(x), dtype=torch.long)):
        assert float(teacher.log_prob(x, t, c).exp().sum() * 0.05**2) == pytest.approx(1.0, abs=1e-3)
    parts = [teacher.log_prob(x, t, torch.full((len(x),), k)).exp() / 3 for k in range(3)]
    torch.testing.assert_close(sum(parts), teacher.log_prob(x, t).exp())


def test_draws_are_those_of_the_mixture():
    teacher = ring(8, classes=4)
    x = teacher.sample(4000, torch.Generator().manual_seed(0))
    seen = samples.mode_coverage(x, teacher.means, teacher.std)
    assert seen["modes"] == 8
    assert seen["on_mode"] > 0.99
    assert seen["total_variation"] < 0.05
    assert seen["spread"] == pytest.approx(1.0, abs=0.05)
    c = torch.arange(4000) % 4
    own = teacher.sample(4000, torch.Generator().manual_seed(1), c)
    assert (torch.cdist(own, teacher.means).argmin(1) % 4 == c).double().mean() > 0.999
    assert scattered(16, 5).sample(10).shape == (10, 16)
    assert grid(3).means.shape == (9, 2)
    assert grid(3, falling=True).weights[1] / grid(3, falling=True).weights[0] == pytest.approx(0.9)
    with pytest.raises(UsageError, match="differ in number"):
        GaussianMixture(torch.zeros(2, 1), 0.1, weights=[1.0])
    with pytest.raises(UsageError, match="no classes"):
        ring(4).null_like(torch.zeros(2))


@pytest.mark.parametrize("elements", ["mean", "sum"])
def test_the_gradient_of_the_surrogate_is_the_one_given(elements):
    x = torch.randn(4, 3, 2, generator=G, requires_grad=True)
    g = torch.randn(4, 3, 2, generator=G)
    g[0, 0, 0] = math.nan
    surrogate(x, g, elements).backward()
    torch.testing.assert_close(x.grad, g.nan_to_num(0.0) / (4 if elements == "sum" else 24))
    with pytest.raises(UsageError, match="elements"):
        surrogate(x, g, "all")


def test_distribution_matching_gradient_has_no_scale_and_no_holes():
    x, real, fake = (torch.randn(5, 4, generator=G) for _ in range(3))
    torch.testing.assert_close(dmd_gradient(3 * x, 3 * real, 3 * fake), dmd_gradient(x, real, fake))
    assert dmd_gradient(x, real, real).abs().max() == 0
    assert dmd_gradient(real, real, fake).isfinite().all()
    torch.testing.assert_close(dmd_gradient(x, real, fake)[0], (fake - real)[0] / (x - real)[0].abs().mean())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_score_identity_loss_is_the_gap_in_expectation(alpha):
    schedule = RectifiedFlow()
    teacher, own = ring(6, 1.5, 0.3, schedule), ring(5, 1.0, 0.4, schedule)
    x = own.sample(200_000, torch.Generator().manual_seed(0))
    t = torch.full((len(x),), 0.5)
    x_t = schedule.add_noise(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), t)
    real, fake = teacher(x_t, t), own(x_t, t)
    found = sid_loss(x, real, fake, alpha, torch.ones(len(x)))
    expected = (1 - alpha) * (real - fake).square().sum(1).mean()
    assert float(found) == pytest.approx(float(expected), abs=0.02)
    assert float(sid_loss(x, real, real, alpha)) == 0


def test_score_identity_loss_goes_back_through_both_networks():
    schedule = Cosine()
    teacher, own = ring(6).double(), ring(5, 1.0, 0.4).double()
    x = torch.randn(3, 2, generator=G, dtype=torch.float64, requires_grad=True)
    noise, t = torch.randn(3, 2, generator=G, dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64)

    def loss(x):
        x_t = schedule.add_noise(x, noise, t)
        return sid_loss(x, teacher(x_t, t), own(x_t, t), 1.0, torch.ones(3, dtype=torch.float64))

    assert torch.autograd.gradcheck(loss, x)
    (whole,) = torch.autograd.grad(loss(x), x)
    x_t = schedule.add_noise(x, noise, t).detach()
    (direct,) = torch.autograd.grad(sid_loss(x, teacher(x_t, t), own(x_t, t), 1.0, torch.ones(3).double()), x)
    assert not torch.allclose(whole, direct)


def test_distances_of_gaussians():
    a = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    b = torch.randn(3000, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([2.0, 0.0])
    assert samples.frechet_distance(a, b) == pytest.approx(4.0, abs=0.2)
    assert samples.frechet_distance(a, 2 * a) == pytest.approx(2.0, abs=0.15)
    assert samples.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert samples.sliced_wasserstein(a, b) == pytest.approx(2 * 2 / math.pi, abs=0.1)
    assert samples.wasserstein(a[:400], a[:400] + torch.tensor([0.0, 1.5])) == pytest.approx(1.5, abs=1e-4)
    other = torch.randn(3000, 2, generator=torch.Generator().manual_seed(2))
    for distance in (samples.energy_distance, samples.mmd):
        assert abs(distance(a, other)) < 0.01
        assert distance(a, b) > 0.3
    one, two = a[:, :1], b[:, :1]  # in one dimension, E|X - Y| of Gaussians is known
    gap = 2 * (2 * math.exp(-1) / math.sqrt(math.pi) + 2 * math.erf(1) - 2 / math.sqrt(math.pi))
    assert samples.energy_distance(one, two) == pytest.approx(gap, abs=0.1)
    # mmd of N(0, 1) and N(2, 1) in one dimension under bandwidth 1: 2 / sqrt(3) (1 - exp(-4 / 6))
    assert samples.mmd(one, two) == pytest.approx(2 / math.sqrt(3) * (1 - math.exp(-4 / 6)), abs=0.05)


def test_how_many_different_samples_there_are():
    same, apart = torch.ones(6, 3), torch.eye(6)
    assert samples.vendi(same) == pytest.approx(1.0)
    assert samples.vendi(apart) == pytest.approx(6.0)
    assert samples.vendi(torch.cat([apart, apart])) == pytest.approx(6.0)
    seen = samples.mode_coverage(torch.zeros(5, 2), torch.tensor([[0.0, 0.0], [5.0, 5.0]]), 0.1)
    assert seen == {"modes": 1.0, "on_mode": 1.0, "total_variation": 0.5, "spread": 0.0}
    with pytest.raises(UsageError, match="cannot be compared"):
        samples.energy_distance(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(UsageError, match="differ in size"):
        samples.wasserstein(torch.zeros(2, 3), torch.zeros(3, 3))


def test_density_ratio_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    for dim, shift, std in ((1, 1.0, 1.0), (2, 0.5, 1.5), (3, 0.0, 2.0)):
        x, y = torch.randn(4000, dim, generator=g), shift + std * torch.randn(4000, dim, generator=g)
        exact = (((x - shift) / std).square() / 2 - x.square() / 2).sum(1) + dim * math.log(std)
        found = samples.log_density_ratio(x, y, k=10)
        assert found.mean().item() == pytest.approx(exact.mean().item(), abs=0.08)
        assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) > 0.6
    with pytest.raises(UsageError, match="too few samples"):
        samples.log_density_ratio(x[:5], y)
