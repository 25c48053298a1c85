import math
import re
import xml.etree.ElementTree as ET

import pytest

from limbeck.report.chart import Scale, Svg, span
from limbeck.report.figures import bars, learning_curves, pareto, proof, proof_svg
from limbeck.report.format import better, label, show

SVG = "{http://www.w3.org/2000/svg}"
CANDIDATES = [
    {"name": "big", "mrr": 0.80, "bytes": 90e6, "throughput": 100.0},
    {"name": "middle", "mrr": 0.75, "bytes": 40e6, "throughput": 400.0},
    {"name": "worse", "mrr": 0.60, "bytes": 60e6, "throughput": 300.0},
    {"name": "tiny", "mrr": 0.70, "bytes": 10e6, "throughput": 9000.0},
]
PROOF = {
    "claim": "a <b> & c",
    "metric": "top1",
    "verdict": "shown",
    "seeds": [3, 5, 8],
    "arms": {"kd": [0.60, 0.62, 0.61], "pld": [0.66, 0.67, 0.65]},
    "comparisons": [{"arm": "pld", "baseline": "kd", "mean": 0.05, "low": 0.02, "high": 0.08}],
}


def parse(svg):
    return ET.fromstring(svg)


def tips(svg):
    return [t.text for t in parse(svg).iter(f"{SVG}title")]


def texts(svg):
    return [t.text for t in parse(svg).iter(f"{SVG}text")]


def circles(svg):
    return {
        c.find(f"{SVG}title").text.split("\n")[0]: (float(c.get("cx")), float(c.get("cy")), c.get("class"))
        for c in parse(svg).iter(f"{SVG}circle")
        if c.find(f"{SVG}title") is not None
    }


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.12, 0.97, False), (-3e-7, 2e-6, False), (5, 5e6, True), (41, 55, True), (2.1, 2.9, True)],
)
def test_ticks_are_round_and_within_the_axis(low, high, log):
    scale = Scale(low, high, 0, 100, log=log)
    ticks = scale.ticks(5)
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(low <= t <= high and 0 <= scale(t) <= 100 for t in ticks)
    assert all(len(f"{abs(t):.10g}".strip("0.").replace(".", "").rstrip("0").split("e")[0]) <= 2 for t in ticks)


def test_span_of_equal_or_zero_values_is_not_empty():
    for values in ([0.0], [5.0, 5.0], [-2.0]):
        low, high = span(values)
        assert low < min(values) <= max(values) < high
    low, high = span([7.0], log=True)
    assert 0 < low < 7 < high


def test_text_is_escaped():
    svg = Svg(10, 10, 'a "<b>" & c').text(0, 0, "<script>&").add("circle", tip="<i>", cx=1).render()
    root = parse(svg)
    assert root.get("aria-label") == 'a "<b>" & c'
    assert texts(svg) == ["<script>&"]
    assert tips(svg) == ["<i>"]


