"""A small network for diffusion in few dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeMLP(nn.Module):
    """An MLP of a point, a time, and a class where there are some.

    Args:
        dim: Numbers of a point.
        hidden: Units of each layer.
        layers: Hidden layers.
        classes: Classes, with one more label for none of them; 0 for a network without condition.
        frequencies: Sines and cosines of the time.

    Example:
        >>> TimeMLP(2, 16, classes=3)(torch.zeros(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 3])).shape
        torch.Size([4, 2])
    """

    waves: Tensor

    def __init__(self, dim: int, hidden: int = 64, layers: int = 3, classes: int = 0, frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("waves", math.pi * 2.0 ** torch.arange(frequencies).sub(2), persistent=False)
        self.label = nn.Embedding(classes + 1, hidden) if classes else None
        self.first = nn.Linear(dim + 2 * frequencies, hidden)
        self.body = nn.Sequential(*(part for _ in range(layers - 1) for part in (nn.SiLU(), nn.Linear(hidden, hidden))))
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Points `[B, dim]`, or `[B, ...]` of as many numbers, at times `[B]`, of classes `[B]`."""
        phase = t[:, None] * self.waves
        h = self.first(torch.cat([x.flatten(1), phase.sin(), phase.cos()], dim=1))
        if self.label is not None and condition is not None:
            h = h + self.label(condition)
        return self.last(self.body(h)).view_as(x)
