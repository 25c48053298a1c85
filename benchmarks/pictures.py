"""Pictures of what benchmarks make: clouds of points, and clips as strips of frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER, FAR, NEAR = (40, 40, 40), (255, 255, 255), np.array([190, 205, 225]), np.array([20, 60, 120])


def sheet(rows: Mapping[str, Sequence[Image.Image]], path: Path, gap: int = 8, label: int = 190, cuts: int = 0) -> None:
    """Rows of pictures of one size with their names before them; a wider gap after each `cuts` pictures, where that is not 0."""
    first = next(iter(rows.values()))
    width, height = first[0].size

    def left(k: int) -> int:
        return label + k * (width + gap) + (k // cuts * 2 * gap if cuts else 0)

    page = Image.new("RGB", (left(len(first) - 1) + width + gap, gap + len(rows) * (height + gap)), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=17)
    for r, (name, parts) in enumerate(rows.items()):
        top = gap + r * (height + gap)
        pen.text((8, top + height // 2), name, fill=INK, font=font, anchor="lm")
        for k, part in enumerate(parts):
            page.paste(part, (left(k), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(64).save(path, optimize=True)


def cloud(points: Tensor, side: int = 120, fine: int = 4, reach: float = 2.8) -> Image.Image:
    """Points `[N, 3]` from above and aside; what is near is darker and larger."""
    tilt = torch.tensor(0.45)
    right, up = points[:, 0], tilt.cos() * points[:, 2] + tilt.sin() * points[:, 1]
    depth = tilt.cos() * points[:, 1] - tilt.sin() * points[:, 2]  # away from the eye
    size = side * fine
    image = Image.new("RGB", (size, size), PAPER)
    pen = ImageDraw.Draw(image)
    for i in depth.argsort(descending=True).tolist():
        near = min(max(0.5 - depth[i].item() / (2 * reach) * 1.6, 0.0), 1.0)
        radius = size * (0.018 + 0.012 * near)
        x, y = size * (0.5 + right[i].item() / (2 * reach)), size * (0.5 - up[i].item() / (2 * reach))
        colour = tuple(int(v) for v in FAR + near * (NEAR - FAR))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def clouds_in_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """Clouds `[K, N, 3]` of each name."""
    sheet({name: [cloud(x) for x in clouds] for name, clouds in rows.items()}, path, gap=2)


def filmstrips(rows: Mapping[str, Tensor], path: Path, zoom: int = 4) -> None:
    """Clips `[K, 1, T, H, W]` of each name, brightness in 0 .. 1."""

    def frame(x: Tensor) -> Image.Image:
        grey = Image.fromarray((255 * x.clamp(0, 1)).round().to(torch.uint8).numpy())
        return grey.resize((zoom * x.shape[1], zoom * x.shape[0]), Image.Resampling.NEAREST).convert("RGB")

    strips = {name: [frame(x) for clip in clips[:, 0] for x in clip] for name, clips in rows.items()}
    sheet(strips, path, gap=4, label=230, cuts=next(iter(rows.values())).shape[2])
