"""The pictures of a report, as SVG text."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from textwrap import wrap
from typing import Any

from limbeck.evaluate.compare import interval, mean_deviation
from limbeck.evaluate.pareto import pareto_front
from limbeck.report.chart import Scale, Svg, span, text_width
from limbeck.report.format import better, label, show

_META = {"stage", "step", "epoch", "time"}
_HOVERS = 120  # places along a curve that answer to the pointer
_POINTS = 400  # points of a curve that are drawn


def bars(models: Mapping[str, Mapping[str, float]], metric: str, width: int = 300) -> str:
    """One quantity of several models, side by side.

    Args:
        models: The numbers of each model by name; the last one is emphasised. Models without this quantity are left out.
        metric: The quantity.
        width: In pixels.

    Returns:
        SVG text.

    Example:
        >>> svg = bars({"teacher": {"mrr@10": 0.8}, "student": {"mrr@10": 0.75}}, "mrr@10")
        >>> "MRR@10" in svg, "0.750" in svg
        (True, True)
    """
    shown = {name: numbers[metric] for name, numbers in models.items() if _finite(numbers.get(metric))}
    svg = Svg(width, 40 + 38 * len(shown), label(metric))
    arrow = "higher is better" if better(metric) == "higher" else "lower is better"
    svg.text(0, 16, label(metric), "strong").text(width, 16, arrow, "soft", "end")
    low = min(0, *shown.values())
    scale = Scale(low, max(0, *shown.values()), 0, width)
    for i, (name, value) in enumerate(shown.items()):
        y = 48 + 38 * i
        last = i == len(shown) - 1
        colour = "f0" if last else "f1" if i == 0 else "f5"
        svg.text(0, y, label(name), "strong" if last else "soft")
        svg.text(width, y, show(metric, value), "strong" if last else "", "end")
        start, stop = sorted((scale(0), scale(value)))
        svg.add("rect", x=0, y=y + 7, width=width, height=7, rx=3.5, cls="track")
        bar = max(stop - start, 3.0)
        svg.add("rect", tip=f"{label(name)}: {value:g}", x=start, y=y + 7, width=bar, height=7, rx=3.5, cls=colour)
    return svg.render()


def pareto(
    points: Sequence[Mapping[str, Any]],
    quality: str,
    cost: str,
    chosen: Sequence[str] = (),
    width: int = 720,
    height: int | None = None,
    standalone: bool = False,
) -> str:
    """Quality against cost of named candidates on a logarithmic axis, with the front of those that nothing beats.

    Args:
        points: Per candidate: `name`, and the two quantities; those without both numbers are left out.
        quality: Key of the vertical quantity; on a logarithmic axis where less is better and values differ tenfold.
        cost: Key of the horizontal quantity, above zero; the better side is judged by its name.
        chosen: Names to emphasise.
        width: In pixels.
        height: In pixels; default 300 or, for wide figures, 340.
        standalone: Whether the SVG is a file of its own, with its colours and a white ground.

    Returns:
        SVG text.

    Example:
        >>> svg = pareto([{"name": "a", "mrr": 0.8, "bytes": 9}, {"name": "b", "mrr": 0.7, "bytes": 3}], "mrr", "bytes")
        >>> svg.count("<circle")
        2
    """
    shown = [p for p in points if _finite(p.get(quality)) and _finite(p.get(cost)) and p[cost] > 0]
    height = height or (340 if width > 480 else 300)
    svg = Svg(width, height, f"{label(quality)} against {label(cost)}")
    if not shown:
        return svg.text(0, 20, "no candidate has both numbers", "soft").render(standalone)
    xs, ys = [float(p[cost]) for p in shown], [float(p[quality]) for p in shown]
    left, right, top, bottom = 46, width - 12, 34, height - 44
    tenfold = better(quality) == "lower" and 0 < 10 * min(ys) <= max(ys)
    x = Scale(*span(xs, 0.2, log=True), left, right, log=True)
    y = Scale(*span(ys, 0.12, log=tenfold), bottom, top, log=tenfold)
    svg.x_axis(x, top, bottom, [(t, show(cost, int(t) if t.is_integer() else t)) for t in x.ticks(width // 110)])
    svg.y_axis(y, left, right, [(t, f"{t:g}") for t in y.ticks()])
    sides = {"higher": "maximise", "lower": "minimise"}
    goals: dict[str, list[str]] = {"maximise": [], "minimise": []}
    for key in (quality, cost):
        goals[sides[better(key)]].append(key)
    front = pareto_front(shown, **goals)
    stairs = _stairs(x, y, [(xs[i], ys[i]) for i in front], rising=better(cost) == better(quality))
    svg.path(stairs, "s0 wide dash")
    svg.text(12 if standalone else 0, 14, label(quality) + (", logarithmic" if tenfold else ""), "strong")
    side = "right" if better(cost) == "higher" else "left"
    vertical = "up" if better(quality) == "higher" else "down"
    svg.text(right, 14, f"better: {vertical} and to the {side}", "soft", "end")
    svg.text((left + right) / 2, height - 6, f"{label(cost)}, logarithmic", "soft", "middle")
    places = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True)]
    names = [str(p["name"]) for p in shown]
    for i, ((px, py), name, spot) in enumerate(
        zip(places, names, _spots(places, names, stairs, (left, width)), strict=True)
    ):
        tip = f"{name}\n{label(quality)}: {show(quality, ys[i])}\n{label(cost)}: {show(cost, shown[i][cost])}"
        picked = name in chosen
        cls = "f0" if picked else "ring s0" if i in front else "ring s5"
        svg.add("circle", tip=tip, cx=px, cy=py, r=7 if picked else 5, cls=cls)
        svg.text(*spot, name, "halo " + ("strong" if picked else "" if i in front else "soft"))
    return svg.render(standalone)


def learning_curves(history: Sequence[Mapping[str, Any]], width: int = 340) -> list[str]:
    """One panel per quantity of a run's history, losses first, the stages of a run one after the other.

    Rows name their numbers `train/<quantity>/<role>` or `val/<quantity>`; curves of the same quantity share a panel.

    Args:
        history: Rows with `stage`, `step`, and numbers by name.
        width: Of one panel, in pixels.

    Returns:
        SVG text of each panel.

    Example:
        >>> rows = [{"stage": "train", "step": i, "train/loss/student": 1 / i, "val/top1": i / 9} for i in (1, 2, 3)]
        >>> len(learning_curves(rows))
        2
    """
    panels, starts = _series(history)
    order = sorted(panels, key=lambda name: (name == "lr", "loss" not in name))
    return [_curves(name, panels[name], starts, width) for name in order]


def samples(name: str, x: Any, frame: Any, width: int = 340) -> str:
    """Samples as a grid of images, or of points on a plane; empty where they are neither.

    Args:
        name: What they are of.
        x: Images `[N, 1 or 3, H, W]`, flattened square ones of 49 pixels or more `[N, D]`, or points `[N, 2]`.
        frame: Samples by which the picture is scaled: theirs are the darkest and brightest pixels, or the ends of the axes.
        width: In pixels.

    Returns:
        SVG text.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
        >>> samples("student", points, points).count("<circle")
        2
    """
    svg = Svg(width, width + 24, f"Samples: {label(name)}").text(0, 14, label(name), "strong")
    if x.ndim == 2 and x.shape[1] == 2:
        (left, top), (right, bottom) = frame.amin(0).tolist(), frame.amax(0).tolist()
        size = max(right - left, bottom - top) * 1.3 or 1.0
        middle = ((left + right) / 2, (top + bottom) / 2)
        scales = [Scale(m - size / 2, m + size / 2, 0, width) for m in middle]
        for a, b in x.tolist():
            svg.add("circle", cx=scales[0](a), cy=24 + width - scales[1](b), r=3, cls="f1")
        return svg.render()
    side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
    if side >= 7 and side * side == x.shape[1]:
        x = x.view(len(x), 1, side, side)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return ""
    low, high = float(frame.min()), float(frame.max())
    pixels = (255 * (x - low) / max(high - low, 1e-9)).clamp(0, 255).byte()
    across = math.ceil(math.sqrt(len(pixels)))
    cell = width / across
    for i, image in enumerate(pixels):
        place: dict[str, Any] = {
            "x": cell * (i % across),
            "y": 24 + cell * (i // across),
            "width": cell - 2,
            "height": cell - 2,
        }
        svg.add("image", href=_png(image), style="image-rendering:pixelated", **place)
    return svg.render()


def _png(image: Any) -> str:
    """An image `[1 or 3, H, W]` of bytes as a PNG in a data address."""
    channels, height, width = image.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in image.permute(1, 2, 0))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def proof(result: Mapping[str, Any], width: int = 720, standalone: bool = False) -> str:
    """The arms of a proof: a dot per seed, means with their intervals, and the paired differences.

    Args:
        result: `{"claim": str, "metric": str, "verdict": str, "seeds": [int], "arms": {name: [number per seed]},
            "comparisons": [{"arm", "baseline", "mean", "low", "high"}]}`; comparisons may be missing, and those with
            `"asserted": False` are marked as only reported.
        width: In pixels.
        standalone: Whether the SVG is a file of its own, with its colours and a white ground.

    Returns:
        SVG text.

    Example:
        >>> result = {"claim": "a beats b", "metric": "top1", "verdict": "shown", "seeds": [0, 1],
        ...           "arms": {"b": [0.5, 0.52], "a": [0.6, 0.61]},
        ...           "comparisons": [{"arm": "a", "baseline": "b", "mean": 0.095, "low": 0.03, "high": 0.16}]}
        >>> svg = proof(result)
        >>> svg.count("<circle"), "shown" in svg
        (5, True)
    """
    arms: Mapping[str, Sequence[float]] = result["arms"]
    comparisons: Sequence[Mapping[str, Any]] = result.get("comparisons", [])
    pad = 24 if standalone else 2
    lines = wrap(str(result.get("claim", "")), max(20, int((width - 2 * pad) / 7.6)))
    top = pad + 20 * len(lines) + 46
    middle = top + 44 * len(arms)
    height = middle + 30 + (58 + 44 * len(comparisons) + 24 if comparisons else 0) + pad / 2
    svg = Svg(width, height, f"{result.get('claim', '')}: {result.get('verdict', '')}")
    for i, text in enumerate(lines):
        svg.text(pad, pad + 14 + 20 * i, text, "strong big")
    metric, verdict, seeds = result["metric"], str(result.get("verdict", "")), result.get("seeds", [])
    svg.text(pad, top - 24, f"{label(metric)}, {len(seeds) or '?'} seeds; bars: 95 % intervals", "soft")
    shown = verdict.startswith("shown")
    svg.text(width - pad, top - 24, f"verdict: {verdict}", "strong " + ("f2" if shown else "f5"), "end")
    _arms(svg, arms, seeds, metric, (pad + 6, width - pad - 6), (top, middle))
    if comparisons:
        _differences(svg, comparisons, (pad + 6, width - pad - 6), middle + 58)
    return svg.render(standalone)


def proof_svg(result: Mapping[str, Any]) -> str:
    """The picture of a proof as a file of its own, for cards and documentation; see `proof`."""
    return proof(result, standalone=True)


def _stairs(x: Scale, y: Scale, points: list[tuple[float, float]], rising: bool) -> list[tuple[float, float]]:
    """The front's staircase in pixels: nothing was found beyond it."""
    ordered = sorted(points)
    steps = [(x(a), y(b)) for a, b in ordered[:1]]
    for (x0, y0), (x1, y1) in pairwise(ordered):
        corner = (x(x0), y(y1)) if rising else (x(x1), y(y0))
        steps += [corner, (x(x1), y(y1))]
    return steps


