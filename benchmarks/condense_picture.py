"""The picture of `condense.py`: one image of each class from each row, in large pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from limbeck.data.condensed import Condensed

CELL, GAP, LEFT, TOP, RIGHT = 64, 8, 250, 48, 150  # in pixels
INK, FAINT, LINE = (30, 34, 40), (105, 112, 122), (222, 225, 230)
REAL = ("random real", "herding", "k-means medoids")
MADE = ("MTT", "FTD", "AST", "SRe2L", "DWA", "CV-DD")


def tile(image: Tensor, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """An image `[1 or 3, H, W]` in large pixels; of one channel, as ink on paper."""
    pixels = ((image - low) / (high - low)).clamp(0, 1)
    if len(pixels) == 1:
        pixels = 1 - pixels.expand(3, -1, -1)
    array = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((CELL, CELL), Image.Resampling.NEAREST)


def rows_of(folder: Path) -> list[tuple[str, str, list[Image.Image]]]:
    """Name, remark and tiles of each row, those of the first seed."""
    found = []
    for name in (*REAL, *MADE):
        small = Condensed.load(folder / f"{name}-1-0")
        found.append((name, "", [tile(image) for image in small.x.detach()]))
    infer = Condensed.load(folder / "INFER-10-0")
    assert infer.compensators is not None
    added = infer.compensators.detach()[:10]
    reach = float(added.abs().max())
    found.append(("INFER", f"added to images, ± {reach:.1f}", [tile(image, -reach, reach) for image in added]))
    return found


def gallery(folder: Path, out: Path, classes: Sequence[str], result: Mapping[str, Any]) -> None:
    """Draw the sets of a task with one image of each class.

    Args:
        folder: Where `condense.py` keeps the sets of a task.
        out: The PNG.
        classes: Names of the columns.
        result: The task's part of the result, for the accuracies.
    """
    font, small = ImageFont.load_default(22), ImageFont.load_default(17)
    rows = rows_of(folder)
    width = LEFT + len(classes) * (CELL + GAP) + RIGHT
    breaks = {len(REAL), len(rows) - 1}
    height = TOP + len(rows) * (CELL + GAP) + len(breaks) * 2 * GAP + GAP
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    heads = ImageFont.load_default(12 if max(map(len, classes)) > 7 else 17)
    for k, name in enumerate(classes):
        draw.text((LEFT + k * (CELL + GAP) + CELL / 2, TOP / 2), name, FAINT, heads, "mm")
    draw.text((LEFT + len(classes) * (CELL + GAP) + GAP, TOP / 2), "hard / soft %", FAINT, small, "lm")
    y = TOP
    for i, (name, remark, tiles) in enumerate(rows):
        if i in breaks:
            draw.line((GAP, y + GAP / 2, width - GAP, y + GAP / 2), LINE, 2)
            y += 2 * GAP
        draw.text((2 * GAP, y + CELL / 2 - (12 if remark else 0)), name, INK, font, "lm")
        draw.text((2 * GAP, y + CELL / 2 + 14), remark, FAINT, small, "lm")
        for k, image in enumerate(tiles):
            x = LEFT + k * (CELL + GAP)
            page.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=LINE)
        if (found := result["1"].get(name, {}).get("summary")) is not None:
            hard, soft = (found["accuracy"][kind]["ConvNet"]["mean"] for kind in ("hard", "table"))
            draw.text(
                (LEFT + len(classes) * (CELL + GAP) + GAP, y + CELL / 2), f"{hard:.0f} / {soft:.0f}", INK, font, "lm"
            )
        y += CELL + GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(128).save(out, optimize=True)
