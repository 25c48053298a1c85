"""KD: the formula in closed form, its special cases, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from limbeck import Batch, Roles
from limbeck.core.errors import UsageError
from limbeck.methods.kd.method import KD


class Given(torch.nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, x):
        return self.logits.clone()


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def m():
    return Roles(teacher=Given(3 * draw(4, 5, seed=0)), student=Given(draw(4, 5, seed=1)))


BATCH = Batch(x=torch.zeros(4, 1), y=torch.tensor([0, 4, 2, 2]))


def loss(method, m, batch=BATCH):
    (update,) = method.step(m, batch)
    assert update.role == "student"
    return update.loss


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_the_loss_and_its_gradient_are_the_closed_form(m, tau, w):
    t, s = m.teacher.logits.detach(), m.student.logits
    p, q = (t / tau).softmax(1), (s / tau).softmax(1)
    hard = -s.log_softmax(1)[range(4), BATCH.y].mean()
    expected = (1 - w) * tau**2 * (p * (p / q).log()).sum(1).mean() + w * hard
    found = loss(KD(temperature=tau, label_weight=w), m)
    torch.testing.assert_close(found, expected)
    found.backward()
    one_hot = F.one_hot(BATCH.y, 5).double()
    gradient = (1 - w) * tau * (q - p) + w * (s.softmax(1) - one_hot)
    torch.testing.assert_close(s.grad, gradient.detach() / 4)
    assert m.teacher.logits.grad is None


def test_without_labels_the_teacher_has_it_all(m):
    unlabelled = Batch(x=BATCH.x)
    assert loss(KD(label_weight=0.5), m, unlabelled) == loss(KD(label_weight=0.0), m)


def test_hot_gradients_tend_to_those_of_matched_logits(m):
    """Section 2.1 of the paper: at high temperature KD is half the squared distance of centred logits, over C."""
    t, s = m.teacher.logits.detach(), m.student.logits
    loss(KD(temperature=1e6, label_weight=0.0), m).backward()
    gap = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    torch.testing.assert_close(s.grad, gap.detach() / 5 / 4, rtol=1e-4, atol=1e-6)


def test_a_student_equal_to_the_teacher_learns_from_labels_only(m):
    twin = Roles(teacher=m.teacher.module, student=Given(m.teacher.logits.detach().clone()))
    assert loss(KD(label_weight=0.0), twin).item() == pytest.approx(0, abs=1e-12)


def test_tokens_count_as_samples():
    m = Roles(teacher=Given(draw(2, 2, 5, seed=0)), student=Given(draw(2, 2, 5, seed=1)))
    flat = Roles(
        teacher=Given(m.teacher.logits.detach().view(4, 5)), student=Given(m.student.logits.detach().view(4, 5))
    )
    batch = Batch(x=BATCH.x, y=BATCH.y.view(2, 2))
    torch.testing.assert_close(loss(KD(), m, batch), loss(KD(), flat))


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"temperature": 0.0}, "method.temperature"), ({"temperature": -1.0}, "method.temperature")]
    + [({"label_weight": w}, "method.label_weight") for w in (-0.1, 1.1)],
)
def test_hyper_parameters_out_of_range(fields, where):
    with pytest.raises(UsageError) as error:
        KD(**fields)
    assert error.value.where == where


@pytest.mark.parametrize(
    ("student", "y", "words"),
    [
        ((4, 6), BATCH.y, "same classes"),
        ((4, 5), torch.tensor([0, 5, 2, 2]), "out of range"),
        ((4, 5), torch.tensor([0, -1, 2, 2]), "out of range"),
        ((4, 5), torch.rand(4, 5), "one class index"),
    ],
)
def test_models_and_data_that_do_not_fit(student, y, words):
    m = Roles(teacher=Given(draw(4, 5, seed=0)), student=Given(draw(*student, seed=1)))
    with pytest.raises(UsageError, match=words) as error:
        KD().check(m, Batch(x=BATCH.x, y=y))
    assert error.value.fix or error.value.expected


def test_soft_labels_are_no_matter_where_labels_have_no_weight():
    m = Roles(teacher=Given(draw(4, 5, seed=0)), student=Given(draw(4, 5, seed=1)))
    batch = Batch(x=BATCH.x, y=torch.rand(4, 5))
    KD(label_weight=0.0).check(m, batch)
    assert loss(KD(label_weight=0.0), m, batch).isfinite()


def test_check_leaves_modes_and_statistics_as_they_were():
    norm = torch.nn.BatchNorm1d(3)
    m = Roles(teacher=torch.nn.Linear(3, 3), student=torch.nn.Sequential(norm, torch.nn.Dropout(0.5)))
    norm.eval()
    norm.running_mean.fill_(0.5)
    m.student.module[1].train()
    before = torch.get_rng_state()
    KD().check(m, Batch(x=torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), y=torch.tensor([0, 1, 2, 0])))
    assert not norm.training
    assert m.student.module[1].training
    assert norm.running_mean.tolist() == [0.5] * 3
    assert torch.equal(torch.get_rng_state(), before)