def _spots(
    places: list[tuple[float, float]], names: list[str], stairs: list[tuple[float, float]], sides: tuple[float, float]
) -> list[tuple[float, float]]:
    """Where each point's name covers the least of the points, the staircase and the names before it."""
    taken = [(px - 8, py - 8, px + 8, py + 8) for px, py in places]
    for (ax, ay), (bx, by) in pairwise(stairs):
        taken.append((min(ax, bx) - 3, min(ay, by) - 3, max(ax, bx) + 3, max(ay, by) + 3))
    spots = []
    for (px, py), name in zip(places, names, strict=True):
        size = text_width(name)
        around = [(side, py + dy) for dy in (4, -8, 16, -20, 28) for side in (px + 11, px - 11 - size)]
        around += [(px + dx, py + dy) for dy in (-11, 20) for dx in (-size / 2, 4.0, -size - 4)]
        inside = [s for s in around if s[0] >= sides[0] and s[0] + size <= sides[1]] or [(sides[1] - size, py - 12)]
        spot = min(inside, key=lambda s: sum(_overlap(_box(s, size), t) for t in taken))
        taken.append(_box(spot, size))
        spots.append(spot)
    return spots


def _box(spot: tuple[float, float], size: float) -> tuple[float, float, float, float]:
    return spot[0], spot[1] - 11, spot[0] + size, spot[1] + 3


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _series(
    history: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, dict[str, list[tuple[float, float]]]], list[tuple[float, str]]]:
    """Curves by panel and name over one running step count, and where each stage starts."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    starts: list[tuple[float, str]] = []
    offset = last = 0.0
    for row in history:
        stage, step = str(row.get("stage", "")), float(row.get("step", 0))
        offset = last if offset + step < last else offset  # a stage that counts its own steps begins again
        if not starts or starts[-1][1] != stage:
            starts.append((last, stage))
        last = offset + step
        for key, value in row.items():
            if key not in _META and isinstance(value, int | float) and not isinstance(value, bool):
                panel, curve = _place(key)
                panels.setdefault(panel, {}).setdefault(curve, []).append((last, float(value)))
    return panels, starts


def _place(key: str) -> tuple[str, str]:
    """Panel and curve of a number: `train/loss/student` is the student's curve in the panel of losses."""
    split, _, rest = key.partition("/")
    quantity, _, role = rest.partition("/")
    if not quantity:
        return key, ""
    return quantity, role if role and split == "train" else f"{role} {split}".strip()


