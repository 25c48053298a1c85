"""Feature and information losses against plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses import attention_transfer, hcl, hint, similarity_preserving, simkd, vid


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(result: Tensor, expected: object) -> None:
    np.testing.assert_allclose(result.detach().numpy(), np.asarray(expected), rtol=1e-9)


@pytest.mark.parametrize("loss", [hint, simkd])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5, 2)])
def test_hint_and_simkd_are_torchs_mse(loss, shape: tuple[int, ...]):
    pair = normal(*shape, seed=0), normal(*shape, seed=1)
    torch.testing.assert_close(loss(*pair), F.mse_loss(*pair))


def attention(features: np.ndarray, power: float) -> np.ndarray:
    _, height, width = features.shape
    flat = [sum(abs(a) ** power for a in features[:, i, j]) for i in range(height) for j in range(width)]
    return np.array(flat) / math.sqrt(sum(q * q for q in flat))


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_transfer_compares_normalised_maps(power: float):
    student, teacher = normal(3, 4, 5, 6, seed=2), normal(3, 7, 5, 6, seed=3)
    gaps = [attention(s, power) - attention(t, power) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    code = attention_transfer(student, teacher, power=power, reduction="none")
    check(code, [np.mean(gap**2) for gap in gaps])
    paper = attention_transfer(student, teacher, power=power, variant="paper", reduction="none")
    check(paper, [np.linalg.norm(gap) for gap in gaps])


def test_attention_transfer_pools_the_larger_map_in_each_direction():
    student, teacher = normal(2, 3, 8, 2, seed=4), normal(2, 3, 4, 4, seed=5)
    pooled = F.avg_pool2d(student, (2, 1)), F.avg_pool2d(teacher, (1, 2))
    torch.testing.assert_close(attention_transfer(student, teacher), attention_transfer(*pooled))


def test_similarity_preserving_compares_normalised_gram_matrices():
    student, teacher = normal(4, 3, 2, 2, seed=6), normal(4, 5, seed=7)

    def gram(x: np.ndarray) -> np.ndarray:
        rows = [[float(np.dot(a.ravel(), b.ravel())) for b in x] for a in x]
        return np.array([np.array(row) / math.sqrt(sum(g * g for g in row)) for row in rows])

    gap = gram(student.numpy()) - gram(teacher.numpy())
    check(similarity_preserving(student, teacher), np.linalg.norm(gap, "fro") ** 2 / 16)
    check(similarity_preserving(student, teacher, reduction="none"), (gap**2).sum(1) / 4)


@pytest.mark.parametrize(("size", "levels"), [(8, [4, 2, 1]), (4, [2, 1]), (2, [1]), (1, [])])
def test_hcl_is_a_pyramid_with_halving_weights(size: int, levels: list[int]):
    student, teacher = normal(3, 2, size, size, seed=8), normal(3, 2, size, size, seed=9)
    gap = (student - teacher).numpy()
    total, weights = np.mean(gap**2, axis=(1, 2, 3)), 1.0
    for index, level in enumerate(levels):
        step = size // level
        pooled = gap.reshape(3, 2, level, step, level, step).mean(axis=(3, 5))
        weight = 0.5 ** (index + 1)
        total, weights = total + weight * np.mean(pooled**2, axis=(1, 2, 3)), weights + weight
    check(hcl(student, teacher, reduction="none"), total / weights)


def test_hcl_accepts_maps_that_are_not_square():
    student, teacher = normal(2, 2, 6, 3, seed=10), normal(2, 2, 6, 3, seed=11)
    parts = [F.mse_loss(student, teacher)]
    parts += [F.mse_loss(*(F.adaptive_avg_pool2d(x, n) for x in (student, teacher))) for n in (2, 1)]
    torch.testing.assert_close(hcl(student, teacher), (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
def test_vid_is_the_gaussian_likelihood(shape: tuple[int, ...]):
    student, teacher, scale = normal(*shape, seed=12), normal(*shape, seed=13), normal(3, seed=14)
    variance = (F.softplus(scale) + 1e-5).reshape(3, *[1] * (len(shape) - 2))
    exact = -torch.distributions.Normal(student, variance.sqrt().expand_as(student)).log_prob(teacher)
    expected = exact.flatten(1).mean(-1) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(vid(student, teacher, scale, reduction="none"), expected)


def test_vid_learns_the_variance_of_the_error():
    student, teacher = normal(64, 3, seed=15), normal(64, 3, seed=16)
    error = (student - teacher).square().mean(0)
    scale = (error - 1e-5).expm1().log().requires_grad_()
    (gradient,) = torch.autograd.grad(vid(student, teacher, scale), scale)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_vid_stays_finite_when_the_variance_vanishes():
    scale = torch.full((3,), -1e4, requires_grad=True)
    loss = vid(torch.zeros(2, 3), torch.ones(2, 3), scale)
    (gradient,) = torch.autograd.grad(loss, scale)
    assert loss.item() == pytest.approx(0.5 * (1e5 + math.log(1e-5)), rel=1e-5)
    assert gradient.isfinite().all()
