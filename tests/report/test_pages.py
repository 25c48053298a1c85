import json
import re
from html.parser import HTMLParser

import pytest

from limbeck.core.errors import UsageError
from limbeck.report import Page, comparison, write_comparison, write_report
from limbeck.report.page import Cell, flatten
from limbeck.report.run import read_run

METRICS = {
    "task": "Sentences <small>",
    "primary": "mrr@10",
    "seconds": 291,
    "models": {
        "student": {"mrr@10": 0.76, "bytes": 45_000_000, "parameters": 11_000_000, "throughput": 530.0},
        "teacher": {"mrr@10": 0.80, "bytes": 90_000_000, "parameters": 22_000_000, "throughput": 100.0},
        "student_before": {"mrr@10": 0.50, "bytes": 45_000_000, "note": "text is left out"},
    },
    "candidates": [
        {"name": "layers:2", "metrics": {"mrr@10": 0.76}, "bytes": 45_000_000, "throughput": 530.0, "chosen": True},
        {"name": "static", "metrics": {"mrr@10": 0.61}, "bytes": 20_000_000, "throughput": 9000.0},
    ],
    "data": {"sentences": 21_873},
    "lineage": {"teacher": "minilm", "method": "kd", "recipe": {"seed": 0}},
    "environment": {"cpu": "some"},
}
ROW = {"stage": "train", "step": 1, "epoch": 0, "time": 0.1, "train/loss/student": 0.5, "val/mrr@10": 0.6}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """The page's tags in order, with a check that they nest, and its visible text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script", "title"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", metrics=METRICS, history=(ROW, ROW | {"step": 2})):
        folder = tmp_path / name
        folder.mkdir()
        if metrics is not None:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        if history is not None:
            (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        return folder

    return make


def test_a_report_holds_every_part_and_needs_nothing_else(make_run):
    folder = make_run()
    path = write_report(folder)
    assert path == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == ["history.jsonl", "metrics.json", "report.html"]
    html = path.read_text()
    page = Reader(html)
    for heading in ("side by side", "What was tried", "Learning curves", "Data", "How it was made", "Measured on"):
        assert heading in page.text
    for number in ("95.0 %", "0.760 of the teacher's 0.800", "× 5.3", "÷ 2", "4m 51s", "21,873", "Recipe › seed"):
        assert number in page.text
    assert "Sentences <small>" in page.text
    assert "small" not in page.tags
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href")]
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|url\(", html)
    assert len(html) < 60_000


def test_models_stand_in_order_with_their_share_of_the_teacher(make_run):
    run = read_run(make_run())
    assert list(run.models) == ["teacher", "student_before", "student"]
    assert "note" not in run.models["student_before"]
    assert run.chosen == ["layers:2"]
    text = Reader(write_report(run.folder).read_text()).text
    assert "Quantity Teacher Student before Student Of the teacher's MRR@10 0.800 0.500 0.760 95.0 %" in text
    assert "Throughput 100.0 /s – 530.0 /s 5.30×" in text


def test_a_lower_is_better_metric_is_not_called_kept(make_run):
    models = {"teacher": {"loss": 0.2}, "student": {"loss": 0.3}}
    text = Reader(write_report(make_run(metrics={"primary": "loss", "models": models})).read_text()).text
    assert "kept" not in text
    assert "Loss 0.300 the teacher has 0.200" in text


def test_a_bigger_student_is_called_bigger(make_run):
    models = {"teacher": {"bytes": 10}, "student": {"bytes": 25}}
    assert "× 2.5" in Reader(write_report(make_run(metrics={"models": models})).read_text()).text


@pytest.mark.parametrize(
    ("metrics", "history", "note"),
    [
        (None, (ROW,), "no metrics.json"),
        (METRICS, None, "no history.jsonl"),
        (METRICS, (), ""),
        ({"task": "t"}, (ROW,), ""),
        ({"models": {"student": {"a": 1.0}}}, (), ""),
        ({"candidates": [{"name": "a"}], "primary": "x"}, (), ""),
    ],
)
def test_missing_pieces_are_tolerated_and_said(make_run, metrics, history, note):
    page = Reader(write_report(make_run(metrics=metrics, history=history)).read_text())
    assert note in page.text
    assert ("Learning curves" in page.text) == bool(history)


def test_conversions_and_families_are_shown(make_run):
    row = {"stage": "finalise", "step": 0, "convert/agreement": 0.98, "before/top1": 0.9, "after/top1": 0.8}
    folder = make_run(history=(ROW, row))
    member = {
        "arch": {"0.ffn": 8},
        "parameters": 1200,
        "flops": 2400,
        "latency": None,
        "quality": 0.7,
        "metric": "top1",
    }
    (folder / "family.json").write_text(json.dumps({"members": [member, member | {"parameters": 900, "quality": 0.6}]}))
    page = Reader(write_report(folder).read_text())
    assert "Conversion Agreement Top-1 finalise 0.980 0.900 → 0.800" in page.text
    assert "1.2 k 2.4 k 0.700 0.ffn=8" in page.text
    assert "Agreement" not in page.text.partition("Learning curves")[2]
    (folder / "family.json").write_text("{")
    assert "family.json could not be read" in Reader(write_report(folder).read_text()).text


def test_a_history_cut_short_by_a_kill_is_read_up_to_there(make_run):
    folder = make_run()
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"stage": "tra')
    assert "1 of 3 lines of history.jsonl could not be read" in Reader(write_report(folder).read_text()).text
    assert len(read_run(folder).history) == 2


def test_damaged_metrics_are_said(make_run):
    folder = make_run()
    (folder / "metrics.json").write_text('{"task": ')
    assert "metrics.json could not be read" in Reader(write_report(folder).read_text()).text


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p / "gone"])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path, make):
    with pytest.raises(UsageError, match=r"not a run folder[\s\S]*metrics\.json") as error:
        write_report(make(tmp_path))
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_runs_are_compared_by_their_students(make_run, tmp_path):
    other = json.loads(json.dumps(METRICS))
    other["models"]["student"]["mrr@10"] = 0.72
    folders = [make_run("a"), make_run("b", metrics=other)]
    first, second = comparison(folders)
    assert list(first)[:4] == ["run", "method", "mrr@10", "of the teacher's"]
    assert (first["run"], first["mrr@10"], first["of the teacher's"]) == ("a", 0.76, "95.0 %")
    assert second["of the teacher's"] == "90.0 %"
    html = write_comparison(folders, tmp_path / "out" / "page.html").read_text()
    page = Reader(html)
    assert "2 runs compared" in page.text
    assert '<td class="best">0.760</td>' in html
    assert "different metrics" not in page.text


def test_runs_judged_by_different_metrics_are_said_to_be(make_run, tmp_path):
    folders = [make_run("a"), make_run("b", metrics={**METRICS, "primary": "spearman"})]
    page = Reader(write_comparison(folders, tmp_path / "page.html").read_text())
    assert "judged by different metrics: MRR@10, Spearman" in page.text


def test_an_unfinished_run_cannot_be_compared(make_run):
    with pytest.raises(UsageError, match=r"no evaluated student[\s\S]*no metrics\.json"):
        comparison([make_run("a"), make_run("b", metrics=None)])


def test_a_table_marks_the_best_and_shows_units():
    rows = [{"name": "a", "mrr": 0.5, "watt": 3.0}, {"name": "b", "mrr": 0.6, "watt": float("nan")}, {"name": "c"}]
    html = Page("t").table(rows, best={"mrr": "high", "watt": "low"}, units={"watt": "W"}, caption="why").html()
    assert '<td class="best">0.600</td>' in html
    assert "<td>3.000</td>" in html  # the only number of its column is no winner
    assert "<th>Watt (W)</th>" in html
    assert html.count("<td>–</td>") == 3
    assert "<caption>why</caption>" in html


def test_everything_a_user_gives_is_escaped():
    bad = "<script>alert(1)</script>"
    page = Page(bad, bad, bad, bad).section(bad, bad).cards([(bad, bad, bad)]).facts({bad: bad}).code(bad).note(bad)
    html = page.table([{bad: bad}, {bad: Cell(bad)}], caption=bad).html()
    assert bad not in html
    assert Reader(html).tags.count("script") == 1


def test_a_figure_is_drawn_for_wide_and_narrow_screens():
    widths = []
    page = Page("t").section("s").figure(lambda width: widths.append(width) or "<svg></svg>", "a caption")
    assert "a caption" in page.html()
    assert len(widths) == 2
    assert min(widths) < 400 < max(widths)


def test_sections_close():
    Reader(Page("t").html())
    Reader(Page("t").section("a").code("x").section("b").panels(["<svg></svg>"]).html())


def test_flatten_keeps_leaves():
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, "x"]}) == {"a.b.c": 1, "d": "1, x"}