def _curves(
    name: str, curves: Mapping[str, list[tuple[float, float]]], starts: list[tuple[float, str]], width: int
) -> str:
    height = 210
    svg = Svg(width, height, f"{label(name)} over steps")
    finite = [v for points in curves.values() for _, v in points if math.isfinite(v)]
    svg.text(0, 14, label(name), "strong")
    if not finite:
        return svg.text(0, 40, "no finite value", "soft").render()
    log = min(finite) > 0 and max(finite) / min(finite) > 50 and name != "lr"
    ends = [x for points in curves.values() for x, _ in points]
    top, bottom = 44, height - 24
    y = Scale(*span(finite, log=log), bottom, top, log=log)
    ticks = [(t, f"{t:g}") for t in y.ticks(4)]
    left, right = max(text_width(text) for _, text in ticks) + 12, width - 6
    x = Scale(min(ends), max(ends), left, right)
    svg.y_axis(y, left, right, ticks)
    for tick in x.ticks(4):
        text = f"{tick:,.0f}"
        svg.text(min(x(tick), width - text_width(text) / 2), bottom + 16, text, "soft", "middle")
    if len(starts) > 1:
        for start, _ in starts:
            if x.low < start < x.high:
                svg.line(x(start), top, x(start), bottom, "axis dash")
    at = 0.0
    for i, (curve, points) in enumerate(curves.items()):
        _curve(svg, [(x(a), y(b) if math.isfinite(b) and (b > 0 or not log) else math.nan) for a, b in points], i)
        if len(curves) > 1 or curve:
            svg.add("circle", cx=at + 4, cy=28, r=4, cls=f"f{i % 6}").text(at + 13, 32, curve, "soft")
            at += text_width(curve) + 28
    _hovers(svg, curves, x, (top, bottom), starts)
    return svg.render()


