"""Random numbers that belong to samples: how a batch is divided over micro-batches and processes changes none of them."""

from __future__ import annotations

import zlib

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.roles import Roles
from limbeck.data.ids import mix, mixed, normals, uniforms


class Draws:
    """Draws for the samples of a batch: functions of (seed of the run, step, sample, name) alone.

    Args:
        m: The roles, which know the seed and the step.
        batch: With `id` `[B]`.

    Example:
        >>> import torch
        >>> m, batch = Roles(), Batch(x=torch.zeros(4, 2), id=torch.arange(4))
        >>> whole = Draws(m, batch).normal("noise", batch.x)
        >>> torch.equal(whole[2:], Draws(m, batch[2:4]).normal("noise", batch.x[2:]))
        True
    """

    def __init__(self, m: Roles, batch: Batch) -> None:
        self._keys = mix(mix(batch.id + (m.seed << 32)) + m.step)
        self._once = mixed(mixed(m.seed << 32) + m.step)

    def uniform(self, name: str) -> Tensor:
        """A number in [0, 1) for each sample `[B]`, fp32."""
        return uniforms(self.keys(name), 1)[:, 0].float().clamp(max=1 - 2**-24)

    def once(self, name: str) -> float:
        """A number in [0, 1) for the whole step, the same in all micro-batches and processes."""
        word = mixed(mixed(self._once + zlib.crc32(name.encode())))  # in plain numbers, which a plan can follow
        return min((word >> 11) / (1 << 53), 1 - 2**-24)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape, dtype and device of `like` `[B, ...]`."""
        return normals(self.keys(name), like[0].numel()).view(like.shape).to(like.device, like.dtype)

    def keys(self, name: str) -> Tensor:
        """A key for each sample `[B]` int64, for draws of other kinds."""
        return mix(self._keys + zlib.crc32(name.encode()))
