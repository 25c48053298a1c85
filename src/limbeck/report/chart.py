"""Axes and marks as SVG text: what the figures are drawn with.

Figures are plain SVG: a report stays small (a plotting library weighs about 5 MB in every file), opens where scripts are
not allowed, prints sharply, and follows the reader's light or dark theme through the classes of `PALETTE`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PALETTE = """
svg{font:12px/1.4 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
svg text{fill:var(--ink)} svg .soft{fill:var(--soft)} svg .strong{font-weight:600} svg .big{font-size:16px}
svg .grid{stroke:var(--line);stroke-width:1} svg .axis{stroke:var(--faint);stroke-width:1}
svg .dash{stroke-dasharray:3 4} svg .wide{stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .thick{stroke-width:6;stroke-linecap:round} svg .thin{stroke-width:1;opacity:.35}
svg .none{fill:none} svg .halo{stroke:var(--paper);stroke-width:3;paint-order:stroke}
svg .ring{fill:var(--paper);stroke-width:2} svg .track{fill:var(--line)} svg .veil{opacity:.28}
svg .hit{fill:transparent} svg .hit:hover{fill:var(--ink);fill-opacity:.07}
""" + "".join(f"svg .f{i}{{fill:var(--c{i})}} svg .s{i}{{stroke:var(--c{i})}}\n" for i in range(6))

LIGHT = """--paper:#fff;--ink:#22262b;--soft:#68707a;--faint:#aab0b7;--line:#eae7e1;
--c0:#bf5a1d;--c1:#3a6ea5;--c2:#3c8c69;--c3:#8b539b;--c4:#b08b24;--c5:#8a929b"""


@dataclass(frozen=True)
class Scale:
    """Data to pixels along one axis.

    Args:
        low: Smallest value shown.
        high: Largest value shown.
        start: Pixel of `low`.
        stop: Pixel of `high`.
        log: Whether the axis is logarithmic; `low` is then above zero.

    Example:
        >>> Scale(0, 10, 50, 150)(5), Scale(1, 100, 0, 200, log=True)(10)
        (100.0, 100.0)
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, v = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * ((v - low) / (high - low) if high > low else 0.5)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the axis, about `count` of them.

        Example:
            >>> Scale(0.12, 0.97, 0, 1).ticks(4), Scale(3, 700, 0, 1, log=True).ticks()
            ([0.2, 0.4, 0.6, 0.8], [10.0, 100.0])
        """
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5)):
                ticks = [float(f"{d}e{e}") for e in decades for d in digits]
                ticks = [t for t in ticks if self.low <= t <= self.high]
                if len(ticks) >= 2:
                    return ticks[:: -(-len(ticks) // count)]
        rough = (self.high - self.low) / max(1, count) or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.7)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def span(values: Sequence[float], pad: float = 0.06, log: bool = False) -> tuple[float, float]:
    """The range of values with a margin at both ends; never empty.

    Example:
        >>> span([0.0, 1.0], pad=0.1), span([3.0])
        ((-0.1, 1.1), (2.7, 3.3))
    """
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** pad if high > low else 1.5
        return low / margin, high * margin
    margin = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


class Svg:
    """A drawing: elements are added in the order in which they are painted.

    Args:
        width: In pixels of the drawing's own grid.
        height: In pixels.
        title: What the picture shows, for those who do not see it.

    Example:
        >>> print(Svg(10, 10, "dot").add("circle", cx=5, cy=5, r=2.50, cls="f0", tip="here").render())
        <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10" role="img" aria-label="dot">
        <circle cx="5" cy="5" r="2.5" class="f0"><title>here</title></circle>
        </svg>
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def add(self, tag: str, text: str = "", tip: str = "", **attributes: object) -> "Svg":
        """An element with its text and hover title; `cls` is its class, `_` in names stands for `-`."""
        names = {"cls": "class"}
        head = "".join(f' {names.get(k, k.replace("_", "-"))}="{_attribute(v)}"' for k, v in attributes.items())
        body = escape(text) + (f"<title>{escape(tip)}</title>" if tip else "")
        self._parts.append(f"<{tag}{head}>{body}</{tag}>" if body else f"<{tag}{head}/>")
        return self

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> "Svg":
        """Text with its baseline at `y`."""
        return self.add("text", text, x=x, y=y, cls=cls, text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> "Svg":
        """A straight line."""
        return self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)

    def path(self, points: Sequence[tuple[float, float]], cls: str) -> "Svg":
        """A line through points; a NaN breaks it."""
        steps, pen = [], "M"
        for x, y in points:
            if math.isfinite(y):
                steps.append(f"{pen}{_attribute(float(x))} {_attribute(float(y))}")
            pen = "L" if math.isfinite(y) else "M"
        return self.add("path", d="".join(steps), cls=f"none {cls}")

    def x_axis(self, scale: Scale, top: float, bottom: float, labels: Sequence[tuple[float, str]]) -> "Svg":
        """Vertical grid lines with their labels below."""
        for value, text in labels:
            x, half = scale(value), text_width(text) / 2
            inside = min(max(x, half), self.width - half)
            self.line(x, top, x, bottom, "grid").text(inside, bottom + 16, text, "soft", "middle")
        return self

    def y_axis(self, scale: Scale, left: float, right: float, labels: Sequence[tuple[float, str]]) -> "Svg":
        """Horizontal grid lines with their labels on the left."""
        for value, text in labels:
            y = scale(value)
            self.line(left, y, right, y, "grid").text(left - 8, y + 4, text, "soft", "end")
        return self

    def render(self, standalone: bool = False) -> str:
        """The SVG text; a stand-alone one brings its size, colours and a white ground."""
        view = f'viewBox="0 0 {_attribute(self.width)} {_attribute(self.height)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {view} role="img" aria-label="{escape(self.title)}">'
        if standalone:
            head = head.replace("viewBox", f'width="{self.width:g}" height="{self.height:g}" viewBox', 1)
            style = f"<style>svg{{{LIGHT}}}{PALETTE}</style>"
            head += f'\n{style}\n<rect width="100%" height="100%" rx="8" fill="#fff"/>'
        return "\n".join([head, *self._parts, "</svg>"])


def text_width(text: str, size: float = 12) -> float:
    """About how wide a text is, in pixels."""
    return 0.56 * size * len(text)


def _attribute(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else escape(str(value))