def test_bars_are_as_long_as_their_values():
    svg = bars({"teacher": {"mrr@10": 0.8}, "other": {"x": 1.0}, "student": {"mrr@10": 0.4}}, "mrr@10", width=300)
    lengths = [float(r.get("width")) for r in parse(svg).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert lengths == [300, 150]
    assert tips(svg) == ["Teacher: 0.8", "Student: 0.4"]
    assert "higher is better" in texts(svg)


def test_bars_of_negative_values_start_at_zero():
    svg = bars({"a": {"gain": -1.0}, "b": {"gain": 3.0}}, "gain", width=400)
    drawn = [r for r in parse(svg).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert [(float(r.get("x")), float(r.get("width"))) for r in drawn] == [(0, 100), (100, 300)]


@pytest.mark.parametrize("cost", ["bytes", "throughput"])
@pytest.mark.parametrize("width", [360, 860])
def test_pareto_places_points_and_draws_the_front(cost, width):
    svg = pareto(CANDIDATES, "mrr", cost, chosen=["middle"], width=width)
    places = circles(svg)
    order = sorted(CANDIDATES, key=lambda p: p[cost])
    assert [p["name"] for p in order] == sorted(places, key=lambda name: places[name][0])
    assert places["big"][1] < places["middle"][1] < places["tiny"][1] < places["worse"][1]
    assert places["middle"][2] == "f0"
    assert places["big"][2] == places["tiny"][2] == "ring s0"
    assert places["worse"][2] == "ring s5"
    [stairs] = [p.get("d") for p in parse(svg).iter(f"{SVG}path")]
    corners = {tuple(map(float, c.split())) for c in re.split("[ML]", stairs)[1:]}
    assert {places[n][:2] for n in ("big", "middle", "tiny")} <= corners
    assert places["worse"][:2] not in corners
    for x, y in corners:  # the staircase runs through what is beaten: never above or beyond a point of the front
        assert any(x == places[n][0] for n in places)
        assert any(y == places[n][1] for n in places)


def test_a_stair_is_reached_by_a_point_of_the_front():
    """Each corner is beaten: some point on the front is at least as good in both."""
    for cost, sign in (("bytes", -1), ("throughput", 1)):
        svg = pareto(CANDIDATES, "mrr", cost)
        places = circles(svg)
        front = [places[n] for n in ("big", "middle", "tiny")]
        [stairs] = [p.get("d") for p in parse(svg).iter(f"{SVG}path")]
        for corner in re.split("[ML]", stairs)[1:]:
            x, y = map(float, corner.split())
            assert any(sign * (px - x) >= 0 and py <= y for px, py, _ in front)


def test_tenfold_differences_of_what_should_be_small_are_on_a_logarithmic_axis():
    points = [{"name": str(d), "distance": d, "nfe": 100 / d} for d in (1, 10, 100)]
    svg = pareto(points, "distance", "nfe", height=500, standalone=True)
    heights = [circles(svg)[str(d)][1] for d in (1, 10, 100)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)
    assert {"Distance, logarithmic", "better: down and to the left"} <= set(texts(svg))
    assert 'height="500"' in svg
    assert "Distance" in texts(pareto([points[0], {"name": "b", "distance": 2, "nfe": 9}], "distance", "nfe"))


def test_names_do_not_cover_each_other():
    points = [{"name": f"candidate {i}", "mrr": 0.7 + 0.01 * i, "bytes": 50e6 + 2e6 * i} for i in range(4)]
    svg = pareto([*points, {"name": "far", "mrr": 0.2, "bytes": 1e6}], "mrr", "bytes")
    spots = [
        (float(t.get("x")), float(t.get("y"))) for t in parse(svg).iter(f"{SVG}text") if "candidate" in (t.text or "")
    ]
    gaps = [abs(a[0] - b[0]) > 60 or abs(a[1] - b[1]) >= 9 for i, a in enumerate(spots) for b in spots[:i]]
    assert all(gaps)


def test_pareto_leaves_out_what_has_no_numbers():
    rows = [*CANDIDATES, {"name": "no cost", "mrr": 0.9}, {"name": "nan", "mrr": math.nan, "bytes": 1.0}]
    rows.append({"name": "free", "mrr": 0.5, "bytes": 0})
    assert set(circles(pareto(rows, "mrr", "bytes"))) == {p["name"] for p in CANDIDATES}
    assert "no candidate has both numbers" in texts(pareto([], "mrr", "bytes"))


def history(stages=1, steps=20):
    rows = []
    for stage in range(stages):
        for step in range(1, steps + 1):
            row = {"stage": f"stage {stage}", "step": step, "epoch": 0, "time": 1.0, "flag": True, "note": "x"}
            row |= {"train/loss/student": 1 / step, "train/loss/critic": 2.0, "train/lr/student": 0.1}
            rows.append(row | ({"val/top1": 0.5} if step % 10 == 0 else {}))
    return rows


def test_curves_of_one_quantity_share_a_panel_and_losses_come_first():
    panels = learning_curves(history())
    assert [parse(p).get("aria-label") for p in panels] == [
        "Loss over steps",
        "Top-1 over steps",
        "Learning rate over steps",
    ]
    assert {"student", "critic"} <= set(texts(panels[0]))
    assert "step 4, stage 0\nstudent: 0.25\ncritic: 2" in tips(panels[0])


def test_stages_follow_each_other_whether_steps_start_again_or_not():
    again = history(stages=2, steps=10)
    onwards = [{**row, "step": row["step"] + (10 if row["stage"] == "stage 1" else 0)} for row in again]
    assert learning_curves(again) == learning_curves(onwards)
    svg = learning_curves(again)[0]
    assert "step 20, stage 1\nstudent: 0.1\ncritic: 2" in tips(svg)
    assert svg.count("axis dash") == 1


def test_a_gap_breaks_the_curve():
    rows = [{"stage": "train", "step": i, "val/top1": math.nan if i == 3 else i / 10} for i in range(1, 6)]
    [path] = [p.get("d") for p in parse(learning_curves(rows)[0]).iter(f"{SVG}path")]
    assert path.count("M") == 2
    assert "nan" not in path
    nothing = [{"stage": "train", "step": 1, "val/top1": math.nan}]
    assert "no finite value" in texts(learning_curves(nothing)[0])


def test_long_histories_stay_small():
    rows = [{"stage": "train", "step": i, "train/loss/student": 1 + 0.1 * (i % 7)} for i in range(20_000)]
    [panel] = learning_curves(rows)
    assert len(panel) < 40_000
    thin, thick = [p.get("d") for p in parse(panel).iter(f"{SVG}path")]

    def swing(d):
        ys = [float(c.split()[1]) for c in re.split("[ML]", d)[1:]]
        return max(ys) - min(ys)

    assert swing(thick) < 0.5 * swing(thin)


def test_proof_shows_every_seed_every_arm_and_the_difference():
    svg = proof(PROOF)
    places = circles(svg)
    for arm, values in PROOF["arms"].items():
        assert {f"{arm}, seed {s}: {v:.5g}" for s, v in zip(PROOF["seeds"], values, strict=True)} <= set(places)
    x = {float(tip.split(": ")[1]): place[0] for tip, place in places.items() if "seed" in tip}
    assert [x[v] for v in sorted(x)] == sorted(x.values())
    assert {"a <b> & c", "verdict: shown", "pld − kd", "0.660 ± 0.010"} <= set(texts(svg))


@pytest.mark.parametrize("width", [360, 860])
def test_everything_in_a_proof_lies_within_the_picture(width):
    wild = {**PROOF, "arms": {"kd": [0.1, 0.9], "pld": [0.5, 0.51]}, "claim": "long " * 60}
    svg = parse(proof(wild, width))
    height = float(svg.get("viewBox").split()[3])
    for element in svg.iter():
        for key, limit in {"cx": width, "x1": width, "x2": width, "cy": height, "y1": height, "y2": height}.items():
            assert 0 <= float(element.get(key, 0)) <= limit, (element.tag, key)
        assert 0 <= float(element.get("y", 0)) <= height


def test_a_proof_of_one_seed_and_no_comparison_is_drawn():
    svg = proof({"claim": "c", "metric": "top1", "verdict": "not shown", "seeds": [0], "arms": {"kd": [0.5]}})
    assert {"verdict: not shown", "0.500"} <= set(texts(svg))


def test_a_stand_alone_proof_needs_nothing_else():
    svg = proof_svg(PROOF)
    root = parse(svg)
    assert root.get("width") == "720"
    used = {c for e in root.iter() for c in (e.get("class") or "").split()}
    style = root.find(f"{SVG}style").text
    assert all(re.search(rf"\.{c}\b", style) for c in used)
    variables = set(re.findall(r"var\((--\w+)\)", style))
    assert all(f"{v}:" in style for v in variables)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("bytes", 0, "0 bytes"),
        ("bytes", 999, "999 bytes"),
        ("parameters", 999_999, "1 M"),
        ("seconds", 59.9, "59.9 s"),
        ("seconds", 3700, "1h 1m"),
        ("latency", 2e-5, "20 µs"),
        ("top1", 1, "1"),
        ("top1", 0.0004, "0.0004"),
        ("top1", None, "–"),
        ("enabled", True, "True"),
        ("steps_per_second", 12.0, "12.0 /s"),
    ],
)
def test_numbers_are_shown_by_their_name(name, value, text):
    assert show(name, value) == text


def test_names_tell_the_better_side():
    assert {better(n) for n in ("loss", "ece", "teacher_kl", "bytes", "seconds", "latency", "flops")} == {"lower"}
    assert {better(n) for n in ("mrr@10", "top1", "spearman", "throughput", "steps_per_second", "f1", "sentiment")} == {
        "higher"
    }
    assert label("stsb_spearman") == "STS-B spearman"
