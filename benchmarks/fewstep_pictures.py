"""The galleries of `fewstep.py`, of its result and of the samples that it keeps, and fronts: distance against NFE.

python benchmarks/fewstep_pictures.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from fewstep import FOLDER, TASKS
from fewstep_models import CLASSES, whole
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

from limbeck.report.figures import pareto

EACH, SIDE, GAP, LEFT, TOP = 2, 40, 3, 196, 26  # samples of a class, and sizes in pixels
LEFT_OUT = ("teacher, 8 steps", "teacher, 2 steps, fresh noise", "consistency, 2 steps")


def rows(name: str, table: dict[str, Any]) -> dict[str, Tensor]:
    """Samples by row, those of a class one after the other; first real images."""
    real = whole(TASKS[name].splits()[2])
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
    size, small_pixels = SIDE, next(iter(shown.values())).shape[-1] < SIDE // 2
    how = Image.Resampling.NEAREST if small_pixels else Image.Resampling.BICUBIC
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
            page.paste(tile.resize((size, size), how), (place(k, size), y))
    return page


def front(table: dict[str, Any]) -> str:
    """Distance against calls of the network (NFE), as SVG."""
    points = [
        {"name": label, "frechet_distance": row["frechet"][0], "nfe": row["nfe"]}
        for label, row in table.items()
        if row["nfe"]
    ]
    students = [p["name"] for p in points if not p["name"].startswith("teacher")]
    return pareto(points, "frechet_distance", "nfe", chosen=students, height=480, standalone=True)


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
            page.quantize(256).save(given.out / f"fewstep-{name}.png", optimize=True)
            (given.out / f"fewstep-{name}.svg").write_text(front(found["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()
