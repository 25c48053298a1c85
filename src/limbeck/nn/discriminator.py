"""Discriminators: of one model's logits from another's, and of generated samples by a frozen network's features."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LogitDiscriminator(nn.Module):
    """Linear layers `C -> C/8 -> C/64 -> 2` with ReLU between, hidden widths at least 2 (Shen and Savvides 2020, MEAL V2).

    Args:
        classes: C.
        last_relu: Whether a ReLU follows the last layer too, as in the official code. It keeps the scores from falling
            below 0, so that `discrimination` cannot fall below `0.5 ln 2`, and a layer that is dead stays so at `ln 2`.
        generator: Draws the weights, uniform within `1 / sqrt(fan in)`; default one seeded with 0.

    Example:
        >>> LogitDiscriminator(1000)(torch.randn(4, 1000)).shape
        torch.Size([4, 2])
    """

    def __init__(self, classes: int, last_relu: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__()
        generator = generator or torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in pairwise([classes, max(2, classes // 8), max(2, classes // 64), 2]):
            layer = nn.utils.skip_init(nn.Linear, a, b)  # the constructor would draw from the global generator
            for p in layer.parameters():
                nn.init.uniform_(p, -(a**-0.5), a**-0.5, generator=generator)
            layers += [layer, nn.ReLU()]
        self.net = nn.Sequential(*(layers if last_relu else layers[:-1]))

    def forward(self, logits: Tensor) -> Tensor:
        """Scores `[B, 2]` for logits `[B, C]`: of the first model, and of the second."""
        return self.net(logits)


def discrimination(scores: Tensor, first: int) -> Tensor:
    """Binary cross-entropy of a discriminator's scores, averaged over rows and both columns.

    Args:
        scores: `[N, 2]`.
        first: The first so many rows are the first model's, with target (1, 0); the others' is (0, 1).

    Returns:
        Scalar; `ln 2` for scores of zero.

    Example:
        >>> discrimination(torch.zeros(4, 2), 2)
        tensor(0.6931)
    """
    mine = (torch.arange(len(scores), device=scores.device) < first).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, torch.stack([mine, 1 - mine], 1))


class FeatureDiscriminator(nn.Module):
    """A small head on each of several features of a frozen network, as projected discriminators have (Sauer et al. 2021).

    Each head is `Linear, LeakyReLU, Linear` at every position; their scores stand side by side.

    Args:
        widths: Channels of the features, one number for each.
        hidden: Units of each head.

    Example:
        >>> heads = FeatureDiscriminator([8, 4])
        >>> heads(torch.zeros(2, 5, 8), torch.zeros(2, 4, 3, 3)).shape
        torch.Size([2, 14])
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1)) for width in widths
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Scores `[B, positions of all]` for features `[B, C]`, `[B, L, C]` or maps `[B, C, H, W]`."""
        parts = [head(_last(f)).flatten(1) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(parts, 1)


def feature_widths(features: Sequence[Tensor]) -> list[int]:
    """The channels of features, as `FeatureDiscriminator` reads them.

    Example:
        >>> feature_widths([torch.zeros(2, 5, 8), torch.zeros(2, 4, 3, 3)])
        [8, 4]
    """
    return [_last(f).shape[-1] for f in features]


def _last(features: Tensor) -> Tensor:
    return features.movedim(1, -1) if features.ndim == 4 else features
