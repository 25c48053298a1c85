"""From a run folder to its report."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.core.errors import UsageError
from limbeck.report import figures
from limbeck.report.format import better, label, show
from limbeck.report.page import Cell, Page

_ORDER = ("teacher", "student_before", "student")
_CONVERTED = ("convert/", "before/", "after/")
_COSTS = ("parameters", "bytes", "flops", "throughput", "latency", "peak_memory")


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Args:
        folder: The run folder.
        metrics: Content of `metrics.json`; empty when there is none.
        history: Rows of `history.jsonl`.
        notes: What was missing or unreadable, in words.
        family: Content of `family.json`: the sub-networks of an elastic student that were measured.
    """

    folder: Path
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=list)
    family: Sequence[Mapping[str, Any]] = ()

    @property
    def primary(self) -> str:
        """The metric that the run is judged by; empty when it does not say."""
        return str(self.metrics.get("primary", ""))

    @property
    def models(self) -> dict[str, dict[str, float]]:
        """Numbers by model: teacher, student before, student, others."""
        found = {name: _numbers(values) for name, values in self.metrics.get("models", {}).items()}
        return {name: found[name] for name in (*_ORDER, *found) if name in found}

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """One flat record per candidate that was tried."""
        rows = self.metrics.get("candidates", [])
        return [{"name": row["name"], **_numbers(row.get("metrics", {})), **_numbers(row)} for row in rows]

    @property
    def chosen(self) -> list[str]:
        """Names of the candidates marked `"chosen": true`."""
        return [row["name"] for row in self.metrics.get("candidates", []) if row.get("chosen")]


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run folder; what is missing or damaged in it is noted.

    Args:
        run_dir: A folder with `metrics.json`, `history.jsonl` or both.

    Raises:
        UsageError: There is neither file.
    """
    folder = Path(run_dir)
    notes: list[str] = []
    metrics, history = _read_mapping(folder / "metrics.json", notes), _read_history(folder / "history.jsonl", notes)
    if not metrics and not history:
        raise UsageError(
            "this is not a run folder, or the run has not begun",
            where=folder,
            found="no folder" if not folder.is_dir() else "; ".join(notes),
            expected="metrics.json or history.jsonl",
        )
    members: list[Any] = []
    if (folder / "family.json").is_file():
        members = _read_mapping(folder / "family.json", notes).get("members", [])
    return Run(folder, metrics, history, notes, members)


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write a run's `report.html`: one file that works offline.

    Args:
        run_dir: A folder with `metrics.json` and `history.jsonl`; with one of them missing, the report says so.

    Returns:
        Path of the report.

    Raises:
        UsageError: There is neither file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     models = {"teacher": {"top1": 0.9}, "student": {"top1": 0.85}}
        ...     _ = (Path(folder) / "metrics.json").write_text(json.dumps({"primary": "top1", "models": models}))
        ...     "94.4 %" in write_report(folder).read_text()
        True
    """
    run = read_run(run_dir)
    lineage = run.metrics.get("lineage", {})
    made = {key: lineage[key] for key in ("teacher", "student", "method") if isinstance(lineage.get(key), str)}
    subtitle = ", ".join(f"{key} {value}" for key, value in made.items())
    title = str(run.metrics.get("task") or run.folder.resolve().name)
    page = Page(title, subtitle[:1].upper() + subtitle[1:], "Limbeck run report", run.folder.resolve().name)
    page.cards(_key_numbers(run))
    for note in run.notes:
        page.note(note)
    _models(page, run)
    _candidates(page, run)
    _conversions(page, run)
    _family(page, run)
    _samples(page, run)
    _history(page, run)
    for name, heading in (("data", "Data"), ("lineage", "How it was made"), ("environment", "Measured on")):
        if run.metrics.get(name):
            page.section(heading).facts(run.metrics[name])
    return page.write(run.folder / "report.html")


def kept(numbers: Mapping[str, float], reference: Mapping[str, float], metric: str) -> str:
    """A number as a share or a multiple of the reference's; empty where that means nothing.

    Example:
        >>> kept({"mrr": 0.48}, {"mrr": 0.5}, "mrr"), kept({"bytes": 10}, {"bytes": 45}, "bytes")
        ('96.0 %', '22.2 %')
        >>> kept({"throughput": 530}, {"throughput": 100}, "throughput")
        '5.30×'
    """
    a, b = numbers.get(metric), reference.get(metric)
    if a is None or b is None or not (a >= 0 and b > 0):
        return ""
    return f"{a / b:.2f}×" if a / b >= 2 else f"{100 * a / b:.1f} %"


def _key_numbers(run: Run) -> list[tuple[str, str, str]]:
    teacher, student = run.models.get("teacher", {}), run.models.get("student", {})
    cards = []
    if run.primary in student and run.primary in teacher:
        a, b = (show(run.primary, m[run.primary]) for m in (student, teacher))
        share = kept(student, teacher, run.primary) if better(run.primary) == "higher" else ""
        name = f"{label(run.primary)}{' kept' if share else ''}"
        cards.append((name, share or a, f"{a} of the teacher's {b}" if share else f"the teacher has {b}"))
    for cost in ("throughput", "bytes", "parameters"):
        mine, theirs = student.get(cost, 0), teacher.get(cost, 0)
        if mine > 0 and theirs > 0:
            change = f"× {mine / theirs:.3g}" if mine >= theirs else f"÷ {theirs / mine:.3g}"
            sizes = [show(cost, value).replace(" ", "\u00a0") for value in (mine, theirs)]
            cards.append((label(cost), change, f"{sizes[0]}, the teacher {sizes[1]}"))
    if seconds := run.metrics.get("seconds"):
        cards.append(("Time", show("seconds", seconds), "for the whole run"))
    return cards


