"""Logit losses against plain loops, and the identities that tie them together."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses import dist, dkd, jensen_shannon, kl, logit_mse, soft_cross_entropy, standardise, symmetric_kl

B, C = 5, 6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return 2 * normal(B, C, seed=0), 2 * normal(B, C, seed=1)


LABELS = torch.tensor([0, 5, 3, 3, 1])


def softmax(logits: np.ndarray) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def plain_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_row(function, student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    """temperature^2 * function(p of the teacher, q of the student), row by row."""
    rows = zip((teacher / temperature).numpy(), (student / temperature).numpy(), strict=True)
    return np.array([temperature**2 * function(softmax(t), softmax(s)) for t, s in rows])


def check(result: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_sum_over_classes(pair, temperature: float):
    check(kl(*pair, temperature=temperature, reduction="none"), by_row(plain_kl, *pair, temperature))
    backward = kl(*pair, temperature=temperature, direction="reverse", reduction="none")
    check(backward, by_row(lambda p, q: plain_kl(q, p), *pair, temperature))


def test_kl_is_torchs_batchmean(pair):
    student, teacher = pair
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(kl(student, teacher), expected)


def test_kl_gradient_is_the_difference_of_probabilities(pair):
    student, teacher = pair
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl(student, teacher, temperature=3.0, reduction="sum"), student)
    torch.testing.assert_close(gradient, 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)))


def test_hot_kl_is_half_the_mse_of_centred_logits(pair):
    centred = [x - x.mean(-1, keepdim=True) for x in pair]
    torch.testing.assert_close(kl(*pair, temperature=1e4), logit_mse(*centred) / 2, rtol=1e-3, atol=0)


def test_kl_to_an_excluded_class_is_infinite_with_a_finite_gradient(pair):
    student, teacher = pair
    student[0, 2] = -torch.inf
    student.requires_grad_()
    loss = kl(student, teacher, reduction="none")
    assert loss[0] == torch.inf
    assert loss[1:].isfinite().all()
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jensen_shannon_is_the_sum_over_classes(pair, beta: float, temperature: float):
    def divergence(p: list[float], q: list[float]) -> float:
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        return beta * plain_kl(p, m) + (1 - beta) * plain_kl(q, m)

    expected = by_row(divergence, *pair, temperature)
    options = {"beta": beta, "temperature": temperature, "reduction": "none"}
    check(jensen_shannon(*pair, **options), expected)
    check(jensen_shannon(*pair, **options, continuous=True), expected / (beta * (1 - beta)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("end", "near", "direction"), [(0, 1e-6, "forward"), (1, 1 - 1e-6, "reverse")])
def test_ends_of_jensen_shannon_are_the_two_kls(pair, end: int, near: float, direction: str, temperature: float):
    expected = kl(*pair, direction=direction, temperature=temperature)
    for continuous in (True, False):
        at = jensen_shannon(*pair, beta=end, temperature=temperature, continuous=continuous)
        torch.testing.assert_close(at, expected)
    close = jensen_shannon(*pair, beta=near, temperature=temperature, continuous=True)
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=0)
    assert jensen_shannon(*pair, beta=near, temperature=temperature) < 1e-4  # the jump without it


def test_jensen_shannon_is_symmetric_and_bounded(pair):
    student, teacher = pair
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))
    torch.testing.assert_close(jensen_shannon(student, teacher, beta=0.3), jensen_shannon(teacher, student, beta=0.7))
    apart = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert jensen_shannon(*apart).item() == pytest.approx(math.log(2), rel=1e-6)


def test_symmetric_kl_is_half_of_jeffreys_divergence(pair):
    student, teacher = pair
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(symmetric_kl(*pair), ((p - q) * (p.log() - q.log())).sum(-1).mean() / 2)
    torch.testing.assert_close(symmetric_kl(student, teacher), symmetric_kl(teacher, student))
    torch.testing.assert_close(
        symmetric_kl(student + 3, teacher - normal(B, 1, seed=2)), symmetric_kl(student, teacher)
    )
    assert symmetric_kl(student, student + 1).abs() < 1e-12
    mean = ((p * (p / q).log() + q * (q / p).log()) / 2).mean()  # the first release: C times the mean over all elements
    torch.testing.assert_close(C * mean, symmetric_kl(*pair))


def test_the_gradient_of_symmetric_kl_is_the_closed_form(pair):
    student, teacher = (z.clone().requires_grad_() for z in pair)
    symmetric_kl(student, teacher.detach()).backward()
    p, q = pair[1].softmax(-1), pair[0].softmax(-1)
    d = q.log() - p.log()
    torch.testing.assert_close(student.grad, ((q - p) + q * (d - (q * d).sum(-1, keepdim=True))) / (2 * B))


def test_symmetric_kl_bounds_jensen_shannon(pair):
    one, other = (symmetric_kl(*pair, reduction="none"), jensen_shannon(*pair, reduction="none"))
    assert (other <= one / 2).all()
    near = pair[1] + 1e-3 * normal(B, C, seed=3)
    assert (symmetric_kl(near, pair[1]) / jensen_shannon(near, pair[1])).item() == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize(("variant", "ddof"), [("paper", 0), ("code", 1)])
def test_standardise_is_the_z_score(pair, variant: str, ddof: int):
    z = pair[0].numpy()
    expected = (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True, ddof=ddof)
    np.testing.assert_allclose(standardise(pair[0], variant=variant).numpy(), expected, rtol=1e-6)


def test_standardised_kl_is_blind_to_scale_and_shift(pair):
    student, teacher = pair
    loss = kl(standardise(student), standardise(teacher), temperature=2.0)
    moved = kl(standardise(7 * student + 3), standardise(0.2 * teacher - 1), temperature=2.0)
    torch.testing.assert_close(moved, loss, rtol=1e-5, atol=0)
    assert kl(standardise(5 * teacher), standardise(teacher)) < 1e-10


def test_standardise_widens_and_survives_equal_logits():
    flat = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    result = standardise(flat)
    assert result.dtype == torch.float32
    assert (result == 0).all()
    (gradient,) = torch.autograd.grad(result.square().sum() + result.sum(), flat)
    assert gradient.isfinite().all()


def test_standardise_gradient_is_exact(pair):
    assert torch.autograd.gradcheck(standardise, pair[0].requires_grad_())


def test_soft_cross_entropy_is_torchs(pair):
    student, target = pair[0], pair[1].softmax(-1)
    expected = F.cross_entropy(student, target, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(student, target, reduction="none"), expected)
    hard = F.one_hot(LABELS, C).double()
    torch.testing.assert_close(soft_cross_entropy(student, hard), F.cross_entropy(student, LABELS))


def test_soft_cross_entropy_is_kl_plus_entropy(pair):
    student, teacher = pair
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher.softmax(-1)), kl(student, teacher) + entropy)


def test_logit_mse_is_torchs(pair):
    torch.testing.assert_close(logit_mse(*pair), F.mse_loss(*pair))


def test_dkd_is_its_two_parts(pair):
    alpha, beta, temperature = 0.7, 3.0, 2.0
    expected = []
    for s, t, label in zip(*((x / temperature).numpy() for x in pair), LABELS.tolist(), strict=True):
        p, q = softmax(t), softmax(s)
        target = plain_kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = plain_kl(softmax(np.delete(t, label)), softmax(np.delete(s, label)))
        expected.append(temperature**2 * (alpha * target + beta * others))
    result = dkd(*pair, LABELS, alpha=alpha, beta=beta, temperature=temperature, reduction="none")
    check(result, np.array(expected))


def test_kd_is_dkd_with_the_teachers_own_weight(pair):
    """DKD, eq. 6."""
    student, teacher = pair
    target, others = (
        dkd(student, teacher, LABELS, alpha=a, beta=b, temperature=1.0, reduction="none") for a, b in ((1, 0), (0, 1))
    )
    doubt = 1 - teacher.softmax(-1).gather(-1, LABELS[:, None]).squeeze(-1)
    torch.testing.assert_close(target + doubt * others, kl(student, teacher, reduction="none"))


def test_dkd_with_two_classes_has_no_others(pair):
    student, teacher = (x[:, :2] for x in pair)
    torch.testing.assert_close(dkd(student, teacher, LABELS % 2, temperature=1.0), kl(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_pearson(pair, temperature: float):
    q, p = (np.array([softmax(row) for row in (x / temperature).numpy()]) for x in pair)
    inter = [1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(B)]
    intra = np.mean([1 - np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(C)])
    expected = temperature**2 * (2.0 * np.array(inter) + 0.5 * intra)
    options = {"beta": 2.0, "gamma": 0.5, "temperature": temperature, "reduction": "none"}
    check(dist(*pair, **options, variant="paper"), expected)
    np.testing.assert_allclose(dist(*pair, **options).numpy(), expected, rtol=1e-5)


def test_rare_classes_count_in_the_paper_and_not_in_the_code():
    """A class at probability 1e-6 moves oppositely in student and teacher: correlation -1, or next to nothing."""
    rare = torch.tensor([[1e-6], [2e-6], [3e-6]], dtype=torch.float64)
    common = torch.tensor([[0.2], [0.5], [0.3]], dtype=torch.float64)

    def logits(last: Tensor) -> Tensor:
        return torch.cat([common, 1 - common - last, last], -1).log()

    intra = {
        variant: dist(logits(rare.flip(0)), logits(rare), beta=0.0, variant=variant).item()
        for variant in ("paper", "code")
    }
    assert intra["paper"] == pytest.approx(2 / 3, abs=1e-4)
    assert intra["code"] == pytest.approx(1 / 3, abs=1e-3)
