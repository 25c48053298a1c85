"""Noise as data: what methods without data start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.ids import digest, mix, normals, seeds
from limbeck.data.sources import Rows


class Noise(Rows):
    """Standard normal samples, new ones in every epoch, with classes or conditions that stay.

    Args:
        shape: Of a sample, such as `(4, 64, 64)`.
        count: Samples of an epoch.
        classes: Classes; sample i has class `i % classes`; 0 for none.
        conditions: Embeddings `[N, ...]` in the place of classes, as of prompts; they tell `count`.
        seed: Of the noise.
        negatives: Negative prompts `[M, ...]` in the form of the conditions; each sample of each epoch draws one, as
            `batch.negative`.

    Example:
        >>> source = Noise((2,), 6, classes=3)
        >>> batch = source.batch(torch.tensor([4, 5]), view=0)
        >>> batch.x.shape, batch.y.tolist(), batch.x.equal(source.batch(torch.tensor([4, 5]), view=1).x)
        (torch.Size([2, 2]), [1, 2], False)
    """

    views = 0

    def __init__(
        self,
        shape: Sequence[int],
        count: int = 10_000,
        classes: int = 0,
        conditions: Tensor | None = None,
        seed: int = 0,
        negatives: Tensor | None = None,
    ) -> None:
        self.shape, self.seed = tuple(shape), seed
        count = count if conditions is None else len(conditions)
        self.ids = mix(torch.arange(count))
        self.conditions, self.negatives = conditions, negatives
        self.labels = torch.arange(count) % classes if classes and conditions is None else None
        self.classes = tuple(map(str, range(classes))) if classes else None

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The samples at positions `rows` `[B]` in view `view`."""
        ids = self.ids[rows]
        x = normals(seeds(ids, view, self.seed), torch.Size(self.shape).numel()).float().view(-1, *self.shape)
        condition = self.conditions if self.conditions is not None else self.labels
        fields = {} if condition is None else {"y": condition[rows]}
        if self.negatives is not None:
            fields["negative"] = self.negatives[seeds(ids, view, self.seed + 1) % len(self.negatives)]
        return Batch(x=x, id=ids, view=torch.full_like(ids, view), **fields)

    def fingerprint(self) -> str:
        """Of shape, seed, ids and conditions."""
        known = [c for c in (self.conditions, self.negatives) if c is not None]
        return digest("noise", str(self.shape), self.seed, self.ids, str(self.classes), *known)
