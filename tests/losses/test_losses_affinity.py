"""Affinity mimicking: what it is where student and teacher agree, where the teacher is sure, and where it knows nothing."""

import math

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.losses.affinity import affinities, affinity_mimicking, clip_loss


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


S, T = (draw(6, 4, seed=0), draw(6, 4, seed=1)), (draw(6, 5, seed=2), draw(6, 5, seed=3))


def entropy(logits):
    rows = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return (rows - (logits.softmax(0) * logits.log_softmax(0)).sum(0).mean()) / 2


def test_where_both_agree_it_is_the_entropy_and_has_no_gradient():
    images = T[0].clone().requires_grad_()
    loss = affinity_mimicking(images, T[1], *T, student_scale=7.0, teacher_scale=7.0)
    torch.testing.assert_close(loss, entropy(affinities(*T, 7.0)))
    loss.backward()
    assert images.grad.abs().max() < 1e-12


def test_a_teacher_that_is_sure_of_the_pairs_makes_it_the_clip_loss():
    sure = torch.eye(6, dtype=torch.float64)
    loss = affinity_mimicking(*S, sure, sure, student_scale=3.0, teacher_scale=1e4)
    torch.testing.assert_close(loss, clip_loss(*S, scale=3.0))


def test_a_teacher_that_knows_nothing_asks_for_uniform_affinities():
    logits = affinities(*S, 3.0)
    expected = -(logits.log_softmax(1).mean() + logits.log_softmax(0).mean()) / 2
    torch.testing.assert_close(affinity_mimicking(*S, *T, student_scale=3.0, teacher_scale=0.0), expected)
    assert affinity_mimicking(*S, *T, student_scale=0.0) == pytest.approx(math.log(6))


def test_pairs_in_another_order_and_spaces_turned_are_the_same():
    loss = affinity_mimicking(*S, *T)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(affinity_mimicking(*(x[order] for x in (*S, *T))), loss)
    turn = torch.linalg.qr(draw(4, 4, seed=5)).Q
    torch.testing.assert_close(affinity_mimicking(S[0] @ turn, S[1] @ turn, *T), loss)
    torch.testing.assert_close(affinity_mimicking(3 * S[0], S[1], *T), loss)


def test_no_gradient_reaches_the_teacher_and_halves_are_widened():
    teacher = T[0].clone().requires_grad_()
    student = S[0].clone().requires_grad_()
    affinity_mimicking(student, S[1], teacher, T[1]).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    halves = affinity_mimicking(*(x.bfloat16() for x in (*S, *T)))
    assert halves.dtype == torch.float32


def test_what_are_no_pairs_is_said():
    with pytest.raises(UsageError, match="no pairs"):
        clip_loss(S[0], S[1][:5])
    with pytest.raises(UsageError, match="other pairs"):
        affinity_mimicking(*S, T[0][:4], T[1][:4])
