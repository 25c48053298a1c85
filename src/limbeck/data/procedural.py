"""Data sets that are drawn from a seed."""

import math

import torch
from torch import Tensor

from limbeck.data.data import Data
from limbeck.data.sources import TensorSource

SUPER, CLASSES, LATENT = 8, 40, 24
CLASS_OFFSET, NOISE = 0.55, 0.75


def superclasses(seed: int = 0, per_class: int = 60) -> Data:
    r"""40 classes in 8 super-classes of 5, so that a teacher ranks the wrong classes with reason.

    A class's centre in 24 dimensions is its super-class's centre, `N(0, 1)`, plus an offset `N(0, 0.55^2)`; a sample is
    the centre plus noise `N(0, 0.75^2)`, shown as $x = [\tanh(zW), \sin z] \in R^{48}$ with a fixed $W$ of
    `N(0, 1 / 24)`. Class `c` belongs to super-class `c // 5`.

    Args:
        seed: Seed of centres, map and samples.
        per_class: Samples of each class in each split.

    Returns:
        `train`, `validation` and `test` with `x` `[40 * per_class, 48]` and `y` in 0 .. 39.

    Example:
        >>> data = superclasses(per_class=2)
        >>> len(data.train), data.num_classes, data.train.batch(torch.tensor([0]), view=0).x.shape
        (80, 40, torch.Size([1, 48]))
    """
    g = torch.Generator().manual_seed(seed)
    parents = torch.randn(SUPER, LATENT, generator=g).repeat_interleave(CLASSES // SUPER, dim=0)  # [40, 24]
    centres = parents + CLASS_OFFSET * torch.randn(CLASSES, LATENT, generator=g)
    mixing = torch.randn(LATENT, LATENT, generator=g) / math.sqrt(LATENT)
    y = torch.arange(CLASSES).repeat_interleave(per_class)
    names = [f"{c // (CLASSES // SUPER)}.{c % (CLASSES // SUPER)}" for c in range(CLASSES)]

    def draw() -> Tensor:
        z = centres[y] + NOISE * torch.randn(len(y), LATENT, generator=g)  # [40 * per_class, 24]
        return torch.cat([torch.tanh(z @ mixing), torch.sin(z)], dim=1)

    return Data(**{split: TensorSource(draw(), y, classes=names) for split in ("train", "validation", "test")})


def concepts(seed: int, *counts: int) -> list[tuple[Tensor, Tensor]]:
    r"""Points in which four concepts are mixed, each with eight values: tasks on them are related as far as concepts are.

    A point is four codes of 6 dimensions, one for the value of each concept, `N(0, 1.2^2)` once for all points, plus noise
    `N(0, 0.6^2)`, turned by a random rotation R and bent: $x = \tanh(zR) \in R^{24}$.

    Args:
        seed: Seed of codes, rotation and points.
        *counts: Points of each set that is drawn.

    Returns:
        For each count, `x` `[N, 24]` and the values of the concepts `[N, 4]` in 0 .. 7.

    Example:
        >>> (x, values), (other, _) = concepts(0, 5, 3)
        >>> x.shape, values.shape, other.shape
        (torch.Size([5, 24]), torch.Size([5, 4]), torch.Size([3, 24]))
    """
    g = torch.Generator().manual_seed(seed)
    codes = 1.2 * torch.randn(4, 8, 6, generator=g)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=g)).Q
    found = []
    for count in counts:
        values = torch.randint(0, 8, (count, 4), generator=g)
        z = codes[torch.arange(4), values] + 0.6 * torch.randn(count, 4, 6, generator=g)  # [N, 4, 6]
        found.append((torch.tanh(z.flatten(1) @ rotation), values))
    return found
