"""Losses between class logits `[..., C]`: every leading dimension counts as samples."""

import math
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.losses._math import divergence, squared_error, unit
from limbeck.losses._reduce import (
    Reduction,
    Variant,
    check_choice,
    check_classes,
    check_labels,
    check_positive,
    check_same,
    full_precision,
    reduce,
)


@full_precision
def kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    reduction: Reduction = "mean",
) -> Tensor:
    """Kullback-Leibler divergence between softened class distributions, times the temperature squared.

    `tau^2 KL(p || q)`, `p = softmax(teacher / tau)`, `q = softmax(student / tau)` (Hinton, Vinyals and Dean 2015,
    section 2; the factor keeps gradients of one size whatever the temperature). `direction="reverse"` is
    `tau^2 KL(q || p)`.

    Args:
        student: Logits `[..., C]`. A class masked with -inf on both sides drops out.
        teacher: Logits `[..., C]`.
        temperature: `tau > 0`.
        direction: "forward" covers all the teacher's classes, "reverse" seeks its modes.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider; inf where the second distribution excludes a class that the first allows.

    Raises:
        UsageError: Shapes differ, the temperature is not positive, or a word is unknown.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kl(torch.zeros(1, 3), teacher, temperature=2.0)
        tensor(0.7706)
    """
    log_q, log_p = _soft_pair("kl", student, teacher, temperature)
    check_choice("direction", direction, ("forward", "reverse"))
    per_sample = divergence(log_p, log_q) if direction == "forward" else divergence(log_q, log_p)
    return reduce(temperature**2 * per_sample, reduction)


@full_precision
def symmetric_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Mean of the two Kullback-Leibler divergences between class distributions, times the temperature squared.

    `tau^2 / 2 [KL(p || q) + KL(q || p)] = tau^2 / 2 sum_c (p_c - q_c)(log p_c - log q_c)`, p of the teacher, q of the student:
    half of Jeffreys' divergence. The code of Cui et al. 2021 (SSLD) calls it Jensen-Shannon, which it is not: it has no bound,
    and where the two agree it is four times that.

    Args:
        student: Logits `[..., C]`. A class masked with -inf on both sides drops out.
        teacher: Logits `[..., C]`.
        temperature: `tau > 0`.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider; inf where one distribution excludes a class that the other allows.

    Raises:
        UsageError: Shapes differ, or the temperature is not positive.

    Example:
        >>> symmetric_kl(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.4621)
    """
    log_q, log_p = _soft_pair("symmetric_kl", student, teacher, temperature)
    return reduce(temperature**2 * (divergence(log_p, log_q) + divergence(log_q, log_p)) / 2, reduction)


@full_precision
def jensen_shannon(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    continuous: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalised Jensen-Shannon divergence, times the temperature squared.

    `beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`, p of the teacher, q of the student (Agarwal
    et al. 2024, GKD, section 2). It vanishes as beta nears 0 or 1, so exactly there the convention of GKD's
    implementations holds: 0 means forward KL and 1 reverse KL, a jump. `continuous=True` divides by `beta (1 - beta)`,
    which has these two KLs as its limits and is four times the Jensen-Shannon divergence at 0.5.

    Args:
        student: Logits `[..., C]`. A class masked with -inf on both sides drops out.
        teacher: Logits `[..., C]`.
        beta: Weight of the teacher, `0 <= beta <= 1`.
        temperature: `tau > 0`.
        continuous: Divide by `beta (1 - beta)`.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider, at most `tau^2 log 2` at `beta = 0.5`.

    Raises:
        UsageError: Shapes differ, or a number is out of range.

    Example:
        >>> apart = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
        >>> jensen_shannon(*apart)
        tensor(0.6931)
    """
    log_q, log_p = _soft_pair("jensen_shannon", student, teacher, temperature)
    if not 0 <= beta <= 1:
        raise UsageError("beta must lie in [0, 1]", where="jensen_shannon", found=beta)
    if beta in (0, 1):
        per_sample = divergence(log_p, log_q) if beta == 0 else divergence(log_q, log_p)
        return reduce(temperature**2 * per_sample, reduction)
    # The gradient of logaddexp(-inf, -inf) is not a number; one finite side is enough.
    absent = log_p.isneginf() & log_q.isneginf()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q.masked_fill(absent, 0) + math.log1p(-beta))
    per_sample = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
    scale = temperature**2 / (beta * (1 - beta) if continuous else 1)
    return reduce(scale * per_sample, reduction)


@full_precision
def standardise(logits: Tensor, *, variant: Variant = "code") -> Tensor:
    """Logits shifted to mean zero and scaled to standard deviation one, sample by sample.

    `(z - mean(z)) / (std(z) + 1e-7)` (Sun et al. 2024, Logit Standardization in Knowledge Distillation, algorithm 1).
    Applied to both sides before `kl`, it asks the student for the teacher's order and spacing and not for its scale.
    Both teacher and student go through it: `kl(standardise(student), standardise(teacher), temperature=2.0)`.

    Args:
        logits: `[..., C]`, finite.
        variant: "paper" takes the population deviation (over C), "code", the default, the sample deviation
            (over C - 1) that the published numbers were made with; the two differ by the factor `sqrt((C - 1) / C)`.

    Returns:
        `[..., C]` in fp32 or wider; zeros where all logits of a sample are equal.

    Raises:
        UsageError: The variant is unknown.

    Example:
        >>> standardise(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.0000,  0.0000,  1.0000])
    """
    check_choice("variant", variant, ("paper", "code"))
    spread = logits.std(-1, correction=int(variant == "code"), keepdim=True)
    return (logits - logits.mean(-1, keepdim=True)) / (spread + 1e-7)


