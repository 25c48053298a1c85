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
