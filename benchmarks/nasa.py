"""NASA on a generator of one step that attends to tokens: a negative attribute, by attention and by guidance of the output.

    python benchmarks/nasa.py --out benchmarks/results/nasa.json

A sample is a place of one of four classes, in two numbers, and one of three attributes, in two more. The generator sees a token
of a class, and of an attribute or none, by one layer of cross-attention; it is trained by the energy score, so that one call
draws from the distribution. The prompt then names a class alone, the negative prompt an attribute.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from measuring import machine, options, report
from torch import Tensor, nn

from limbeck.nn.nasa import away
from limbeck.prove import seeded

CLASSES, ATTRIBUTES, NOISE = 4, 3, 0.15
NONE = CLASSES + ATTRIBUTES  # a token that says nothing
SCALES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def circle(count: int, radius: float) -> Tensor:
    angles = 2 * math.pi * torch.arange(count) / count
    return radius * torch.stack([angles.cos(), angles.sin()], 1)


def drawn(c: Tensor, s: Tensor, g: torch.Generator) -> Tensor:
    """Samples `[N, 4]` of classes and attributes."""
    means = torch.cat([circle(CLASSES, 2.0)[c], circle(ATTRIBUTES, 1.5)[s]], 1)
    return means + NOISE * torch.randn(len(c), 4, generator=g)


class Painter(nn.Module):
    """Noise `[N, 8]` and tokens `[N, L]` to samples `[N, 4]`, in one call; two positions attend to the tokens."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.text, self.first = nn.Embedding(NONE + 1, hidden), nn.Linear(8, 2 * hidden)
        self.attention = Attention(hidden, cross_attention_dim=hidden, heads=4, dim_head=hidden // 4)
        self.last = nn.Sequential(
            nn.Linear(2 * hidden, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 4)
        )

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        h = self.first(z).view(len(z), 2, -1)
        return self.last((h + self.attention(h, encoder_hidden_states=self.text(tokens))).flatten(1))


def prompts(c: Tensor, s: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of class and attribute; a part of them without the attribute or the class, which are then drawn anew."""
    u = torch.rand(len(c), generator=g)
    said_c, said_s = torch.where(u < 0.2, NONE, c), torch.where(u > 0.6, NONE, s + CLASSES)
    return torch.stack([said_c, said_s], 1), c, s


def trained(seed: int, steps: int, batch: int = 256) -> Painter:
    """A generator trained by the energy score: `E|x - y| - E|x - x'| / 2` for each prompt."""
    net: Any = seeded(seed, Painter)
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        c, s = torch.randint(CLASSES, (batch,), generator=g), torch.randint(ATTRIBUTES, (batch,), generator=g)
        tokens, c, s = prompts(c, s, g)
        x, other = net(torch.randn(2 * batch, 8, generator=g), tokens.repeat(2, 1)).chunk(2)
        y = drawn(c, s, g)
        loss = ((x - y).norm(dim=1) + (other - y).norm(dim=1) - (x - other).norm(dim=1)).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def judged(net: Painter, seed: int, scale: float, how: str, count: int = 4000) -> dict[str, float]:
    """Of prompts of a class, away from an attribute: how many have it, how many are of the class, how many lie on a mode."""
    g = torch.Generator().manual_seed(1000 + seed)
    z, c = torch.randn(count, 8, generator=g), torch.randint(CLASSES, (count,), generator=g)
    s = torch.randint(ATTRIBUTES, (count,), generator=g)
    text, negative = (
        torch.stack([c, torch.full_like(c, NONE)], 1),
        torch.stack([torch.full_like(c, NONE), s + CLASSES], 1),
    )
    if how == "attention":
        with away(net, net.text(s[:, None] + CLASSES), scale):
            x = net(z, text)
    else:
        x, other = net(z, text), net(z, negative)
        x = x + scale * (x - other)
    to_class, to_attribute = torch.cdist(x[:, :2], circle(CLASSES, 2.0)), torch.cdist(x[:, 2:], circle(ATTRIBUTES, 1.5))
    near = (to_class.amin(1) < 4 * NOISE) & (to_attribute.amin(1) < 4 * NOISE)
    return {
        "attribute": 100 * float((to_attribute.argmin(1) == s).double().mean()),
        "class": 100 * float((to_class.argmin(1) == c).double().mean()),
        "on_mode": 100 * float(near.double().mean()),
    }


def main() -> None:
    args = options(__doc__ or "", seeds=5, steps=1500)
    rows: dict[str, dict[str, dict[str, list[float]]]] = {"attention": {}, "output": {}}
    for seed in range(args.seeds):
        net = trained(seed, args.steps)
        for how, by_scale in rows.items():
            for scale in SCALES:
                for name, value in judged(net, seed, scale, how).items():
                    by_scale.setdefault(str(scale), {}).setdefault(name, []).append(round(value, 2))
    means = {
        how: {scale: {n: round(sum(v) / len(v), 1) for n, v in found.items()} for scale, found in by_scale.items()}
        for how, by_scale in rows.items()
    }
    report({"machine": machine("diffusers"), "steps": args.steps, "mean": means, "per_seed": rows}, args.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
