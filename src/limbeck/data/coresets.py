"""Real samples that stand for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import UsageError, require
from limbeck.data.incremental import herd


def medoids(features: Tensor, labels: Tensor, centres: int, near: int = 1, seed: int = 0) -> Tensor:
    """Samples nearest to the centres of k-means, class by class; each is taken once.

    Args:
        features: `[N, D]`.
        labels: `[N]`.
        centres: Of each class.
        near: Samples taken at each centre.
        seed: Of k-means.

    Returns:
        Rows `[C * centres * near]`.

    Raises:
        UsageError: A class has fewer samples than are asked for.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
        >>> medoids(x, torch.tensor([0, 0, 0, 1]), 1).tolist()
        [1, 3]
    """
    kmeans = require("sklearn.cluster", extra="vision").KMeans
    rows = []
    for c in range(int(labels.max()) + 1):
        own = (labels == c).nonzero()[:, 0]
        _enough(own, centres * near, c)
        found = kmeans(centres, random_state=seed, n_init=10).fit(features[own].double().numpy())
        distances = torch.cdist(torch.from_numpy(found.cluster_centers_), features[own].double())
        for row in distances:
            free = row.argsort()[:near]
            rows.append(own[free])
            distances[:, free] = torch.inf  # a later centre takes others
    return torch.cat(rows)


def herding(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Samples whose mean is near that of their class (Welling 2009; iCaRL), class by class.

    Args:
        features: `[N, D]`.
        labels: `[N]`.
        count: Of each class.

    Returns:
        Rows `[C * count]`.

    Raises:
        UsageError: A class has fewer samples than are asked for.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> herding(x, torch.tensor([0, 0, 0, 1]), 1).tolist()
        [1, 3]
    """
    rows = []
    for c in range(int(labels.max()) + 1):
        own = (labels == c).nonzero()[:, 0]
        _enough(own, count, c)
        rows.append(own[herd(features[own], count)])
    return torch.cat(rows)


def _enough(own: Tensor, count: int, c: int) -> None:
    if len(own) < count:
        raise UsageError("a class has too few samples", where=f"class {c}", found=len(own), expected=f">= {count}")
