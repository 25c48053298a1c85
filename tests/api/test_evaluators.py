"""Evaluators: exact numbers by hand, the teacher asked once, and the choice by data and model."""

import pytest
import torch
from torch import nn

from limbeck.core.roles import Roles
from limbeck.data import TensorSource, TextSource
from limbeck.evaluate.tasks import Classification, evaluator, predict


class Scores(nn.Module):
    """Returns its input, and counts its calls and the mode they came in."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, torch.is_grad_enabled()))
        return x * self.weight


def source(count=10, classes=3):
    scores = torch.randn(count, classes, generator=torch.Generator().manual_seed(0))
    return TensorSource(scores, scores.argmax(1))


def test_numbers_by_hand():
    scores = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    m = Roles(student=Scores(), teacher=nn.Linear(2, 2, bias=False))
    m.teacher.module.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = Classification(TensorSource(scores, torch.tensor([0, 1, 1, 0])))(m)
    assert found["top1"] == 0.75
    assert found["agreement"] == 0.0
    assert found["f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    p = torch.tensor([9.0, 0.0]).softmax(0)
    assert found["teacher_kl"] == pytest.approx(float((p.flip(0) * (p.flip(0) / p).log()).sum()), rel=1e-5)
    assert "top5" not in found


def test_top5_above_five_classes():
    m = Roles(student=Scores())
    assert "top5" not in Classification(source(classes=5))(m)
    assert Classification(source(classes=6))(m)["top5"] == 1.0


def test_batches_in_evaluation_mode_without_gradient():
    m = Roles(student=Scores())
    m.student.module.train()
    whole, parts = (predict(m.student, source(), size) for size in (100, 3))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert [n for n, _, _ in m.student.module.calls] == [10, 3, 3, 3, 1]
    assert not any(training or grad for _, training, grad in m.student.module.calls)
    assert m.student.module.training


def test_the_teacher_is_asked_once():
    m = Roles(student=Scores(), teacher=Scores())
    judge = Classification(source())
    judge(m)
    judge(m)
    teacher = judge.judge(m, "teacher")
    assert len(m.teacher.module.calls) == 1
    assert len(m.student.module.calls) == 2
    assert set(teacher) == {"top1", "f1", "ece"}


def test_the_teacher_reads_its_own_form_of_the_samples():
    student, teacher = source(), TensorSource(-source().x, source().y)
    m = Roles(student=Scores(), teacher=Scores())
    assert Classification(student, taught=student)(m)["agreement"] == 1.0
    assert Classification(student, taught=teacher)(m)["agreement"] == 0.0


def test_without_labels_only_the_teacher_is_compared_with():
    judge = Classification(TensorSource(torch.eye(3)))
    assert judge.primary == "agreement"
    assert set(judge(Roles(student=Scores(), teacher=Scores()))) == {"agreement", "teacher_kl"}


class Encoder(nn.Module):
    def encode(self, texts, batch_size=64): ...


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([f"sentence {i}" for i in range(9)], "Similarity"),
        ([(f"question {i}", f"answer {i}") for i in range(9)], "Retrieval"),
        (["one", "two"], "NoneType"),
    ],
)
def test_the_judge_of_sentence_encoders(texts, expected):
    pytest.importorskip("sentence_transformers")
    assert type(evaluator(TextSource(texts), Encoder())).__name__ == expected


def test_many_texts_are_thinned_out():
    pytest.importorskip("sentence_transformers")
    judge = evaluator(TextSource([f"sentence {i}" for i in range(2500)]), Encoder())
    assert len(judge.texts) == 834
    assert judge.texts[:2] == ["sentence 0", "sentence 3"]
