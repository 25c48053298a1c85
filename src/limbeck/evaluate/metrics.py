"""Quality of predictions, scores and rankings, on tensors and in batches."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["none", "mean"]


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1, reduction: Reduction = "mean") -> Tensor:
    """Share of samples whose label is among the `k` highest scores.

    Classes with equal scores are taken to be in random order and the expectation is returned, so that a collapsed
    model that gives every class the same score earns `k / C` and not 0 or 1.

    Args:
        scores: Logits or probabilities `[N, C]`.
        labels: Class indices `[N]`.
        k: Number of guesses, 1 to C.
        reduction: `"mean"` over samples, or `"none"`.

    Returns:
        Scalar, or `[N]`; in [0, 1], and NaN where a sample's scores hold a NaN.

    Example:
        >>> topk_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]), torch.tensor([1, 1, 0]), reduction="none")
        tensor([1.0000, 0.0000, 0.5000])
    """
    gain = torch.zeros(scores.shape[-1], dtype=torch.float64, device=scores.device)
    gain[:k] = 1
    return _reduce(_expected_gain(scores, labels, gain), reduction)


def reciprocal_rank(scores: Tensor, target: Tensor, k: int | None = None, reduction: Reduction = "mean") -> Tensor:
    """One over the rank of the one right candidate of each query; 0 beyond rank `k` (MRR@k when averaged).

    Candidates with equal scores are taken to be in random order and the expectation is returned.

    Args:
        scores: Score of each candidate for each query `[Q, D]`, higher is better.
        target: Index of the right candidate `[Q]`.
        k: Cut-off rank, >= 1; None looks at all.
        reduction: `"mean"` over queries, or `"none"`.

    Returns:
        Scalar, or `[Q]`; in [0, 1], and NaN where a query's scores hold a NaN.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
        >>> reciprocal_rank(scores, torch.tensor([0, 1]), reduction="none")
        tensor([1.0000, 0.3333])
        >>> reciprocal_rank(scores, torch.tensor([0, 1]), k=2)
        tensor(0.5000)
    """
    gain = 1 / torch.arange(1, scores.shape[-1] + 1, dtype=torch.float64, device=scores.device)
    if k is not None:
        gain[k:] = 0
    return _reduce(_expected_gain(scores, target, gain), reduction)


def f1(
    predictions: Tensor,
    labels: Tensor,
    classes: int | None = None,
    average: Literal["macro", "micro", "none"] = "macro",
) -> Tensor:
    """F1 score of class indices `[N]`, or of several labels per sample `[N, C]`.

    `F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)`. The macro average is taken over the classes that occur in `predictions` or
    `labels`; the micro average sums the counts first, and equals accuracy when each sample has one class.

    Args:
        predictions: Class indices `[N]`, or zeros and ones `[N, C]`.
        labels: Of the same shape.
        classes: Number of classes C for indices; default: the largest index + 1. Ignored for `[N, C]`.
        average: How classes are averaged; `"none"` returns each class, NaN for one that does not occur.

    Returns:
        Scalar in [0, 1], or `[C]`.

    Example:
        >>> f1(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7333)
        >>> f1(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]), average="micro")
        tensor(0.7500)
    """
    if predictions.ndim == 1:
        size = classes or int(torch.cat([predictions, labels]).max()) + 1
        hits = labels[predictions == labels].bincount(minlength=size)  # [C]
        seen = predictions.bincount(minlength=size) + labels.bincount(minlength=size)  # [C]
    else:
        hits = (predictions.bool() & labels.bool()).sum(0)  # [C]
        seen = predictions.bool().sum(0) + labels.bool().sum(0)  # [C]
    if average == "micro":
        return 2 * hits.sum() / seen.sum()
    score = 2 * hits / seen  # 0 / 0 = NaN where a class does not occur
    return score if average == "none" else score.nanmean()


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of their ranks.

    Args:
        values: Numbers `[..., N]`.

    Returns:
        Ranks `[..., N]` in float64; all NaN along a row that holds a NaN.

    Example:
        >>> ranks(torch.tensor([0.3, 0.1, 0.3, 0.9])).tolist()
        [2.5, 1.0, 2.5, 4.0]
    """
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    mean = (below + up_to + 1).double() / 2
    return mean.masked_fill(values.isnan().any(-1, keepdim=True), torch.nan)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last dimension: Pearson's correlation of ranks, ties averaged.

    Args:
        a: Numbers `[..., N]`.
        b: Numbers of the same shape.

    Returns:
        `[...]` in float64, in [-1, 1]; NaN where one side is constant or holds a NaN.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 8.0, 9.0, 100.0])).item(), 6)
        1.0
    """
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error of the most probable class, over equally wide bins of confidence.

    `ECE = sum_b n_b / N |accuracy_b - confidence_b|` (Guo et al., On Calibration of Modern Neural Networks, eq. 3), with
    bins `((b - 1) / B, b / B]`.

    Args:
        probabilities: Rows that sum to one `[N, C]`.
        labels: Class indices `[N]`.
        bins: Number of bins B.

    Returns:
        Scalar in [0, 1].

    Example:
        >>> calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]))
        tensor(0.4000)
    """
    confidence, predicted = probabilities.max(dim=-1)  # [N], [N]
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)  # [N]
    gap = (predicted == labels).to(confidence.dtype) - confidence  # [N]
    return confidence.new_zeros(bins).index_add_(0, index, gap).abs().sum() / len(labels)


def agreement(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Share of samples on which student and teacher prefer the same class.

    Args:
        student: Logits or probabilities `[N, C]`.
        teacher: Of the same shape.
        reduction: `"mean"` over samples, or `"none"`.

    Returns:
        Scalar, or `[N]`; in [0, 1]. A tie in the student counts by chance, as in `topk_accuracy`.

    Example:
        >>> agreement(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[9.0, 1.0], [3.0, 1.0]]))
        tensor(0.5000)
    """
    return topk_accuracy(student, teacher.argmax(dim=-1), reduction=reduction)


def teacher_kl(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    """How far the student's distribution is from the teacher's: `KL(softmax(teacher) || softmax(student))`.

    Args:
        student: Logits `[N, C]`.
        teacher: Logits of the same shape.
        reduction: `"mean"` over samples, or `"none"`.

    Returns:
        Scalar, or `[N]`; in nats, >= 0.

    Example:
        >>> teacher_kl(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]))
        tensor(0.3278)
    """
    s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    terms = (t.exp() * (t - s)).masked_fill(t.isneginf(), 0)  # a class the teacher rules out adds nothing
    return _reduce(terms.sum(-1), reduction)


def _expected_gain(scores: Tensor, target: Tensor, gain: Tensor) -> Tensor:
    """Mean of `gain` [C] over the ranks that the target's score `[N]` can take among its equals, `[N]`."""
    own = scores.gather(-1, target.unsqueeze(-1))  # [N, 1]
    above = (scores > own).sum(-1)  # [N]
    equal = (scores == own).sum(-1)  # [N], itself included
    total = F.pad(gain.cumsum(0), (1, 0))  # [C + 1]
    mean = (total[above + equal] - total[above]) / equal
    return mean.masked_fill(scores.isnan().any(-1), torch.nan).float()


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    return values.mean() if reduction == "mean" else values
