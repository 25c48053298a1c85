"""Random numbers that belong to samples: how a batch is divided over micro-batches and processes changes none of them."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.roles import Roles
from limbeck.data.ids import mix


class Draws:
    """Draws for the samples of a batch: functions of (seed of the run, step, sample, name) alone.

    Args:
        m: The roles, which know the seed and the step.
        batch: With `id` `[B]`.

    Example:
        >>> m, batch = Roles(), Batch(x=torch.zeros(4, 2), id=torch.arange(4))
        >>> whole = Draws(m, batch).normal("noise", batch.x)
        >>> torch.equal(whole[2:], Draws(m, batch[2:4]).normal("noise", batch.x[2:]))
        True
    """

    def __init__(self, m: Roles, batch: Batch) -> None:
        self._keys = mix(mix(batch.id + (m.seed << 32)) + m.step)

    def uniform(self, name: str) -> Tensor:
        """A number in [0, 1) for each sample `[B]`, fp32."""
        return self._uniform(name, 1)[:, 0].float().clamp(max=1 - 2**-24)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape, dtype and device of `like` `[B, ...]`."""
        count = like[0].numel()
        first, second = self._uniform(name, 2 * ((count + 1) // 2)).chunk(2, dim=1)  # Box and Muller make two of two
        radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
        found = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
        return found.view(like.shape).to(like.device, like.dtype)

    def _uniform(self, name: str, count: int) -> Tensor:
        keys = mix(self._keys + zlib.crc32(name.encode()))
        words = mix(keys[:, None] + torch.arange(count, device=keys.device))
        return ((words >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
