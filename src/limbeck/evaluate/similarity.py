"""How related a task is to what a model was trained on, from features or outputs `[N, D]` and labels `[N]`; no training.

Higher is more related. The measures have scales of their own: compare models by one of them, never one measure with
another. All are heuristics: good general features score well whatever labels they were learned from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.evaluate.metrics import spearman, topk_accuracy

_DECIMALS = 8  # of distances: equal ones then share a rank, which the last bits would break


def parc(features: Tensor, labels: Tensor, pca: int | None = 32) -> Tensor:
    """Pairwise annotation representation comparison: are samples of one class near each other, and of two far apart?

    `100 spearman(R^f, R^y)` over pairs of samples, `R^f = 1 - pearson(f_i, f_j)` of standardised features, `R^y` the same
    of one-hot labels (Bolya, Mittapalli and Hoffman 2021, section 3). `R^y` has two values only, so it is taken as the
    indicator of different classes, whose ties are exact.

    Args:
        features: `[N, D]`; time and memory grow with N^2, some hundreds are enough.
        labels: Class indices `[N]`, two classes or more, one of them twice or more.
        pca: Principal components that are kept first, where there are more features; None keeps the features.

    Returns:
        Scalar float64 in [-100, 100].

    Raises:
        UsageError: Shapes do not fit, or the labels have no two pairs to tell apart.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
        >>> round(parc(F.one_hot(labels), labels).item(), 4)
        100.0
    """
    x = _checked("parc", features, labels)
    if pca is not None and pca < x.shape[1]:
        x = _components(x, pca)
    spread = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(spread > 0, spread, 1)
    return 100 * spearman(_distances(x), _different(labels))


def rsa(features: Tensor, labels: Tensor) -> Tensor:
    """Representational similarity analysis between features and labels: PARC without standardising and components.

    `spearman(R^f, R^y)` (Dwivedi and Roig 2019, section 3, with the labels as the second representation).

    Args:
        features: `[N, D]`.
        labels: Class indices `[N]`, two classes or more, one of them twice or more.

    Returns:
        Scalar float64 in [-1, 1].

    Raises:
        UsageError: As `parc`.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
        >>> round(rsa(F.one_hot(labels), labels).item(), 4)
        1.0
    """
    return spearman(_distances(_checked("rsa", features, labels)), _different(labels))


def linear_cka(features: Tensor, labels: Tensor) -> Tensor:
    """Centred kernel alignment with linear kernels between features and one-hot labels.

    `|Y^T X|^2 / (|X^T X| |Y^T Y|)`, Frobenius norms, columns centred (Kornblith et al. 2019, section 3).

    Args:
        features: `[N, D]`.
        labels: Class indices `[N]`.

    Returns:
        Scalar float64 in [0, 1].

    Raises:
        UsageError: As `parc`.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
        >>> round(linear_cka(3 * F.one_hot(labels) + 1, labels).item(), 4)
        1.0
    """
    x = _checked("linear_cka", features, labels)
    y = F.one_hot(labels).to(x.dtype)
    x, y = x - x.mean(0), y - y.mean(0)
    # The smaller of the two Gram matrices has the same norm.
    own = (x @ x.T if len(x) < x.shape[1] else x.T @ x).norm()
    return (y.T @ x).square().sum() / (own * (y.T @ y).norm()).clamp_min(torch.finfo(x.dtype).tiny)


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Accuracy of the k nearest neighbours by cosine similarity, each sample judged by the others.

    Classes with equally many votes are taken to be in random order, and the expectation is returned.

    Args:
        features: `[N, D]`.
        labels: Class indices `[N]`.
        k: Neighbours, 1 to N - 1.

    Returns:
        Scalar float64 in [0, 1].

    Raises:
        UsageError: As `parc`, or fewer samples than neighbours.

    Example:
        >>> line = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> knn_accuracy(line, torch.tensor([0, 0, 1, 1]), k=1)
        tensor(1., dtype=torch.float64)
    """
    x = _checked("knn_accuracy", features, labels)
    if not 1 <= k < len(x):
        raise UsageError(
            "there are not that many neighbours", where="knn_accuracy", found=k, expected=f"1 to {len(x) - 1}"
        )
    x = F.normalize(x, dim=1)
    near = (x @ x.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices  # [N, k]
    votes = F.one_hot(labels)[near].sum(1).to(x.dtype)  # [N, C]
    return topk_accuracy(votes, labels).double()


def leep(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Log expected empirical prediction: how well the labels follow from a classifier's own classes.

    `1/N sum_i log sum_z P(y_i | z) theta(x_i)_z`, `P(y, z)` the mean of `theta(x)_z` over the samples of class y (Nguyen et
    al. 2020, section 3).

    Args:
        probabilities: What the classifier gives its own Z classes, `[N, Z]`, rows that sum to one.
        labels: Class indices `[N]`.

    Returns:
        Scalar float64, at most 0; its exponential is a likelihood per sample, in (0, 1].

    Raises:
        UsageError: As `parc`.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(leep(torch.full((4, 3), 1 / 3), labels).exp().item(), 4)
        0.5
    """
    theta = _checked("leep", probabilities, labels)
    joint = F.one_hot(labels).to(theta.dtype).T @ theta / len(theta)  # [C, Z]
    given = joint / joint.sum(0).clamp_min(torch.finfo(theta.dtype).tiny)  # P(y | z)
    return (given[labels] * theta).sum(1).log().mean()


def _components(x: Tensor, count: int) -> Tensor:
    """The first principal components `[N, count]`; the largest entry of each direction is made positive."""
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:count]  # [count, D]
    # Correlations between samples depend on the signs, which the decomposition leaves open.
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return x @ (signs * directions).T


def _distances(x: Tensor) -> Tensor:
    """`1 - pearson` of all pairs of rows, `[N (N - 1) / 2]`."""
    x = x - x.mean(1, keepdim=True)
    x = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)
    return _pairs(1 - x @ x.T).round(decimals=_DECIMALS)


def _different(labels: Tensor) -> Tensor:
    """Whether the samples of each pair have different classes, 0 or 1."""
    return _pairs((labels[:, None] != labels).double())


def _pairs(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1, device=matrix.device)
    return matrix[rows, columns]


def _checked(where: str, features: Tensor, labels: Tensor) -> Tensor:
    """The features in float64."""
    whole = labels.ndim == 1 and not labels.is_floating_point()
    if features.ndim != 2 or not whole or len(features) != len(labels):
        raise UsageError(
            "features and labels do not fit",
            where=where,
            found=f"{list(features.shape)} and {labels.dtype} {list(labels.shape)}",
            expected="[N, D] and class indices [N]",
        )
    counts = labels.bincount()
    if int((counts > 0).sum()) < 2 or int(counts.max()) < 2:
        raise UsageError(
            "these labels tell no pairs of samples apart",
            where=where,
            found=f"{len(labels)} samples of {int((counts > 0).sum())} classes",
            expected="two classes or more, and two samples or more of one of them",
            fix="give more labelled samples",
        )
    return features.double()
