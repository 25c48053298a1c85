"""Embedding distillation: the sum of its terms, their invariances, and what it refuses."""

import pytest
import torch

from limbeck import Batch, Roles
from limbeck.core.errors import UsageError
from limbeck.methods.embedding.method import Embedding


class Given(torch.nn.Module):
    def __init__(self, vectors):
        super().__init__()
        self.vectors = torch.nn.Parameter(vectors)

    def forward(self, x):
        return self.vectors


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


S, T = draw(6, 4, seed=0), draw(6, 4, seed=1)
BATCH = Batch(x=torch.zeros(6, 1))


def loss(method, student=S, teacher=T):
    (update,) = method.step(Roles(teacher=Given(teacher), student=Given(student)), BATCH)
    return update.loss.detach()


def test_the_loss_is_the_weighted_sum_of_hand_written_terms():
    tau = 0.2
    s, t = S / S.norm(dim=1, keepdim=True), T / T.norm(dim=1, keepdim=True)
    cosine = (1 - (s * t).sum(1)).mean()
    others = ~torch.eye(6, dtype=torch.bool)
    q, p = (((a @ a.T)[others].view(6, 5) / tau).softmax(1) for a in (s, t))
    similarity = (p * (p / q).log()).sum(1).mean()
    squared = ((S - T) ** 2).mean()
    method = Embedding(cosine_weight=0.5, similarity_weight=2.0, similarity_temperature=tau, mse_weight=3.0)
    torch.testing.assert_close(loss(method), 0.5 * cosine + 2 * similarity + 3 * squared)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0)], ids=str)
def test_the_loss_is_zero_at_the_teacher_and_positive_elsewhere(weights):
    method = Embedding(weights[0], weights[1], mse_weight=weights[2])
    assert loss(method, T) == pytest.approx(0, abs=1e-12)
    assert loss(method) > 0.01


def test_length_counts_for_the_squared_error_only():
    assert loss(Embedding(), 7 * S) == pytest.approx(loss(Embedding()).item())
    squared = Embedding(0.0, 0.0, mse_weight=1.0)
    assert loss(squared, 7 * S) > 2 * loss(squared)


def test_rotation_leaves_the_similarities_alone():
    rotation = torch.linalg.qr(draw(4, 4, seed=2)).Q
    similarity = Embedding(cosine_weight=0.0)
    assert loss(similarity, S @ rotation) == pytest.approx(loss(similarity).item())
    assert loss(Embedding(), S @ rotation) != pytest.approx(loss(Embedding()).item())


def test_a_narrower_student_has_neighbours_too():
    similarity = Embedding(cosine_weight=0.0)
    narrow = Roles(teacher=Given(T), student=Given(S[:, :2]))
    similarity.check(narrow, BATCH)
    (update,) = similarity.step(narrow, BATCH)
    update.loss.backward()
    assert narrow.student.vectors.grad.abs().sum() > 0
    with pytest.raises(UsageError, match="cannot be compared") as error:
        Embedding().check(narrow, BATCH)
    assert "4" in error.value.fix


def test_outputs_that_are_no_vectors_are_refused():
    with pytest.raises(UsageError, match="cannot be compared"):
        Embedding(cosine_weight=0.0).check(Roles(teacher=Given(T), student=Given(draw(6, 2, 4, seed=3))), BATCH)


@pytest.mark.parametrize(
    "fields",
    [{"cosine_weight": -1.0}, {"similarity_weight": -1.0}, {"similarity_temperature": 0.0}, {"mse_weight": -0.1}],
)
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError) as error:
        Embedding(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


def test_nothing_to_learn():
    with pytest.raises(UsageError, match="nothing to learn"):
        Embedding(cosine_weight=0.0, similarity_weight=0.0)
