"""Real samples that stand for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError, require
from limbeck.core.source import Source
from limbeck.data.augment import augment
from limbeck.data.condensed import per_class
from limbeck.data.ids import mix
from limbeck.data.incremental import herd

Difficulty = Literal["easy", "medium", "hard"]


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


@torch.no_grad()
def mosaics(
    source: Source,
    answer: Callable[[Tensor], Tensor],
    images_per_class: int,
    *,
    factor: int = 2,
    candidates: int = 300,
    crops: int = 5,
    difficulty: Difficulty = "easy",
    seed: int = 0,
) -> Tensor:
    """Images put together of real patches that a trained network judged (RDED, Sun et al. 2024), class by class.

    Of every candidate, the one of `crops` random crops whose class the network knows best becomes a patch, `factor` times
    smaller than an image; of all patches of a class, sorted by loss, `factor^2` go into each image.

    Args:
        source: Labelled images `[C, H, W]`.
        answer: The network's logits `[B, classes]` of images `[B, C, H, W]`; patches are shown to it amid zeros.
        images_per_class: Images of each class.
        factor: Patches along each side of an image.
        candidates: Images of each class that patches come from; fewer where there are fewer.
        crops: Of each candidate.
        difficulty: Which patches: `easy`, with the smallest losses, as RDED has it; `hard`, the largest; `medium`, those in the
            middle (CV-DD names it and its code loads such patches ready-made; what is the middle is inferred).
        seed: Of candidates and crops.

    Returns:
        `[classes * images_per_class, C, H, W]`, all of the first class first.

    Raises:
        UsageError: A class has too few images, samples are no images, or no such difficulty is known.

    Example:
        >>> from limbeck.data import TensorSource
        >>> source = TensorSource(torch.rand(40, 1, 8, 8), torch.arange(40) % 2)
        >>> mosaics(source, lambda x: x.mean((2, 3)).expand(-1, 2), images_per_class=3).shape
        torch.Size([6, 1, 8, 8])
    """
    if difficulty not in get_args(Difficulty):
        raise UsageError(
            "no such difficulty", where="difficulty", found=difficulty, expected=" | ".join(get_args(Difficulty))
        )
    counts = torch.bincount(source.labels)  # type: ignore[attr-defined]
    needed = images_per_class * factor**2
    rows = per_class(source, max(needed, min(candidates, int(counts.min()))), seed).view(len(counts), -1)
    made = []
    for c, own in enumerate(rows):
        patches, losses = _patches(source, own, answer, c, factor, crops, seed)
        order = losses.argsort()
        first = {"easy": 0, "medium": (len(order) - needed) // 2, "hard": len(order) - needed}[difficulty]
        cells = patches[order[first : first + needed]].view(factor, factor, images_per_class, *patches.shape[1:])
        made.append(cells.permute(2, 3, 0, 4, 1, 5).flatten(2, 3).flatten(3, 4))  # [n, C, factor h, factor w]
    size = source.batch(rows[0, :1], 0).x.shape[-2:]
    found = torch.cat(made)
    return found if found.shape[-2:] == size else F.interpolate(found, size, mode="bilinear", antialias=True)


def _patches(
    source: Source, rows: Tensor, answer: Callable[[Tensor], Tensor], c: int, factor: int, crops: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The best crop of each image `[B, C, h, w]` and its loss `[B]`."""
    patches, losses = [], []
    for part in rows.split(64):
        batch = source.batch(part, 0)
        x = batch.x
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise UsageError("patches are parts of images", where="data.train", found=repr(batch), expected="[C, H, W]")
        h, w = (max(1, side // factor) for side in x.shape[-2:])
        top, left = (x.shape[-2] - h) // 2, (x.shape[-1] - w) // 2
        amid = (left, x.shape[-1] - w - left, top, x.shape[-2] - h - top)
        seen, found = [], []
        for k in range(crops):
            keys = mix(mix(batch.id) + (seed << 8) + k)
            seen.append(F.interpolate(augment(x, keys, ("crop",)), (h, w), mode="bilinear", antialias=True))
            logits = answer(F.pad(seen[-1], amid))
            found.append(F.cross_entropy(logits, logits.new_full((len(x),), c, dtype=torch.long), reduction="none"))
        loss, best = torch.stack(found).min(0)
        patches.append(torch.stack(seen)[best, torch.arange(len(x), device=best.device)])
        losses.append(loss)
    return torch.cat(patches), torch.cat(losses)


def _enough(own: Tensor, count: int, c: int) -> None:
    if len(own) < count:
        raise UsageError("a class has too few samples", where=f"class {c}", found=len(own), expected=f">= {count}")
