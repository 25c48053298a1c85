"""What to take from a large pool of unlabelled samples: the best of each class, and no copies of what is judged on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError


def top_per_class(scores: Tensor, count: int) -> Tensor:
    """The samples with the highest scores of each class, over all samples and not only those that the class wins.

    Args:
        scores: A score of each sample for each class `[N, C]`, such as probabilities.
        count: Samples per class, 1 or more; a class gets fewer where there are fewer.

    Returns:
        Positions `[M]` in rising order, each once, `M <= count C`; of equal scores the first samples are taken.

    Raises:
        UsageError: The count is not positive.

    Example:
        >>> top_per_class(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]), count=1).tolist()
        [0, 1]
    """
    if count < 1:
        raise UsageError(
            "the number of samples per class is out of range", where="count", found=count, expected="1 or more"
        )
    best = scores.argsort(dim=0, descending=True, stable=True)[:count]  # [count, C]
    return best.flatten().unique()


def thumbnails(images: Tensor, size: int = 16) -> Tensor:
    """Small grey images, as vectors that neither brightness nor contrast changes, to compare pictures by.

    Args:
        images: `[N, C, H, W]`.
        size: Pixels of a side.

    Returns:
        `[N, size^2]` float32 with mean 0 and length 1; zeros for an image of one colour.

    Example:
        >>> x = torch.rand(1, 3, 20, 20)
        >>> torch.allclose(thumbnails(x), thumbnails(0.5 * x + 0.2), atol=1e-5)
        True
    """
    grey = images.float().mean(1, keepdim=True)
    small = F.interpolate(grey, (size, size), mode="bilinear", align_corners=False, antialias=True).flatten(1)
    small = small - small.mean(1, keepdim=True)
    length = small.norm(dim=1, keepdim=True)
    return small / length.masked_fill(length < 1e-6, torch.inf)


def near_duplicates(source: Any, *others: Any, threshold: float = 0.98, batch_size: int = 256) -> Tensor:
    """Which images are also in other sources, but for size, brightness, contrast and compression.

    A picture counts as a copy where the correlation of the two thumbnails exceeds the threshold. Crops and mirror images
    are not found.

    Args:
        source: N images.
        *others: Sources of images, such as those of the test.
        threshold: Correlation in [0, 1].
        batch_size: Images that are read at once.

    Returns:
        A mask `[N]`.

    Raises:
        UsageError: The samples are no images.

    Example:
        >>> from limbeck.data import TensorSource
        >>> x = torch.rand(5, 3, 16, 16)
        >>> near_duplicates(TensorSource(x), TensorSource(0.9 * x[2:3])).tolist()
        [False, False, True, False, False]
    """
    known = torch.cat([_thumbnails_of(other, batch_size) for other in others]) if others else torch.zeros(0, 256)
    mine = _thumbnails_of(source, batch_size)
    found = torch.zeros(len(source), dtype=torch.bool)
    if len(known):
        for rows in torch.arange(len(source)).split(4096):  # never more than 4096 x M correlations
            found[rows] = (mine[rows] @ known.mT).amax(1) > threshold
    return found


def is_images(source: Any) -> bool:
    """Whether the samples of a source are images `[C, H, W]`.

    Example:
        >>> from limbeck.data import TensorSource
        >>> is_images(TensorSource(torch.rand(2, 1, 8, 8))), is_images(TensorSource(torch.rand(2, 8)))
        (True, False)
    """
    x = source.batch(torch.zeros(1, dtype=torch.int64), 0).x
    return isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()


def _thumbnails_of(source: Any, batch_size: int) -> Tensor:
    if not is_images(source):
        raise UsageError("only images can be compared as pictures", where=repr(source), expected="images [C, H, W]")
    return torch.cat([thumbnails(source.batch(rows, 0).x) for rows in torch.arange(len(source)).split(batch_size)])
