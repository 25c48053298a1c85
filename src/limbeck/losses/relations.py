"""Losses on relations between the samples of a batch; student and teacher may differ in width, except in `crd`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.losses._math import cosines, unit
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
def pkt(student: Tensor, teacher: Tensor, *, variant: Variant = "code", reduction: Reduction = "mean") -> Tensor:
    """Probabilistic knowledge transfer (PKT): who is whose neighbour, as probabilities.

    `sum_i p_{i|j} log(p_{i|j} / q_{i|j})` per sample j, with `p_{i|j}` proportional to `(cos(t_i, t_j) + 1) / 2` and q
    likewise from the student (Passalis and Tefas 2018, section 3).

    Args:
        student: Embeddings `[B, D]`, `B >= 2`.
        teacher: Embeddings `[B, D']`.
        variant: "paper" leaves the sample itself out of its neighbours and adds up the divergence. "code", the default,
            keeps it in and averages over all `B^2` pairs, which is what the published weight of 30,000 multiplies.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider, with 1e-7 inside the logarithm.

    Raises:
        UsageError: Not two batches of embeddings of the same samples.

    Example:
        >>> pkt(torch.eye(3), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), variant="paper")
        tensor(0.0378)
    """
    check_batch("pkt", student, teacher, dims=2, at_least=2)
    check_choice("variant", variant, ("paper", "code"))
    q, p = _neighbours(student, variant), _neighbours(teacher, variant)
    terms = p * ((p + 1e-7) / (q + 1e-7)).log()
    return reduce(terms.sum(-1) if variant == "paper" else terms.mean(-1), reduction)


def _neighbours(x: Tensor, variant: Variant) -> Tensor:
    kernel = (cosines(x, x) + 1) / 2
    if variant == "paper":
        kernel = kernel.masked_fill(_own(x), 0)
    return kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-7)


@full_precision
def rkd_distance(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Relational knowledge distillation, distance-wise: the pattern of distances, up to one scale.

    `mean_ij huber(d_ij / mean(d))` between student and teacher, d the Euclidean distances (Park et al. 2019, section
    3.2.1). The scale is the mean over pairs of different samples; the loss averages over all `B^2` entries, as in the
    official code (its diagonal is zero), where the paper adds up. Usual weight 25.

    Args:
        student: Embeddings `[B, D]`, `B >= 2`.
        teacher: Embeddings `[B, D']`.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Not two batches of embeddings of the same samples.

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [2.0]])
        >>> rkd_distance(torch.eye(3), line)
        tensor(0.0417)
    """
    check_batch("rkd_distance", student, teacher, dims=2, at_least=2)
    return reduce(F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none").mean(-1), reduction)


def _distances(x: Tensor) -> Tensor:
    """Distances `[B, B]` in units of their mean."""
    # The matrix-product shortcut cancels badly for close points.
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d / (d.sum() / (len(x) * (len(x) - 1))).clamp_min(1e-12)


@full_precision
def rkd_angle(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Relational knowledge distillation, angle-wise: the angles of all triangles of samples.

    `mean_ijk huber(cos angle_ijk)` between student and teacher, the angle at vertex j (Park et al. 2019, section
    3.2.2). Averages over all `B^3` entries, as in the official code, where the paper adds up. Memory `B^2 max(B, D)`.
    Usual weight 50.

    Args:
        student: Embeddings `[B, D]`.
        teacher: Embeddings `[B, D']`.
        reduction: "mean" | "sum" over vertices, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider. Coinciding samples have no direction: cosine zero, no gradient.

    Raises:
        UsageError: Not two batches of embeddings of the same samples.

    Example:
        >>> corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> rkd_angle(5 * corner + 1, corner)
        tensor(0.)
    """
    check_batch("rkd_angle", student, teacher, dims=2)
    gap = F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
    return reduce(gap.flatten(1).mean(-1), reduction)


def _angles(x: Tensor) -> Tensor:
    """Cosines `[B, B, B]` of the angles at each vertex (first dimension)."""
    directions = unit(x - x.unsqueeze(1))  # [B, B, D]
    return directions @ directions.mT


@full_precision
def crd(
    student: Tensor,
    teacher: Tensor,
    negatives: Tensor | None = None,
    *,
    dataset_size: int,
    temperature: float = 0.07,
    log_normaliser: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Contrastive representation distillation (CRD): tell the teacher's embedding of a sample from those of K others.

    `-log h(s, t+) - sum_k log(1 - h(s, t_k))`, `h(s, t) = g / (g + K/M)`, `g = exp(cos(s, t) / tau) / Z`
    (Tian et al. 2020, section 3.1, noise-contrastive estimation). This is one side; the official code adds the other,
    the teacher as anchor against student embeddings: `crd(s, t, bank_t, ...) + crd(t, s, bank_s, ...)`.

    Args:
        student: Anchors `[B, D]`, already projected; brought to length one here, like all embeddings.
        teacher: Positives `[B, D]`.
        negatives: Embeddings of other samples, `[K, D]` shared or `[B, K, D]` per anchor, such as rows of a memory
            bank. None takes the other samples of the batch (`K = B - 1`).
        dataset_size: M, the number of samples that negatives are drawn from.
        temperature: `tau > 0`.
        log_normaliser: `log Z`. The paper's h has `Z = 1`; the official code fixes Z after its first batch as M times
            the mean of `exp(cos / tau)`, which starts `h` at its chance level `1 / (K + 1)`.
        reduction: "mean" | "sum" over anchors, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider, in the order of K per anchor.

    Raises:
        UsageError: Shapes do not fit, or no negatives.

    Example:
        >>> crd(torch.eye(4), torch.eye(4), dataset_size=1000, temperature=1.0)
        tensor(17.4375)
    """
    check_same("crd", student, teacher, dims=2)
    check_positive("crd", temperature=temperature, dataset_size=dataset_size)
    if negatives is None:
        check_batch("crd", student, teacher, at_least=2)
        scores, positive = cosines(student, teacher), _own(student)
    else:
        _check_negatives(negatives, student)
        own = (unit(student) * unit(teacher)).sum(-1, keepdim=True)
        other = (unit(student).unsqueeze(1) @ unit(negatives).mT).squeeze(1)
        scores = torch.cat([own, other], dim=-1)  # [B, 1 + K]
        positive = torch.arange(scores.shape[1], device=scores.device) == 0
    count = scores.shape[1] - 1
    evidence = scores / temperature - log_normaliser - math.log(count / dataset_size)
    # -log h = softplus(-evidence) and -log(1 - h) = softplus(evidence)
    return reduce(F.softplus(torch.where(positive, -evidence, evidence)).sum(-1), reduction)


def _check_negatives(negatives: Tensor, student: Tensor) -> None:
    batch, width = student.shape
    per_anchor = negatives.ndim == 3 and len(negatives) == batch
    if not (negatives.ndim == 2 or per_anchor) or negatives.shape[-1] != width or not negatives.numel():
        raise UsageError(
            "negatives do not fit the anchors",
            where="crd",
            found=list(negatives.shape),
            expected=f"[K, {width}] or [{batch}, K, {width}], K >= 1",
        )


def _own(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=torch.bool, device=x.device)
