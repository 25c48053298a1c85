"""Plackett-Luce losses against a loop over ranks and the exact properties of the method."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses import list_mle, p_list_mle, plackett_luce

B, C = 6, 9


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return 2 * normal(B, C, seed=0), 2 * normal(B, C, seed=1), torch.tensor([0, 8, 3, 3, 5, 1])


def rank(teacher: np.ndarray, label: int | None) -> list[int]:
    """The label, then the rest by falling teacher score, by repeated search for the largest."""
    left = [c for c in range(len(teacher)) if c != label]
    order = [] if label is None else [label]
    while left:
        best = max(left, key=lambda c: teacher[c])
        order.append(best)
        left.remove(best)
    return order


def loop_over_ranks(student: Tensor, teacher: Tensor, labels: Tensor | None, weight) -> np.ndarray:
    """Sum over ranks k of weight(row, k, class) * -log P(class chosen at k)."""
    rows = []
    for i, (s, t) in enumerate(zip(student.numpy(), teacher.numpy(), strict=True)):
        order = rank(t, None if labels is None else int(labels[i]))
        loss = 0.0
        for k, chosen in enumerate(order):
            probability = math.exp(s[chosen]) / sum(math.exp(s[c]) for c in order[k:])
            loss -= weight(i, k, chosen) * math.log(probability)
        rows.append(loss)
    return np.array(rows)


def check(result: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_plackett_luce_is_the_loop_over_ranks(batch, temperature: float):
    student, teacher, labels = batch
    confidence = np.exp(teacher.numpy() / temperature)
    confidence /= confidence.sum(1, keepdims=True)
    expected = loop_over_ranks(student, teacher, labels, lambda i, k, c: confidence[i, c])
    check(plackett_luce(student, teacher, labels, temperature=temperature, reduction="none"), expected)


def test_golden_value():
    s, t = torch.tensor([[2.0, 1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0, 2.0]]).double()
    assert plackett_luce(s, t, torch.tensor([1])).item() == pytest.approx(1.759400878456555, abs=1e-14)


def test_gradient_is_the_closed_form(batch):
    student, teacher, labels = batch
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(plackett_luce(student, teacher, labels, reduction="sum"), student)
    s, expected = student.detach().numpy(), np.zeros((B, C))
    alpha = teacher.softmax(-1).numpy()
    for i in range(B):
        order = rank(teacher[i].numpy(), int(labels[i]))
        for k, chosen in enumerate(order):
            left = order[k:]
            share = np.exp(s[i, left])
            expected[i, left] += alpha[i, chosen] * share / share.sum()
            expected[i, chosen] -= alpha[i, chosen]
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(gradient.sum(-1).numpy(), 0, atol=1e-12)


def test_sure_teacher_gives_cross_entropy(batch):
    student, _, labels = batch
    teacher = F.one_hot(labels, C) * 1e4
    loss = plackett_luce(student, teacher.double(), labels, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(student, labels, reduction="none"))


def test_two_classes_give_weighted_cross_entropy(batch):
    student, teacher, labels = batch[0][:, :2], batch[1][:, :2], batch[2] % 2
    weight = teacher.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    expected = weight * F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(plackett_luce(student, teacher, labels, reduction="none"), expected)


def test_constant_student_pays_the_log_of_what_is_left(batch):
    _, teacher, labels = batch
    alpha = teacher.softmax(-1)
    expected = [
        sum(alpha[i, c].item() * math.log(C - k) for k, c in enumerate(rank(teacher[i].numpy(), int(labels[i]))))
        for i in range(B)
    ]
    check(plackett_luce(torch.full_like(teacher, 3.0), teacher, labels, reduction="none"), np.array(expected))


def test_likelihoods_of_all_rankings_add_up_to_one():
    orders = torch.tensor(list(itertools.permutations(range(4)))).double()
    student = normal(1, 4, seed=2).expand(24, 4)
    total = (-list_mle(student, orders, reduction="none")).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-12)


def test_hessian_is_positive_and_blind_to_shifts(batch):
    student, teacher, labels = (x[:1] for x in batch)
    hessian = torch.autograd.functional.hessian(lambda s: plackett_luce(s, teacher, labels), student).reshape(C, C)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12
    assert torch.linalg.eigvalsh(hessian)[1] > 1e-6  # only the shift is free
    torch.testing.assert_close(hessian @ torch.ones(C).double(), torch.zeros(C).double(), atol=1e-12, rtol=0)


def test_hot_weights_tend_to_list_mle(batch):
    limit = list_mle(*batch, reduction="none") / C
    torch.testing.assert_close(plackett_luce(*batch, temperature=1e8, reduction="none"), limit, rtol=1e-6, atol=0)


def test_it_is_not_blind_to_the_students_scale(batch):
    student, teacher, labels = batch
    assert (plackett_luce(2 * student, teacher, labels) - plackett_luce(student, teacher, labels)).abs() > 0.1


def test_teacher_is_a_constant(batch):
    student, teacher, labels = batch
    teacher.requires_grad_()
    student.requires_grad_()
    plackett_luce(student, teacher, labels).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_unlikely_label_still_comes_first_with_its_own_small_weight():
    student, teacher = torch.zeros(1, 3), torch.tensor([[20.0, 10.0, -20.0]])
    first = teacher.softmax(-1)[0, 2].item()
    expected = first * math.log(3) + teacher.softmax(-1)[0, 0].item() * math.log(2)
    assert plackett_luce(student, teacher, torch.tensor([2])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 4, C])
def test_top_k_is_the_beginning_of_the_sum(batch, top_k: int):
    student, teacher, labels = batch
    alpha = teacher.softmax(-1).numpy()
    expected = loop_over_ranks(student, teacher, labels, lambda i, k, c: alpha[i, c] * (k < top_k))
    check(plackett_luce(student, teacher, labels, top_k=top_k, reduction="none"), expected)


def test_top_k_with_every_other_class_masked_has_gradients(batch):
    student, teacher, labels = batch
    away = torch.ones(B, C, dtype=torch.bool).scatter(-1, labels[:, None], False)
    masked = student.masked_fill(away, -torch.inf).requires_grad_()
    loss = plackett_luce(masked, teacher.masked_fill(away, -torch.inf), labels, top_k=1)
    (gradient,) = torch.autograd.grad(loss, masked)
    assert loss == 0
    assert gradient.abs().max() < 1e-12


def test_student_that_excludes_a_likely_class_pays_infinitely(batch):
    student, teacher, labels = batch
    student[0, 4] = -torch.inf
    loss = plackett_luce(student, teacher, labels, reduction="none")
    assert loss[0] == torch.inf
    assert loss[1:].isfinite().all()


@pytest.mark.parametrize("labelled", [True, False])
def test_list_mle_is_the_loop_over_ranks(batch, labelled: bool):
    student, teacher, labels = batch
    labels = labels if labelled else None
    check(list_mle(student, teacher, labels, reduction="none"), loop_over_ranks(student, teacher, labels, lambda *_: 1))


@pytest.mark.parametrize("classes", [2, 3, 9, 127, 128, 200, 1100])
def test_p_list_mle_weights_are_exact_at_any_number_of_classes(classes: int):
    """Against Python's unbounded integers, in single precision."""
    raw = [2 ** (classes - k) - 1 for k in range(1, classes + 1)]
    total = sum(raw)
    expected = sum(w / total * math.log(classes - k) for k, w in enumerate(raw))
    student = torch.zeros(1, classes, requires_grad=True)
    loss = p_list_mle(student, torch.arange(classes).float()[None])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    assert gradient.isfinite().all()


