"""Labels that models give to unlabelled samples: which to believe, and how much."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

# Scores of single samples


def confidence(logits: Tensor) -> Tensor:
    """The probability of the likeliest class `[N]`, of logits `[N, K]`.

    Example:
        >>> confidence(torch.zeros(1, 4)).item()
        0.25
    """
    return logits.softmax(-1).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """The entropy of the class probabilities in nats `[N]`, of logits `[N, K]`; 0 where a class is certain.

    Example:
        >>> round(entropy(torch.zeros(1, 4)).item(), 4)
        1.3863
    """
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The free energy `-T logsumexp(logits / T)` `[N]` (Liu et al. 2020): lower for samples of known classes.

    Example:
        >>> round(energy(torch.zeros(1, 4)).item(), 4)
        -1.3863
    """
    return -temperature * (logits / temperature).logsumexp(-1)


# Selection by confidence


def balanced_thresholds(counts: Tensor, cutoff: float = 0.95) -> Tensor:
    """A confidence to exceed for each class, lower for classes that are predicted less often.

    `cutoff * b / (2 - b)` with `b` the class's count over the largest count: the convex mapping of FlexMatch (Zhang et al.
    2021, section 3.2), here over all samples as in KD^3.

    Args:
        counts: How often each class is predicted `[K]`.
        cutoff: Threshold of the class that is predicted most, in [0, 1].

    Returns:
        Thresholds `[K]`; 0 for a class that is never predicted.

    Example:
        >>> [round(t, 3) for t in balanced_thresholds(torch.tensor([10, 5, 1, 0])).tolist()]
        [0.95, 0.317, 0.05, 0.0]
    """
    share = counts / counts.max().clamp(min=1)
    return cutoff * share / (2 - share)


def confident(logits: Tensor, cutoff: float = 0.95, least: float = 0.1) -> Tensor:
    """Which samples a classifier is sure about, by a threshold for each class (`balanced_thresholds`).

    Args:
        logits: `[N, K]`.
        cutoff: Threshold of the class that is predicted most, in [0, 1].
        least: The share of the samples, those of the highest confidence, that is taken where no sample passes.

    Returns:
        A mask `[N]`, true somewhere.

    Example:
        >>> confident(torch.tensor([[9.0, 0.0], [0.1, 0.0], [8.0, 0.0]])).tolist()
        [True, False, True]
    """
    sure, label = logits.softmax(-1).max(-1)
    thresholds = balanced_thresholds(label.bincount(minlength=logits.shape[-1]), cutoff)
    kept = sure > thresholds[label]
    if not bool(kept.any()):
        kept[sure.topk(max(1, math.ceil(least * len(sure)))).indices] = True
    return kept


# Labels of the nearest labelled samples


def class_similarities(
    features: Tensor, labelled: Tensor, labels: Tensor, num_classes: int, chunk: int = 4096
) -> Tensor:
    """The similarity of each sample to the most similar labelled sample of each class.

    Args:
        features: `[U, D]`, of unit length for cosines.
        labelled: Features of the labelled samples `[L, D]`.
        labels: Their classes `[L]`; each class has at least one sample.
        num_classes: K.
        chunk: Rows of `features` that are compared at once; never is there a matrix of more than `chunk * L` numbers.

    Returns:
        `max_{l of class k} <u, l>` for each sample u and class k, `[U, K]`.

    Raises:
        UsageError: A class has no labelled sample.

    Example:
        >>> class_similarities(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([1, 0]), 2).tolist()
        [[0.0, 1.0]]
    """
    missing = (labels.bincount(minlength=num_classes) == 0).nonzero().flatten()
    if len(missing):
        raise UsageError(
            "classes without a labelled sample",
            where="labels",
            found=f"none of class {', '.join(map(str, missing[:5].tolist()))}",
            expected=f"at least one of each of {num_classes} classes",
            fix="label a sample of each class, or leave those classes out",
        )
    found = features.new_full((len(features), num_classes), -torch.inf)
    for rows, best in zip(features.split(chunk), found.split(chunk), strict=True):
        best.scatter_reduce_(1, labels.expand(len(rows), -1), rows @ labelled.mT, "amax")
    return found


def margin_labels(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo labels with weights: the most similar class, and by how much it is more similar than the second.

    `w = s_1 - s_2`, which WAD writes as `s_1 (1 - s_2 / s_1)` (Du et al. 2023): 0 where two classes tie.

    Args:
        similarities: `[U, K]`, K of 2 or more.

    Returns:
        Labels `[U]` int64, and weights `[U]`, 0 or more; at most 2 for cosines.

    Example:
        >>> label, weight = margin_labels(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
        >>> label[0].item(), weight.tolist()
        (1, [0.5, 0.0])
    """
    top = similarities.topk(2, dim=-1)
    return top.indices[:, 0], top.values[:, 0] - top.values[:, 1]
