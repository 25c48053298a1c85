"""Losses between intermediate features; projectors are applied before the call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._math import squared_error, unit
from limbeck.losses._reduce import (
    Reduction,
    Variant,
    check_batch,
    check_choice,
    check_positive,
    check_same,
    full_precision,
    reduce,
)


@full_precision
def hint(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """FitNet hint: mean squared error between feature maps.

    `mean (student - teacher)^2`, the student's features already through the regressor (Romero et al. 2015, eq. 3, which
    sums and halves; implementations average).

    Args:
        student: Features `[B, ...]`.
        teacher: Features of the same shape.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`; the mean equals that over all elements.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, or there is no feature dimension.

    Example:
        >>> hint(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), reduction="sum")
        tensor(2.)
    """
    check_batch("hint", student, teacher)
    check_same("hint", student, teacher)
    return reduce(squared_error(student, teacher, keep=1), reduction)


@full_precision
def simkd(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """SimKD: the projected student reproduces the features that enter the teacher's classifier, which it then reuses.

    `mean (P(student) - teacher)^2` (Chen et al. 2022, section 3, averaged over elements as in the official code), and
    no other loss.

    Args:
        student: Projected features `[B, ...]`: maps before pooling, as in the paper, or pooled vectors.
        teacher: Features of the same shape.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`; the mean equals that over all elements.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, or there is no feature dimension.

    Example:
        >>> simkd(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)
    """
    check_batch("simkd", student, teacher)
    check_same("simkd", student, teacher)
    return reduce(squared_error(student, teacher, keep=1), reduction)


@full_precision
def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 2.0,
    variant: Variant = "code",
    reduction: Reduction = "mean",
) -> Tensor:
    """Attention transfer (AT): where in the image the activations are.

    `Q = sum_c |A_c|^p` per position, as a vector of length one. "paper": `||Q_s - Q_t||_2` (Zagoruyko and Komodakis
    2017, eq. 2). "code": the mean over positions of `(Q_s - Q_t)^2`, which the authors' code minimises.

    Args:
        student: Feature map `[B, C, H, W]`.
        teacher: Feature map `[B, C', H', W']`; the larger map is average-pooled to the smaller.
        power: `p > 0`; a larger one looks at the strongest channels, one below 1 has an infinite gradient at zero.
        variant: "code", the default, goes with the usual weight of 1000; "paper" needs a far smaller one.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider. A map that is zero everywhere has attention zero and gets no gradient.

    Raises:
        UsageError: Not two maps of the same samples, or an unknown variant.

    Example:
        >>> left, right = torch.eye(2).reshape(2, 1, 1, 2)
        >>> attention_transfer(left[None], right[None], variant="paper")
        tensor(1.4142)
    """
    check_batch("attention_transfer", student, teacher, dims=4)
    check_positive("attention_transfer", power=power)
    check_choice("variant", variant, ("paper", "code"))
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    gap = _attention(student, size, power) - _attention(teacher, size, power)
    per_sample = gap.square().mean(-1) if variant == "code" else torch.linalg.vector_norm(gap, dim=-1)
    return reduce(per_sample, reduction)


def _attention(features: Tensor, size: tuple[int, int], power: float) -> Tensor:
    if features.shape[2:] != size:
        features = F.adaptive_avg_pool2d(features, size)
    return unit(features.abs().pow(power).sum(1).flatten(1))


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Similarity-preserving distillation (SP): samples alike for the teacher are alike for the student.

    `1/B^2 ||G_s - G_t||_F^2`, G the matrix of inner products of flattened features with rows of length one (Tung and
    Mori 2019, eq. 2-4). Blind to the scale and rotation of features, and to their number.

    Args:
        student: Features `[B, ...]`.
        teacher: Features `[B, ...]` of any other shape.
        reduction: "mean" | "sum" over rows of G, or "none" for `[B]`, each `1/B` times its squared difference.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Not the same samples.

    Example:
        >>> similarity_preserving(torch.eye(2), torch.ones(2, 3))
        tensor(0.2929)
    """
    check_batch("similarity_preserving", student, teacher)
    s, t = student.flatten(1), teacher.flatten(1)
    return reduce((unit(s @ s.mT) - unit(t @ t.mT)).square().mean(-1), reduction)


@full_precision
def hcl(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Hierarchical context loss (ReviewKD): mean squared errors over a pyramid of pooled maps.

    `sum_l w_l mean (pool_l(student) - pool_l(teacher))^2 / sum_l w_l`, at full size (`w = 1`) and pooled to 4x4, 2x2
    and 1x1 (`w = 1/2, 1/4, 1/8`), sizes not below the map's own left out (Chen et al. 2021, section 3; numbers of the
    official code). One call per level of the network, added up: `sum(hcl(s, t) for s, t in zip(students, teachers))`.

    Args:
        student: Fused feature map `[B, C, H, W]`.
        teacher: Feature map of the same shape.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ or are not `[B, C, H, W]`.

    Example:
        >>> hcl(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
        tensor(1.)
    """
    check_same("hcl", student, teacher, dims=4)
    total, weight, weights = squared_error(student, teacher, keep=1), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(student.shape[2:]):
            weight /= 2
            weights += weight
            pooled = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
            total = total + weight * squared_error(*pooled, keep=1)
    return reduce(total / weights, reduction)
