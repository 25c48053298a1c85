"""List-wise losses: the student learns the order in which the teacher would choose the classes."""

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.losses._reduce import (
    Reduction,
    check_classes,
    check_labels,
    check_positive,
    check_same,
    full_precision,
    reduce,
)


@full_precision
def plackett_luce(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Plackett-Luce distillation (PLD): the label first, then the teacher's order, weighted by its confidence.

    `sum_k a_k [logsumexp_{l >= k} s_{pi_l} - s_{pi_k}]`, where pi puts the label first and the other classes by falling
    teacher logit, and `a_k = softmax(teacher / tau)_{pi_k}` (Bassam, Zhu and Bian 2025, section 4). Convex in the
    student's logits. It contains the cross-entropy as its first term: add none, and no `tau^2`. A label that the
    teacher finds unlikely weighs little.

    Args:
        student: Logits `[..., C]`, never tempered. A class masked with -inf on both sides drops out.
        teacher: Logits `[..., C]`; detached here, order and weights are constants of the method.
        labels: Class indices `[...]` in `0 .. C - 1`; one per sample, so no mixed or soft labels.
        temperature: `tau > 0` of the weights; the paper uses 1 on ImageNet and 4 on CIFAR-100.
        top_k: Keep the first k choices only, with exact denominators over all classes and unchanged weights (an
            extension: replaces the sort where C is a vocabulary). None keeps all.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, a label is out of range (on the CPU), or a number is out of range.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> plackett_luce(student, teacher, torch.tensor([1]))
        tensor(1.7594)
    """
    check_same("plackett_luce", student, teacher)
    check_positive("plackett_luce", temperature=temperature)
    ranking = _ranking("plackett_luce", teacher, labels, top_k)
    weights = (teacher.detach() / temperature).softmax(-1).gather(-1, ranking)  # [..., K]
    return reduce(_weighted(_choices(student, ranking), weights), reduction)


@full_precision
def list_mle(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """ListMLE: negative log-likelihood of the teacher's order under the student's Plackett-Luce model.

    `sum_k [logsumexp_{l >= k} s_{pi_l} - s_{pi_k}]` (Xia et al. 2008). `plackett_luce` tends to `1/C` of it as its
    temperature grows.

    Args:
        student: Logits or scores `[..., C]`, finite.
        teacher: Logits or scores `[..., C]`; only their order counts, ties are kept in index order.
        labels: Class indices `[...]` to be put first, or None for the teacher's own order.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, or a label is out of range (on the CPU).

    Example:
        >>> list_mle(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 2.0]])).exp()
        tensor(6.)
    """
    check_same("list_mle", student, teacher)
    return reduce(_choices(student, _ranking("list_mle", teacher, labels)).sum(-1), reduction)


@full_precision
def p_list_mle(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """Position-aware ListMLE: early choices weigh more, by a fixed sequence.

    `sum_k w_k [logsumexp_{l >= k} s_{pi_l} - s_{pi_k}]`, `w_k` proportional to `2^(C - k) - 1` (Lan et al. 2014),
    normalised to sum to one, which keeps them exact where `2^C` overflows. The ablation text of PLD weights by the
    teacher's probabilities instead, which would be PLD at temperature 1 itself; its section 4.2 has the fixed sequence
    used here.

    Args:
        student: Logits or scores `[..., C]`, finite, `C >= 2`.
        teacher: Logits or scores `[..., C]`; only their order counts, ties are kept in index order.
        labels: Class indices `[...]` to be put first, or None for the teacher's own order.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, there is one class only, or a label is out of range (on the CPU).

    Example:
        >>> scores = torch.tensor([[2.0, 1.0, 0.0]])
        >>> p_list_mle(scores, scores)
        tensor(0.3840)
    """
    check_same("p_list_mle", student, teacher)
    check_classes("p_list_mle", student)
    terms = _choices(student, _ranking("p_list_mle", teacher, labels))
    return reduce(_weighted(terms, _position_weights(terms)), reduction)


def _position_weights(terms: Tensor) -> Tensor:
    """`(2^(C-k) - 1) / sum_j (2^(C-j) - 1)` for k = 1 .. C, both sides divided by 2^C before they can overflow."""
    classes = terms.shape[-1]
    last = 2.0**-classes
    rank = torch.arange(1, classes + 1, device=terms.device, dtype=terms.dtype)
    return (torch.exp2(-rank) - last) / (1 - (classes + 1) * last)


def _ranking(where: str, teacher: Tensor, labels: Tensor | None, top_k: int | None = None) -> Tensor:
    """Classes `[..., K]` in the order to be learned: the label, then the others by falling teacher logit."""
    keys = teacher.detach()
    if labels is not None:
        keys = keys.scatter(-1, check_labels(where, labels, teacher).unsqueeze(-1), torch.inf)
    if top_k is None:
        return keys.argsort(dim=-1, descending=True, stable=True)
    if not 1 <= top_k <= teacher.shape[-1]:
        raise UsageError("top_k out of range", where=where, found=top_k, expected=f"1 .. {teacher.shape[-1]}")
    return keys.topk(top_k).indices


def _choices(student: Tensor, ranking: Tensor) -> Tensor:
    """Negative log-probability `[..., K]` of each choice among the classes still left."""
    worth = student.gather(-1, ranking)
    finite = student.masked_fill(student.isneginf(), -1e30)  # a log-sum-exp of -inf alone has no gradient
    rising = finite.gather(-1, ranking).flip(-1)  # worst first, so that one running log-sum-exp holds what is left
    if ranking.shape[-1] < student.shape[-1]:
        never = finite.scatter(-1, ranking, -torch.inf).logsumexp(-1, keepdim=True)
        rising = torch.cat([never, rising], dim=-1)
    left = rising.logcumsumexp(-1)[..., -ranking.shape[-1] :].flip(-1)
    return left - worth


def _weighted(terms: Tensor, weights: Tensor) -> Tensor:
    return (weights * terms.masked_fill(weights == 0, 0)).sum(-1)