def _models(page: Page, run: Run) -> None:
    models = run.models
    if not models:
        return
    names = list(dict.fromkeys(metric for numbers in models.values() for metric in numbers))
    names.sort(key=lambda name: (name != run.primary, name in _COSTS))
    quality, costs = [n for n in names if n not in _COSTS][:3], [n for n in ("throughput", "bytes") if n in names]
    if "teacher" in models:
        text = "The student before and after it was distilled, and the teacher that it learned from."
        page.section("Teacher and student, side by side", text)
    else:
        page.section("The student, before and after", "What training made of it.")
    page.panels([figures.bars(models, name) for name in [*quality, *costs]])
    compare = "teacher" in models and "student" in models
    rows = []
    for name in names:
        row: dict[str, Any] = {"quantity": label(name)}
        row |= {model: Cell(show(name, numbers.get(name))) for model, numbers in models.items()}
        if compare:
            row["of the teacher's"] = Cell(kept(models["student"], models["teacher"], name) or "–")
        rows.append(row)
    page.table(rows)


def _candidates(page: Page, run: Run) -> None:
    rows = run.candidates
    teacher = run.models.get("teacher")
    points = [*rows, {"name": "Teacher", **teacher}] if teacher else rows
    if not rows or len(points) < 2:  # one point compares nothing
        return
    page.section(
        "What was tried", "Every candidate with its price. The dashed line joins those that nothing else beats."
    )
    for cost in ("throughput", "bytes"):
        if run.primary and any(cost in row for row in rows):
            page.figure(partial(figures.pareto, points, run.primary, cost, run.chosen))
    directions = {key: better(key) for row in rows for key in row if key != "name"}
    page.table(rows, best={key: "high" if way == "higher" else "low" for key, way in directions.items()})


def _conversions(page: Page, run: Run) -> None:
    """How far each conversion moved the outputs and the numbers."""
    rows = []
    for row in run.history:
        gaps = {k.removeprefix("convert/"): v for k, v in row.items() if k.startswith("convert/")}
        pairs = {k.removeprefix("after/"): (row.get(f"before/{k[6:]}"), v) for k, v in row.items() if k[:6] == "after/"}
        if not gaps and not pairs:
            continue
        cells = {label(name): Cell(show(name, value)) for name, value in gaps.items()}
        cells |= {label(k): Cell(f"{show(k, a)} → {show(k, b)}") for k, (a, b) in list(pairs.items())[:3]}
        rows.append({"conversion": str(row.get("stage", "")), **cells})
    if rows:
        text = "The same samples before and after: how far outputs moved, and the share of equal answers."
        page.section("What conversions changed", text).table(rows)


def _family(page: Page, run: Run) -> None:
    """Quality against cost of the sub-networks of an elastic student."""
    judged = [member for member in run.family if member.get("metric") and member.get("quality") is not None]
    if not judged:
        return
    metric = judged[0]["metric"]
    points = [{**m, metric: m["quality"], "name": show("parameters", m["parameters"])} for m in judged]
    text = "Sub-networks of the one that was trained, named by their parameters. The dashed line joins those unbeaten."
    page.section("The family", text)
    for cost in ("flops", "latency"):
        if all(point.get(cost) for point in points):
            page.figure(partial(figures.pareto, points, metric, cost, ()))
    rows = [
        {name: Cell(show(name, m[name])) for name in ("parameters", "flops", "latency") if m.get(name) is not None}
        | {metric: Cell(show(metric, m["quality"]))} | {"sizes": ", ".join(f"{k}={v}" for k, v in m["arch"].items())}
        for m in judged
    ]  # fmt: skip
    page.table([{label(name): cell for name, cell in row.items()} for row in rows])


def _samples(page: Page, run: Run) -> None:
    """What a generator makes, beside its teacher's and real samples of the same classes."""
    path = run.folder / "samples.safetensors"
    if not path.is_file():
        return
    from safetensors.torch import load_file

    found = load_file(path)
    shown = {name: found[name] for name in ("real", "teacher", "student") if name in found}
    pictures = [picture for name, x in shown.items() if (picture := figures.samples(name, x, shown.get("real", x)))]
    if pictures:
        text = "Of the same classes and from the same noise; the teacher along its flow, the student in its few calls."
        page.section("Samples", text).panels(pictures)


def _history(page: Page, run: Run) -> None:
    learned = [{k: v for k, v in row.items() if not k.startswith(_CONVERTED)} for row in run.history]
    panels = figures.learning_curves(learned)
    if panels:
        page.section("Learning curves", "Thin lines are as logged, thick ones a running mean; dashed: a stage begins.")
        page.panels(panels)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        notes.append(f"{path.name} holds no mapping and was left out.")
    except FileNotFoundError:
        notes.append(f"There is no {path.name}: the run has not been evaluated yet.")
    except (ValueError, OSError) as error:
        notes.append(f"{path.name} could not be read: {error}.")
    return {}


def _read_history(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        notes.append("There is no history.jsonl, so there are no learning curves.")
        return []
    rows, damaged = [], 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
            rows.append(row if isinstance(row, dict) else {})
        except ValueError:
            damaged += 1
    if damaged:
        notes.append(f"{damaged} of {len(lines)} lines of history.jsonl could not be read and were left out.")
    return rows