def test_p_list_mle_is_the_loop_over_ranks(batch):
    total = sum(2 ** (C - k) - 1 for k in range(1, C + 1))
    expected = loop_over_ranks(*batch, lambda i, k, c: (2 ** (C - k - 1) - 1) / total)
    check(p_list_mle(*batch, reduction="none"), expected)


def test_ties_keep_the_order_of_classes():
    student = normal(1, 50, seed=3)
    tied = list_mle(student, torch.zeros(1, 50))
    torch.testing.assert_close(tied, list_mle(student, -torch.arange(50.0)[None]))


def test_small_integer_labels_are_enough(batch):
    student, teacher, labels = batch
    assert torch.equal(plackett_luce(student, teacher, labels.int()), plackett_luce(student, teacher, labels))
    assert torch.equal(plackett_luce(student, teacher, labels.byte()), plackett_luce(student, teacher, labels))


def test_a_hundred_thousand_classes_in_single_precision():
    student, teacher = 4 * normal(2, 100_000, seed=4), 4 * normal(2, 100_000, seed=5)
    labels = torch.tensor([99_999, 7])
    exact = student.clone().requires_grad_()
    single = student.float().requires_grad_()
    reference = plackett_luce(exact, teacher, labels, reduction="none")
    loss = plackett_luce(single, teacher.float(), labels, reduction="none")
    torch.testing.assert_close(loss.double(), reference, rtol=1e-4, atol=0)
    loss.sum().backward()
    reference.sum().backward()
    torch.testing.assert_close(single.grad.double(), exact.grad, rtol=0, atol=1e-5)