@full_precision
def soft_cross_entropy(student: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy of the student with soft labels.

    `-sum_c target_c log softmax(student)_c`: the forward KL plus the entropy of the target.

    Args:
        student: Logits `[..., C]`. A class masked with -inf drops out where its target is 0.
        target: Probabilities `[..., C]` that sum to one (not checked); exact zeros and ones are fine.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        tensor(1.3863)
    """
    check_same("soft_cross_entropy", student, target)
    log_q = student.log_softmax(-1).masked_fill(target == 0, 0)
    return reduce(-(target * log_q).sum(-1), reduction)


@full_precision
def logit_mse(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared error on logits.

    `1/C sum_c (student_c - teacher_c)^2` (Ba and Caruana 2014, eq. 1, up to a constant). Half of it, on centred logits,
    is the limit of `kl` at high temperature.

    Args:
        student: Logits `[..., C]`, finite.
        teacher: Logits `[..., C]`, finite.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`; the mean equals that over all elements.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor(5.)
    """
    check_same("logit_mse", student, teacher)
    return reduce(squared_error(student, teacher, keep=student.ndim - 1), reduction)


@full_precision
def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled knowledge distillation: the label against the rest, and the rest among themselves.

    `tau^2 (alpha TCKD + beta NCKD)` (Zhao et al. 2022, eq. 7): TCKD is the KL of the two-way distribution (label, all
    others), NCKD the KL over the other classes alone. Plain KD is `alpha = 1, beta = 1 - p_label(teacher)` (eq. 6). The
    official code takes the label out by subtracting 1000 from its logit and takes the logarithm of a softmax; here both
    are exact in the log domain, equal for ordinary logits and finite for extreme ones. Its warm-up over epochs is the
    caller's.

    Args:
        student: Logits `[..., C]`, `C >= 2`.
        teacher: Logits `[..., C]`.
        labels: Class indices `[...]` in `0 .. C - 1`.
        alpha: Weight of TCKD.
        beta: Weight of NCKD; the paper's best lies between 0.5 (ImageNet) and 8 (CIFAR-100).
        temperature: `tau > 0`; 4 on CIFAR-100, 1 on ImageNet.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ, a label is out of range (on the CPU), or the temperature is not positive.

    Example:
        >>> teacher = torch.tensor([[4.0, 0.0, -4.0]])
        >>> dkd(torch.zeros(1, 3), teacher, torch.tensor([0]))
        tensor(17.8661)
    """
    check_same("dkd", student, teacher)
    check_classes("dkd", student)
    check_positive("dkd", temperature=temperature)
    labels = check_labels("dkd", labels, student).unsqueeze(-1)
    binary_q, others_q = _decoupled(student / temperature, labels)
    binary_p, others_p = _decoupled(teacher / temperature, labels)
    per_sample = alpha * divergence(binary_p, binary_q) + beta * divergence(others_p, others_q)
    return reduce(temperature**2 * per_sample, reduction)


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, not label) `[..., 2]` and of the other classes among themselves `[..., C]`."""
    others = logits.scatter(-1, labels, -torch.inf)
    binary = torch.cat([logits.gather(-1, labels), others.logsumexp(-1, keepdim=True)], dim=-1)
    return binary.log_softmax(-1), others.log_softmax(-1)


@full_precision
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    variant: Variant = "code",
    reduction: Reduction = "mean",
) -> Tensor:
    """DIST: correlation of predictions within each sample (inter-class) and within each class (intra-class).

    `tau^2 (beta mean_b [1 - r(q_b, p_b)] + gamma mean_c [1 - r(q_:c, p_:c)])`, r Pearson's correlation of softened
    probabilities (Huang et al. 2022, section 4).

    Args:
        student: Logits `[B, C]`; flatten pixels or tokens into B first.
        teacher: Logits `[B, C]`.
        beta: Weight of the inter-class term.
        gamma: Weight of the intra-class term.
        temperature: `tau > 0`.
        variant: "paper" is the exact correlation. "code", the default, adds 1e-8 to the product of the two norms as the
            official code does: classes that nobody predicts in this batch then count for little.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`; the intra-class term belongs to the whole batch and
            is added to each sample.

    Returns:
        The loss in fp32 or wider, between 0 and `2 tau^2 (beta + gamma)`.

    Raises:
        UsageError: Shapes differ or are not `[B, C]`, the temperature is not positive, or a word is unknown.

    Example:
        >>> teacher = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> dist(teacher.flip(0), teacher)
        tensor(3.1667)
    """
    check_same("dist", student, teacher, dims=2)
    check_positive("dist", temperature=temperature)
    check_choice("variant", variant, ("paper", "code"))
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    inter = 1 - _correlation(q, p, variant)  # [B]
    intra = 1 - _correlation(q.mT, p.mT, variant).mean()
    return reduce(temperature**2 * (beta * inter + gamma * intra), reduction)


def _correlation(x: Tensor, y: Tensor, variant: Variant) -> Tensor:
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    if variant == "paper":
        return (unit(x) * unit(y)).sum(-1)
    return (x * y).sum(-1) / (torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1) + 1e-8)


def _soft_pair(where: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher at one temperature."""
    check_same(where, student, teacher)
    check_positive(where, temperature=temperature)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
