"""A small transformer for diffusion on sets: points without places, frames with them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by what is known of the sample (Peebles and Xie 2023)."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.known = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.known.weight)
        nn.init.zeros_(self.known.bias)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.SiLU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """Tokens `[B, N, W]`, and what is known `[B, W]`."""
        a, b, c, d, e, f = self.known(known)[:, None].chunk(6, -1)  # each [B, 1, W]
        h = torch.addcmul(b, self.norms[0](x), 1 + a)
        q, k, v = self.inward(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, W / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, c, self.outward(h))
        return torch.addcmul(x, f, self.mlp(torch.addcmul(e, self.norms[1](x), 1 + d)))


class Tokens(nn.Module):
    """Tokens, a time and a class to as many tokens: without places, permuted tokens give permuted ones.

    Args:
        dim: Numbers of a token.
        width: Of the layers.
        depth: Their number.
        heads: Of their attention.
        ratio: How much wider their MLP is.
        classes: Classes, 0 for a network without condition.
        places: Tokens, where each is to know which it is; 0 for sets.
    """

    waves: Tensor

    def __init__(
        self, dim: int, width: int, depth: int = 3, heads: int = 4, ratio: int = 2, classes: int = 0, places: int = 0
    ) -> None:
        super().__init__()
        self.register_buffer("waves", math.pi * 2.0 ** torch.arange(8).sub(2), persistent=False)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width) if classes else None
        self.place = nn.Parameter(0.1 * torch.randn(places, width)) if places else None
        self.first, self.last = nn.Linear(dim, width), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.layers = nn.ModuleList(Layer(width, heads, ratio) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, dim]` at times `[B]`, of classes `[B]`."""
        phase = t[:, None] * self.waves
        known = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        if self.label is not None and condition is not None:
            known = known + self.label(condition)
        known, h = F.silu(known), self.first(x)
        if self.place is not None:
            h = h + self.place
        for layer in self.layers:
            h = layer(h, known)
        return self.last(h)
