"""`limbeck report`, `limbeck compare` and `limbeck export`: what finished runs came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html again, and print where it is."""
    from limbeck.report.run import write_report

    print(write_report(run))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option(help="Write a page with pictures to this .html file too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Put the students of several runs side by side."""
    from limbeck.cli import show
    from limbeck.report.compare import comparison, write_comparison

    rows = comparison(runs)
    show.as_json(rows) if json else show.table(rows)
    if out is not None:
        print(f"page     {write_comparison(runs, out)}")


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    onnx: Annotated[
        Path | None, typer.Option(help="The file; default: student/model.onnx in the run's folder.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run Python code that the folder names: file.py:function.")
    ] = False,
) -> None:
    """Write the student of a run as ONNX, checked against the module."""
    from limbeck.api import export as export_run

    found = export_run(run, onnx, trust=trust)
    print(f"onnx     {found.path}")
    print(f"inputs   {', '.join(found.inputs)}")
    print(f"differs  by at most {found.max_rel_error:.1e} of the largest output, on sizes {list(found.checked)}")
