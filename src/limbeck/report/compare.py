"""Several runs in one table."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.core.errors import UsageError
from limbeck.report import figures
from limbeck.report.format import better, label
from limbeck.report.page import Page
from limbeck.report.run import Run, kept, read_run


def comparison(run_dirs: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """One record per run: its student's numbers, the primary metric first, and the share of the teacher's that was kept.

    Args:
        run_dirs: Run folders, each with a `metrics.json`.

    Returns:
        Records in the order of the folders.

    Raises:
        UsageError: A folder is no run, or its run has not been evaluated.
    """
    return [_record(_evaluated(run_dir)) for run_dir in run_dirs]


def write_comparison(run_dirs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Write a page that compares runs: quality against each price, and one table.

    Args:
        run_dirs: Run folders, each with a `metrics.json`.
        path: The `.html` file.

    Returns:
        Its path.

    Raises:
        UsageError: A folder is no run, or its run has not been evaluated.
    """
    runs, rows = [_evaluated(run_dir) for run_dir in run_dirs], comparison(run_dirs)
    page = Page(f"{len(runs)} runs compared", eyebrow="Limbeck comparison")
    primaries = list(dict.fromkeys(run.primary for run in runs if run.primary))
    if len(primaries) > 1:
        page.note(f"These runs are judged by different metrics: {', '.join(map(label, primaries))}.")
    for primary in primaries[:1]:
        page.section("Quality and price", "The dashed line joins the runs that no other beats.")
        points = [{"name": row["run"], **row} for row in rows]
        for cost in ("throughput", "bytes"):
            if any(cost in row for row in rows):
                page.figure(partial(figures.pareto, points, primary, cost, ()))
    numbers = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, int | float))
    best = {key: "high" if better(key) == "higher" else "low" for key in numbers}
    return page.section("All numbers").table(rows, best=best).write(path)  # type: ignore[arg-type]


def _evaluated(run_dir: str | os.PathLike[str]) -> Run:
    run = read_run(run_dir)
    if "student" not in run.models:
        raise UsageError(
            "this run has no evaluated student to compare",
            where=run.folder,
            found="; ".join(run.notes) or f"models {list(run.models)}",
            expected='metrics.json with models["student"]',
        )
    return run


def _record(run: Run) -> dict[str, Any]:
    student, teacher = run.models["student"], run.models.get("teacher", {})
    method = run.metrics.get("lineage", {}).get("method")
    record: dict[str, Any] = {"run": run.folder.resolve().name}
    if isinstance(method, str):
        record["method"] = method
    if run.primary in student:
        record[run.primary] = student[run.primary]
        record["of the teacher's"] = kept(student, teacher, run.primary) or "–"
    return record | student
