"""Losses between embeddings `[B, D]`, such as sentence or image vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._math import cosines, divergence, squared_error, unit
from limbeck.losses._reduce import Reduction, check_batch, check_positive, check_same, full_precision, reduce


@full_precision
def cosine_distance(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """One minus the cosine between the embeddings of each sample.

    `1 - cos(s, t)`, the cosine embedding loss of DistilBERT (Sanh et al. 2019).

    Args:
        student: Embeddings `[..., D]`.
        teacher: Embeddings `[..., D]`.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`.

    Returns:
        The loss in fp32 or wider, between 0 and 2; 1, without gradient, for an embedding that is zero.

    Raises:
        UsageError: Shapes differ.

    Example:
        >>> cosine_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(1.)
    """
    check_same("cosine_distance", student, teacher)
    return reduce(1 - (unit(student) * unit(teacher)).sum(-1), reduction)


@full_precision
def embedding_mse(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared error between embeddings.

    `1/D ||s - t||^2` (Reimers and Gurevych 2020, Making Monolingual Sentence Embeddings Multilingual, section 2).

    Args:
        student: Embeddings `[..., D]`.
        teacher: Embeddings `[..., D]`.
        reduction: "mean" | "sum" over samples, or "none" for `[...]`; the mean equals that over all elements.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Shapes differ.

    Example:
        >>> embedding_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.)
    """
    check_same("embedding_mse", student, teacher)
    return reduce(squared_error(student, teacher, keep=student.ndim - 1), reduction)


@full_precision
def similarity_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.05, reduction: Reduction = "mean"
) -> Tensor:
    """KL between the distributions of each sample's cosines to the other samples of the batch.

    `KL(softmax_j(cos(t_i, t_j) / tau) || softmax_j(cos(s_i, s_j) / tau))`, `j != i` (Koohpayegani, Tejankar and
    Pirsiavash 2020, CompRess, with the batch in place of its queue). No `tau^2`.

    Args:
        student: Embeddings `[B, D]`, `B >= 2` (at two the loss is zero: there is one neighbour only).
        teacher: Embeddings `[B, D']`, of any width.
        temperature: `tau > 0`; 0.02 to 0.1 is usual.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider.

    Raises:
        UsageError: Not two batches of embeddings of the same samples, or the temperature is not positive.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> similarity_kl(x @ torch.tensor([[0.0, -3.0], [3.0, 0.0]]), x).abs() < 1e-6
        tensor(True)
    """
    check_batch("similarity_kl", student, teacher, dims=2, at_least=2)
    check_positive("similarity_kl", temperature=temperature)
    log_q, log_p = _log_neighbours(student, temperature), _log_neighbours(teacher, temperature)
    return reduce(divergence(log_p, log_q), reduction)


def _log_neighbours(x: Tensor, temperature: float) -> Tensor:
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (cosines(x, x) / temperature).masked_fill(own, -torch.inf).log_softmax(-1)


@full_precision
def info_nce(student: Tensor, teacher: Tensor, *, temperature: float = 0.05, reduction: Reduction = "mean") -> Tensor:
    """In-batch InfoNCE: pick the teacher's embedding of the same sample out of the batch.

    `-log softmax_j(cos(s_i, t_j) / tau)_i` (van den Oord et al. 2018, eq. 4). For both directions add
    `info_nce(teacher, student)`.

    Args:
        student: Embeddings `[B, D]`, projected to the teacher's width.
        teacher: Embeddings `[B, D]`.
        temperature: `tau > 0`.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`.

    Returns:
        The loss in fp32 or wider; `log B` at chance.

    Raises:
        UsageError: Shapes differ or are not `[B, D]`, or the temperature is not positive.

    Example:
        >>> info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
        tensor(0.5514)
    """
    check_same("info_nce", student, teacher, dims=2)
    check_positive("info_nce", temperature=temperature)
    labels = torch.arange(len(student), device=student.device)
    return reduce(F.cross_entropy(cosines(student, teacher) / temperature, labels, reduction="none"), reduction)
