"""Losses from information theory."""

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.losses._reduce import Reduction, check_batch, check_positive, check_same, full_precision, reduce


@full_precision
def vid(
    student: Tensor, teacher: Tensor, scale: Tensor, *, epsilon: float = 1e-5, reduction: Reduction = "mean"
) -> Tensor:
    """Variational information distillation (VID): Gaussian negative log-likelihood of the teacher's features.

    `mean 1/2 [(teacher - mu)^2 / v_c + log v_c]`, mu the student's regressed features and
    `v_c = softplus(scale_c) + epsilon` one variance per channel (Ahn et al. 2019, section 2, without the constant,
    averaged over elements as in the official code). May be negative.

    Args:
        student: Predicted means `[B, C, ...]`, the student's features through a regressor.
        teacher: Features of the same shape.
        scale: Learned raw variances `[C]`; `log(exp(v - epsilon) - 1)` starts them at v (the code starts at 5).
        epsilon: Smallest variance, `> 0`.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, or `scale` is not `[C]`.

    Example:
        >>> import torch
        >>> vid(torch.zeros(2, 3), torch.ones(2, 3), torch.full((3,), 0.5413))
        tensor(0.5000)
    """
    check_batch("vid", student, teacher)
    check_same("vid", student, teacher)
    check_positive("vid", epsilon=epsilon)
    if scale.shape != student.shape[1:2]:
        raise UsageError(
            "one variance per channel is needed",
            where="vid, scale",
            found=list(scale.shape),
            expected=list(student.shape[1:2]),
        )
    variance = (F.softplus(scale) + epsilon).reshape(-1, *[1] * (student.ndim - 2))  # [C, 1, ...]
    nll = 0.5 * ((teacher - student).square() / variance + variance.log())
    return reduce(nll.flatten(1).mean(-1), reduction)
