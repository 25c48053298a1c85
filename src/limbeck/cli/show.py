"""What commands print: tables and results on standard output, made for people or as JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print records as aligned columns.

    Example:
        >>> table([{"name": "kd", "year": 2015}, {"name": "pld", "year": 2025}])
        name  year
        kd    2015
        pld   2025
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def as_json(value: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def text(value: object) -> str:
    """A value in a cell."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def outcome(folder: Path) -> None:
    """Print what a finished run came to, where its report lies, and what to do next."""
    from limbeck.report.format import label, show
    from limbeck.report.run import read_run

    run = read_run(folder)
    student, teacher, before = (run.models.get(name, {}) for name in ("student", "teacher", "student_before"))
    rows = []
    for name, value in student.items():
        row = {"": label(name), "student": show(name, value)}
        if before:
            row["before"] = show(name, before.get(name))
        if teacher:
            row["teacher"] = show(name, teacher.get(name))
        rows.append(row)
    table(rows)
    print(f"student  {folder / 'student'}")
    print(f"report   {folder / 'report.html'}")
    manifest = folder / "student" / "limbeck.json"
    saved = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    kinds = [str(record.get("kind")).rpartition(":")[2] for record in saved.get("records", [])]
    verb = "family" if "make_elastic" in kinds and "extract" not in kinds else "export"
    if (folder / "student" / "condensed.json").is_file() or any(folder.glob("artefacts/*/synthetic.json")):
        print(f"next     limbeck distill --data condensed:{folder} --student SPEC")
    elif manifest.is_file():  # other data sets are read in Python
        print(f"next     limbeck {verb} {folder}{' --trust' if '.py:' in str(saved.get('spec')) else ''}")
