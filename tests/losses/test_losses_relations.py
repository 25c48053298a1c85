"""Relational and embedding losses against plain loops over pairs and triples of samples."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses import (
    cosine_distance,
    crd,
    embedding_mse,
    info_nce,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_kl,
)

B = 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def unequal() -> tuple[Tensor, Tensor]:
    return normal(B, 4, seed=0), normal(B, 3, seed=1)


@pytest.fixture
def equal() -> tuple[Tensor, Tensor]:
    return normal(B, 4, seed=2), normal(B, 4, seed=3)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def huber(gap: float) -> float:
    return 0.5 * gap * gap if abs(gap) < 1 else abs(gap) - 0.5


def check(result: Tensor, expected: object, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(result.detach().numpy(), np.asarray(expected), rtol=rtol)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_pkt_compares_neighbour_probabilities(unequal, variant: str):
    def probabilities(x: np.ndarray, j: int) -> dict[int, float]:
        kernel = {i: (cosine(x[i], x[j]) + 1) / 2 for i in range(B) if i != j or variant == "code"}
        return {i: k / sum(kernel.values()) for i, k in kernel.items()}

    rows = []
    for j in range(B):
        q, p = (probabilities(x.numpy(), j) for x in unequal)
        rows.append(sum(p[i] * math.log(p[i] / q[i]) for i in p) / (1 if variant == "paper" else B))
    check(pkt(*unequal, variant=variant, reduction="none"), rows, rtol=1e-4)  # 1e-7 inside the logarithm


def test_pkt_with_opposite_samples_stays_finite():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    for variant in ("paper", "code"):
        loss = pkt(student, torch.eye(2), variant=variant)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_rkd_distance_compares_distances_in_units_of_their_mean(unequal):
    def distances(x: np.ndarray) -> np.ndarray:
        d = np.array([[math.sqrt(sum((x[i] - x[j]) ** 2)) for j in range(B)] for i in range(B)])
        return d / np.mean([d[i, j] for i in range(B) for j in range(B) if i != j])

    s, t = (distances(x.numpy()) for x in unequal)
    expected = [sum(huber(s[i, j] - t[i, j]) for j in range(B)) / B for i in range(B)]
    check(rkd_distance(*unequal, reduction="none"), expected)


def test_rkd_distance_reaches_the_linear_part_of_huber():
    near, far = torch.zeros(4, 1), torch.tensor([[0.0], [0.0], [0.0], [9.0]])
    near[0] = 1.0
    # Distances over their mean: 2 from the outlier to each of three others, 0 elsewhere.
    expected = np.array([2 * huber(2.0), 2 * huber(2.0)]) / 4
    check(rkd_distance(near, far, reduction="none")[[0, 3]], expected, rtol=1e-6)


def test_rkd_distance_is_accurate_for_close_points_far_away():
    offset = torch.full((1, 3), 1000.0)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.0, 0.0], [0.0, 0.5, 0.0]])
    assert rkd_distance(points + offset, points) < 1e-10


def test_rkd_angle_compares_the_angles_at_each_vertex(unequal):
    def angle(x: np.ndarray, vertex: int, i: int, k: int) -> float:
        a, b = x[i] - x[vertex], x[k] - x[vertex]
        return 0.0 if vertex in (i, k) else cosine(a, b)

    s, t = (x.numpy() for x in unequal)
    rows = [
        sum(huber(angle(s, j, i, k) - angle(t, j, i, k)) for i, k in itertools.product(range(B), repeat=2)) / B**2
        for j in range(B)
    ]
    check(rkd_angle(*unequal, reduction="none"), rows)


def test_rkd_angle_of_coinciding_samples_has_finite_gradients():
    student = torch.ones(4, 3)
    student[3] = 2.0
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(rkd_angle(student, normal(4, 3, seed=4).float()), student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


@pytest.mark.parametrize("log_normaliser", [0.0, 5.0])
@pytest.mark.parametrize("negatives", ["batch", "shared", "own"])
def test_crd_is_noise_contrastive_estimation(equal, negatives: str, log_normaliser: float):
    size, temperature = 50, 0.3
    banks = {"batch": None, "shared": normal(7, 4, seed=5), "own": normal(B, 6, 4, seed=6)}
    bank = banks[negatives]
    s, t = (x.numpy() for x in equal)
    rows = []
    for i in range(B):
        others = {"batch": np.delete(t, i, 0), "shared": banks["shared"].numpy(), "own": banks["own"][i].numpy()}
        drawn = others[negatives]

        def h(other: np.ndarray, anchor: np.ndarray = s[i], count: int = len(drawn)) -> float:
            g = math.exp(cosine(anchor, other) / temperature) / math.exp(log_normaliser)
            return g / (g + count / size)

        rows.append(-math.log(h(t[i])) - sum(math.log(1 - h(n)) for n in drawn))
    options = {"dataset_size": size, "temperature": temperature, "log_normaliser": log_normaliser}
    check(crd(*equal, bank, **options, reduction="none"), rows)


def test_crd_in_batch_equals_handing_the_others_over(equal):
    student, teacher = equal
    others = torch.stack([torch.cat([teacher[:i], teacher[i + 1 :]]) for i in range(B)])
    torch.testing.assert_close(
        crd(student, teacher, dataset_size=20, reduction="none"),
        crd(student, teacher, others, dataset_size=20, reduction="none"),
    )


def test_crd_survives_a_cold_temperature_in_half_precision():
    student = torch.eye(4, dtype=torch.float16, requires_grad=True)
    loss = crd(student, torch.eye(4).roll(1, 0).half(), dataset_size=1000, temperature=1e-3)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_cosine_distance_and_embedding_mse_are_torchs(equal):
    torch.testing.assert_close(cosine_distance(*equal), 1 - F.cosine_similarity(*equal).mean())
    torch.testing.assert_close(embedding_mse(*equal), F.mse_loss(*equal))
    tokens = normal(2, 3, 4, seed=7), normal(2, 3, 4, seed=8)
    assert cosine_distance(*tokens, reduction="none").shape == (2, 3)
    assert embedding_mse(*tokens, reduction="none").shape == (2, 3)


def test_cosine_distance_of_a_zero_embedding_is_one_and_has_no_gradient():
    student = torch.zeros(1, 4, requires_grad=True)
    loss = cosine_distance(student, torch.ones(1, 4))
    assert loss == 1
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_similarity_kl_compares_softmaxes_over_the_other_samples(unequal):
    temperature = 0.2

    def probabilities(x: np.ndarray, i: int) -> np.ndarray:
        weights = np.array([math.exp(cosine(x[i], x[j]) / temperature) for j in range(B) if j != i])
        return weights / weights.sum()

    rows = []
    for i in range(B):
        q, p = (probabilities(x.numpy(), i) for x in unequal)
        rows.append(float((p * np.log(p / q)).sum()))
    check(similarity_kl(*unequal, temperature=temperature, reduction="none"), rows)


def test_similarity_kl_of_two_samples_is_zero():
    assert similarity_kl(normal(2, 3, seed=9), normal(2, 3, seed=10)) == 0


def test_info_nce_picks_the_own_teacher(equal):
    temperature = 0.3
    s, t = (x.numpy() for x in equal)
    rows = []
    for i in range(B):
        scores = [math.exp(cosine(s[i], t[j]) / temperature) for j in range(B)]
        rows.append(-math.log(scores[i] / sum(scores)))
    check(info_nce(*equal, temperature=temperature, reduction="none"), rows)


def test_info_nce_at_chance_is_log_batch():
    assert info_nce(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8), rel=1e-6)
