"""PLD as a method: what the loss's own tests do not see."""

import pytest
import torch
import torch.nn.functional as F

from limbeck import Batch, Roles
from limbeck.core.errors import UsageError
from limbeck.methods.pld.method import PLD


class Given(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, x):
        return self.logits.clone()


def update_of(method, student, teacher, y):
    m = Roles(teacher=Given(teacher), student=Given(student))
    (update,) = method.step(m, Batch(x=torch.zeros(len(y), 1), y=torch.tensor(y)))
    update.loss.backward()
    assert m.teacher.logits.grad is None
    return update, m.student.logits.grad


def test_golden_value_of_the_dossier():
    update, gradient = update_of(PLD(), [[2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]], [1])
    assert update.loss.item() == pytest.approx(1.759400878456555, abs=1e-12)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def test_a_teacher_that_is_sure_gives_the_cross_entropy():
    student = [[0.3, -1.0, 2.0], [1.0, 0.0, 0.5]]
    update, _ = update_of(PLD(), student, [[0.0, 90.0, 0.0], [90.0, 0.0, 0.0]], [1, 0])
    expected = F.cross_entropy(torch.tensor(student, dtype=torch.float64), torch.tensor([1, 0]))
    torch.testing.assert_close(update.loss.detach(), expected)


def test_trust_is_the_tempered_probability_of_the_label():
    update, _ = update_of(PLD(temperature=2.0), [[0.0, 0.0]] * 2, [[2.0, 0.0], [0.0, 4.0]], [0, 0])
    expected = (torch.sigmoid(torch.tensor(1.0)) + torch.sigmoid(torch.tensor(-2.0))) / 2
    assert update.logs["trust"].item() == pytest.approx(expected.item())


def test_the_student_is_never_tempered():
    """Two classes: the weights depend on the temperature, the cross-entropy inside does not."""
    for tau in (0.5, 3.0):
        update, _ = update_of(PLD(temperature=tau), [[0.7, -0.2]], [[1.0, 0.0]], [0])
        weight = torch.sigmoid(torch.tensor(1 / tau, dtype=torch.float64))
        cross_entropy = F.softplus(torch.tensor(-0.9, dtype=torch.float64))
        torch.testing.assert_close(update.loss.detach(), weight * cross_entropy)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": -2.0}, {"top_k": 0}])
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError) as error:
        PLD(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


@pytest.mark.parametrize(
    ("student", "batch", "words"),
    [
        ([[0.0] * 4] * 2, {"y": torch.tensor([0, 1])}, "same classes"),
        ([[0.0] * 3] * 2, {}, "needs labels"),
        ([[0.0] * 3] * 2, {"y": torch.tensor([0, 3])}, "out of range"),
        ([[0.0] * 3] * 2, {"y": torch.eye(3)[:2]}, "one class index"),
    ],
)
def test_models_and_data_that_do_not_fit(student, batch, words):
    m = Roles(teacher=Given([[0.0] * 3] * 2), student=Given(student))
    with pytest.raises(UsageError, match=words):
        PLD().check(m, Batch(x=torch.zeros(2, 1), **batch))


def test_more_choices_than_classes_are_refused_before_the_first_step():
    m = Roles(teacher=Given([[0.0] * 3] * 2), student=Given([[0.0] * 3] * 2))
    with pytest.raises(UsageError, match="top_k"):
        PLD(top_k=4).check(m, Batch(x=torch.zeros(2, 1), y=torch.tensor([0, 1])))