def _curve(svg: Svg, points: list[tuple[float, float]], index: int) -> None:
    drawn = points[:: -(-len(points) // _POINTS)]
    if len(drawn) < 60:
        svg.path(drawn, f"s{index % 6} wide")
        if len(drawn) < 12:
            for px, py in drawn:
                if math.isfinite(py):
                    svg.add("circle", cx=px, cy=py, r=2.5, cls=f"f{index % 6}")
        return
    svg.path(drawn, f"s{index % 6} thin").path(_running_mean(drawn), f"s{index % 6} wide")


def _running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each point's mean with its neighbours, a fortieth of the curve to either side; a gap stays a gap."""
    reach, means = max(1, len(points) // 40), []
    for i, (x, y) in enumerate(points):
        near = [v for _, v in points[max(0, i - reach) : i + reach + 1] if math.isfinite(v)]
        means.append((x, sum(near) / len(near) if math.isfinite(y) else math.nan))
    return means


def _hovers(
    svg: Svg,
    curves: Mapping[str, list[tuple[float, float]]],
    x: Scale,
    ends: tuple[float, float],
    starts: list[tuple[float, str]],
) -> None:
    """Invisible strips that tell the values at a step."""
    table: dict[float, dict[str, float]] = {}
    for name, points in curves.items():
        for step, value in points:
            table.setdefault(step, {})[name] = value
    steps = sorted(table)
    steps = steps[:: -(-len(steps) // _HOVERS)]
    wide = (x.stop - x.start) / max(1, len(steps))
    for step in steps:
        stage = next((s for start, s in reversed(starts) if start <= step), "")
        values = [f"{name or 'value'}: {value:.5g}" for name, value in table[step].items()]
        tip = "\n".join([f"step {step:,.0f}" + (f", {stage}" if stage else ""), *values])
        start = min(max(x(step) - wide / 2, x.start), x.stop - wide)
        svg.add("rect", tip=tip, x=start, y=ends[0], width=wide, height=ends[1] - ends[0], cls="hit")


def _arms(
    svg: Svg,
    arms: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    metric: str,
    sides: tuple[float, float],
    rows: tuple[float, float],
) -> None:
    bands = {name: interval(values) if len(values) > 1 else None for name, values in arms.items()}
    seen = [v for values in arms.values() for v in values]
    low, high = span(seen, pad=0.25)  # an interval of two seeds may be far wider than what was seen
    ends = [min(max(v, low), high) for band in bands.values() if band for v in (band.low, band.high)]
    x = Scale(*span([*seen, *ends], pad=0.03), *sides)
    svg.x_axis(x, rows[0], rows[1], [(t, f"{t:g}") for t in x.ticks(int(sides[1] - sides[0]) // 90)])
    for i, (name, values) in enumerate(arms.items()):
        y = rows[0] + 44 * i + 30
        colour = 0 if i == len(arms) - 1 else 1 + i % 4
        mean, deviation = mean_deviation(values)
        spread = f" ± {show(metric, deviation)}" if len(values) > 1 else ""
        svg.text(sides[0] - 6, y - 14, name.replace("_", " "), "strong halo")
        svg.text(sides[1] + 6, y - 14, show(metric, mean) + spread, "halo", "end")
        if band := bands[name]:
            start, stop = (x(min(max(v, x.low), x.high)) for v in (band.low, band.high))
            svg.line(start, y, stop, y, f"s{colour} thick veil")
        for j, value in enumerate(values):
            seed = seeds[j] if j < len(seeds) else j
            svg.add("circle", tip=f"{name}, seed {seed}: {value:.5g}", cx=x(value), cy=y, r=4, cls=f"f{colour}")
        svg.line(x(mean), y - 9, x(mean), y + 9, f"s{colour} wide")


def _differences(svg: Svg, comparisons: Sequence[Mapping[str, Any]], sides: tuple[float, float], top: float) -> None:
    x = Scale(*span([0.0, *(c[k] for c in comparisons for k in ("low", "high"))]), *sides)
    bottom = top + 44 * len(comparisons)
    svg.text(sides[0] - 6, top - 10, "paired differences over seeds", "soft")
    svg.x_axis(x, top, bottom, [(t, f"{t:+g}" if t else "0") for t in x.ticks(int(sides[1] - sides[0]) // 90)])
    svg.line(x(0), top, x(0), bottom, "axis wide")
    for i, c in enumerate(comparisons):
        y = top + 44 * i + 30
        clear = c["low"] > 0 or c["high"] < 0
        colour = 0 if clear else 5
        text = f"{c['mean']:+.3g}  [{c['low']:+.3g}, {c['high']:+.3g}]"
        name = f"{c['arm']} − {c['baseline']}{'' if c.get('asserted', True) else ', reported'}"
        svg.text(sides[0] - 6, y - 14, name.replace("_", " "), "strong halo")
        svg.text(sides[1] + 6, y - 14, text, "halo", "end")
        svg.line(x(c["low"]), y, x(c["high"]), y, f"s{colour} thick veil")
        svg.add("circle", tip=text, cx=x(c["mean"]), cy=y, r=5, cls=f"f{colour}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
