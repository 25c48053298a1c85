"""The galleries of `fewstep.py`, of its result and of the samples that it keeps.

python benchmarks/fewstep_pictures.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from fewstep import FOLDER
from fewstep_models import CLASSES, digits, whole
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

EACH, PIXEL, GAP, LEFT, TOP = 2, 5, 3, 196, 26  # samples of a class, and sizes in pixels
LEFT_OUT = ("teacher, 8 steps", "teacher, 2 steps, fresh noise", "consistency, 2 steps")


def rows(name: str, table: dict[str, Any]) -> dict[str, Tensor]:
    """Samples by row, those of a class one after the other; first real images."""
    real = whole(digits()[2])
    shown = {"test images": torch.cat([real.x[real.y == c][:EACH] for c in range(CLASSES)])}
    for label in table:
        path = FOLDER / f"{name}-{label}.safetensors"
        if path.exists() and label not in LEFT_OUT:
            x = load_file(path)["x"]
            shown[label] = torch.cat([x[c::CLASSES][:EACH] for c in range(CLASSES)])
    return shown


def gallery(shown: dict[str, Tensor], table: dict[str, Any]) -> Image.Image:
    """A row of pictures for each way to sample, a pair of columns for each class."""
    low, high = shown["test images"].amin(), shown["test images"].amax()
    size = next(iter(shown.values())).shape[-1] * PIXEL
    width, height = LEFT + CLASSES * (EACH * size + (EACH + 2) * GAP), TOP + len(shown) * (size + GAP)
    page = Image.new("RGB", (width, height), "white")
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(14), ImageFont.load_default(12)
    for c in range(CLASSES):
        draw.text((place(c * EACH, size) + size + GAP / 2, 12), str(c), "black", font, anchor="mm")
    for r, (label, images) in enumerate(shown.items()):
        y = TOP + r * (size + GAP)
        draw.text((4, y + size / 2 - 8), label, "black", font, anchor="lm")
        if label in table:
            draw.text(
                (4, y + size / 2 + 9), f"Frechet distance {table[label]['frechet'][0]:.0f}", "#777", small, anchor="lm"
            )
        for k, image in enumerate(images):
            pixels = (255 * (image - low) / (high - low)).clamp(0, 255).byte()
            pixels = 255 - pixels if len(pixels) == 1 else pixels  # ink is dark
            tile = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            page.paste(tile.resize((size, size), Image.Resampling.NEAREST), (place(k, size), y))
    return page


def place(k: int, size: int) -> int:
    """Where a column begins; between classes is more room."""
    return LEFT + k * (size + GAP) + k // EACH * 2 * GAP


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/fewstep.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    given = parser.parse_args()
    tables = json.loads(given.result.read_text(encoding="utf-8"))["tables"]
    for name, found in tables.items():
        if found["rows"]:
            page = gallery(rows(name, found["rows"]), found["rows"])
            page.save(given.out / f"fewstep-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
