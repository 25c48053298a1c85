"""Losses between two views of pairs: which image goes with which text, as the teacher sees it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.losses._math import cosines
from limbeck.losses._reduce import Reduction, full_precision, reduce


def affinity_mimicking(
    student_images: Tensor,
    student_texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    *,
    student_scale: float | Tensor = 50.0,
    teacher_scale: float | Tensor = 50.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross entropy from the teacher's affinities between images and texts to the student's, in both directions.

    `L = (L_i2t + L_t2i) / 2`, `L_i2t = mean_i CE(softmax_j(k_t I_t T_t^T), k_s I_s T_s^T)` and the same with texts first (Wu
    et al. 2023, TinyCLIP). The diagonal, where the pairs are, is not special. It is the divergence plus the teacher's entropy.

    Args:
        student_images: Embeddings of N images `[N, D_s]`; all are normalised here.
        student_texts: Those of their texts `[N, D_s]`.
        teacher_images: The teacher's `[N, D_t]`; no gradient reaches them.
        teacher_texts: `[N, D_t]`.
        student_scale: `k_s`, the inverse temperature.
        teacher_scale: `k_t`.
        reduction: `mean | sum | none` over pairs; a pair's loss is half that of its image's row and half of its text's column.

    Returns:
        The loss in fp32 or wider, a scalar, or `[N]` for `none`.

    Raises:
        UsageError: Numbers of pairs differ.

    Example:
        >>> affinity_mimicking(*[torch.eye(2)] * 4, student_scale=0.0, teacher_scale=1.0)
        tensor(0.6931)
    """
    logits = affinities(student_images, student_texts, student_scale)
    target = affinities(teacher_images, teacher_texts, teacher_scale).detach()
    if logits.shape != target.shape:
        found, expected = f"student {list(logits.shape)}", f"teacher {list(target.shape)}"
        raise UsageError(
            "student and teacher saw other pairs", where="affinity_mimicking", found=found, expected=expected
        )
    rows = -(target.softmax(1) * logits.log_softmax(1)).sum(1)
    columns = -(target.softmax(0) * logits.log_softmax(0)).sum(0)
    return reduce((rows + columns) / 2, reduction)


def clip_loss(images: Tensor, texts: Tensor, *, scale: float | Tensor = 50.0, reduction: Reduction = "mean") -> Tensor:
    """Symmetric InfoNCE: of N texts the one that belongs to each image, and the other way round (Radford et al. 2021).

    Args:
        images: `[N, D]`; normalised here.
        texts: `[N, D]`, in the order of the images.
        scale: Inverse temperature.
        reduction: `mean | sum | none` over pairs.

    Returns:
        The loss in fp32 or wider, a scalar, or `[N]` for `none`.

    Example:
        >>> clip_loss(torch.eye(2), torch.eye(2), scale=1.0)
        tensor(0.3133)
    """
    logits = affinities(images, texts, scale)
    own = torch.arange(len(logits), device=logits.device)
    rows = F.cross_entropy(logits, own, reduction="none")
    columns = F.cross_entropy(logits.T, own, reduction="none")
    return reduce((rows + columns) / 2, reduction)


@full_precision
def affinities(images: Tensor, texts: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Scaled cosines of every image with every text.

    Args:
        images: `[N, D]`.
        texts: `[N, D]`.
        scale: Inverse temperature.

    Returns:
        Logits `[N, N]` in fp32 or wider: at a scale of 50, half precision is too coarse for a softmax.

    Raises:
        UsageError: Images and texts are not as many, or not of one size.

    Example:
        >>> affinities(torch.eye(2), torch.eye(2), 50.0)
        tensor([[50.,  0.],
                [ 0., 50.]])
    """
    if images.shape != texts.shape or images.ndim != 2:
        found = f"{list(images.shape)} and {list(texts.shape)}"
        raise UsageError("images and texts are no pairs", where="affinities", found=found, expected="[N, D] twice")
    return scale * cosines(images, texts)
