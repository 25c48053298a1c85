"""Quality against variety, of the result of `diversity_strings.py`.

python benchmarks/diversity_picture.py
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from limbeck.report.chart import Scale, Svg

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 420, 50, 34, 376
NAMES = {
    "guidance": "less and less guidance",
    "temperature": "more and more temperature",
    "diversity_cfg": "diversity_cfg, between two",
    "a student for each beta": "diversity_cfg, more and more",
}


def fronts(arms: dict[str, Any]) -> str:
    """A line through the points of each arm, means over seeds, as SVG."""
    svg = Svg(WIDTH, HEIGHT, "quality of texts against their diversity")
    x, y = Scale(0, 80, LEFT, WIDTH - 12), Scale(0, 100, BOTTOM, TOP)
    svg.x_axis(x, TOP, BOTTOM, [(t, f"{t:g}") for t in x.ticks()]).y_axis(
        y, LEFT, WIDTH - 12, [(t, f"{t:g}") for t in y.ticks()]
    )
    svg.text(12, 14, "Texts without a wrong word, %", "strong")
    svg.text(WIDTH - 12, HEIGHT - 6, "Diversity of the texts of a topic, 1 - cos, %", "soft", "end")
    for k, (arm, name) in enumerate(NAMES.items()):
        seeds = arms[arm]["points"]
        points = [
            (x(mean(p["diversity"] for p in same)), y(mean(p["quality"] for p in same)))
            for same in zip(*seeds, strict=True)
        ]
        svg.path(points, f"s{k} wide")
        for px, py in points:
            svg.add("circle", cx=px, cy=py, r=4, cls=f"ring s{k}")
        told = f"{name}: {arms[arm]['mean']:.1f} ± {arms[arm]['deviation']:.1f}"
        svg.add("circle", cx=LEFT + 20, cy=BOTTOM - 90 + 20 * k, r=4, cls=f"f{k}")
        svg.text(LEFT + 32, BOTTOM - 86 + 20 * k, told, "halo")
    svg.text(LEFT + 16, BOTTOM - 108, "area below and left", "soft")
    return svg.render(standalone=True)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/diversity-strings.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/img/diversity-strings.svg"))
    given = parser.parse_args()
    given.out.write_text(fronts(json.loads(given.result.read_text(encoding="utf-8"))["arms"]), encoding="utf-8")


if __name__ == "__main__":
    main()
