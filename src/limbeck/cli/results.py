"""`limbeck report`, `compare`, `export` and `family`: what finished runs came to, and what can be made of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

_Trust = Annotated[bool, typer.Option("--trust", help="Run Python code that the folder names: file.py:function.")]


class _Form(StrEnum):
    INT8_WEIGHT = "int8-weight"
    INT8_DYNAMIC = "int8-dynamic"
    SPARSE = "2:4"


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
    to: Annotated[_Form | None, typer.Option(help="The form of its linear layers; default: as they are.")] = None,
    trust: _Trust = False,
) -> None:
    """Write the student of a run as ONNX, checked against the module."""
    from limbeck.cli import show
    from limbeck.finished import export as export_run
    from limbeck.report.format import label
    from limbeck.report.format import show as number

    found = export_run(run, onnx, trust=trust, to=None if to is None else to.value)
    print(f"onnx     {found.onnx.path}")
    print(f"inputs   {', '.join(found.onnx.inputs)}")
    print(
        f"differs  by at most {found.onnx.max_rel_error:.1e} of the largest output, on sizes {list(found.onnx.checked)}"
    )
    done = found.deployed
    if done is None or to is None:
        return
    before, after = ({**numbers} for numbers in (found.before, found.after))
    before |= {"bytes": done.bytes_before, "latency": done.latency_before.median}
    after |= {"bytes": done.bytes_after}
    if done.latency_after is not None:
        after["latency"] = done.latency_after.median
    rows = [{"": label(n), "student": number(n, v), to.value: number(n, after.get(n))} for n, v in before.items()]
    show.table(rows)
    print(f"outputs  differ by at most {done.relative_difference:.1e} of the largest, over {done.layers} layers")
    for note in (done.note, found.unjudged and f"not judged on data: {found.unjudged}"):
        if note:
            print(f"note     {note}")


def family(
    run: Annotated[Path, typer.Argument(help="The folder of a run whose student is elastic.")],
    parameters: Annotated[float | None, typer.Option(help="Pick the best with at most this many.")] = None,
    flops: Annotated[float | None, typer.Option(help="With at most this many for a sample.")] = None,
    latency: Annotated[float | None, typer.Option(help="With at most this many milliseconds for a sample.")] = None,
    out: Annotated[Path | None, typer.Option(help="Its folder; default: picked/ in the run's folder.")] = None,
    count: Annotated[int, typer.Option(help="Sub-networks to measure.", min=2)] = 20,
    again: Annotated[bool, typer.Option("--again", help="Measure, where that was done before.")] = False,
    trust: _Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure the sub-networks of an elastic student, and pick one within a budget."""
    from dataclasses import asdict

    from limbeck.cli import show
    from limbeck.finished import family as measure
    from limbeck.finished import save_member
    from limbeck.report.run import write_report

    found = measure(run, trust=trust, count=count, again=again)
    budget = {"parameters": parameters, "flops": flops, "latency": None if latency is None else latency / 1000}
    picked = None
    if any(limit is not None for limit in budget.values()):
        small, picked = found.pick(**budget)
        out = out or run / "picked"
        save_member(run, picked, small, out)
    page = write_report(run)
    if json:
        members = [asdict(member) for member in found.members]
        show.as_json({"members": members} if picked is None else {"members": members, "picked": asdict(picked)})
        return
    front = found.front()
    show.table([_row(member, "yes" if member in front else "") for member in found.members])
    if picked is not None:
        print(f"picked   {out}: {', '.join(f'{name}={size}' for name, size in picked.arch.items())}")
        print(f"load     limbeck.load({str(out)!r})")
    else:
        print(f"next     limbeck family {run} --parameters {found.members[len(found.members) // 2].parameters}")
    print(f"report   {page}")


def _row(member: Any, unbeaten: str) -> dict[str, str]:
    from limbeck.report.format import label, show

    numbers = {"parameters": member.parameters, "flops": member.flops, "latency": member.latency}
    if member.metric is not None:
        numbers[member.metric] = member.quality
    return {label(name): show(name, value) for name, value in numbers.items()} | {"unbeaten": unbeaten}
