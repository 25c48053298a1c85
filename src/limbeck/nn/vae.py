"""A variational autoencoder of tables, told of a group on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TableVAE(nn.Module):
    """Rows of categorical columns as one-hot vectors side by side, a latent, and back (FairDisCo, Liu et al. 2022).

    Args:
        sizes: Categories of each column.
        groups: Values of the protected attribute, which encoder and decoder are told.
        latent: Z.
        hidden: Units of the encoder.
        decoder_hidden: Units of the decoder; a smaller encoder goes with a decoder of the same size.
        target: The column that is predicted downstream.

    Example:
        >>> net = TableVAE((2, 3), groups=2, latent=4, hidden=8)
        >>> x = net.one_hot(torch.tensor([[0, 2], [1, 1]]))
        >>> mean, logvar = net.encode(x, torch.tensor([0, 1]))
        >>> mean.shape, [part.shape[1] for part in net.columns(net.decode(mean, torch.tensor([0, 1])))]
        (torch.Size([2, 4]), [2, 3])
    """

    def __init__(
        self, sizes: Sequence[int], groups: int = 2, latent: int = 8, hidden: int = 64, decoder_hidden: int = 64,
        target: int = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes, self.groups, self.latent = tuple(sizes), groups, latent
        self.target = target % len(self.sizes)
        width = sum(self.sizes)
        self.encoder = nn.Sequential(nn.Linear(width + groups, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent + groups, decoder_hidden), nn.ReLU(), nn.Linear(decoder_hidden, width)
        )

    def one_hot(self, codes: Tensor) -> Tensor:
        """Rows of category numbers `[B, F]` as `[B, sum of sizes]`."""
        return torch.cat([F.one_hot(c, n) for c, n in zip(codes.unbind(1), self.sizes, strict=True)], 1).float()

    def codes(self, x: Tensor) -> Tensor:
        """One-hot rows as category numbers `[B, F]`."""
        return torch.stack([part.argmax(1) for part in self.columns(x)], 1)

    def columns(self, x: Tensor) -> list[Tensor]:
        """The part of each column `[B, size]`."""
        return list(x.split(list(self.sizes), dim=1))

    def encode(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance `[B, Z]` of the latent, the latter within [-8, 8]."""
        mean, logvar = self.encoder(torch.cat([x, self._told(group)], 1)).chunk(2, 1)
        return mean, logvar.clamp(-8, 8)

    def decode(self, z: Tensor, group: Tensor) -> Tensor:
        """Logits of all categories `[B, sum of sizes]`."""
        return self.decoder(torch.cat([z, self._told(group)], 1))

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """Logits at the mean of the latent; without groups, of group 0."""
        group = torch.zeros(len(x), dtype=torch.int64, device=x.device) if group is None else group
        return self.decode(self.encode(x, group)[0], group)

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropies of all columns, added up; the mean over rows."""
        pairs = zip(self.columns(logits), self.columns(x), strict=True)
        return torch.stack([F.cross_entropy(found, true) for found, true in pairs]).sum()

    def _told(self, group: Tensor) -> Tensor:
        return F.one_hot(group.long(), self.groups).to(next(self.decoder.parameters()).dtype)
