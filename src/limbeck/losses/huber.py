"""Distances that are squared near 0 and straight far off."""

from __future__ import annotations

from torch import Tensor

from limbeck.losses._reduce import Reduction, check_positive, check_same, full_precision, reduce


@full_precision
def pseudo_huber(student: Tensor, teacher: Tensor, c: float = 1e-3, *, reduction: Reduction = "mean") -> Tensor:
    """`sqrt((student - teacher)^2 + c^2) - c`, averaged over a sample's elements (as LCM and MCM use it).

    Args:
        student: `[B, ...]`.
        teacher: Of the same shape.
        c: Where it turns from squared to straight, above 0.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Raises:
        UsageError: Shapes differ, or c is not positive.

    Example:
        >>> import torch
        >>> pseudo_huber(torch.tensor([[3.0]]), torch.tensor([[0.0]]), 4.0)
        tensor(1.)
    """
    check_same("pseudo_huber", student, teacher)
    check_positive("pseudo_huber", c=c)
    gaps = ((student - teacher).square() + c**2).sqrt() - c
    return reduce(gaps.flatten(1).mean(1), reduction)
