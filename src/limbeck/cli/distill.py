"""`limbeck distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def distill(
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="timm:NAME, torchvision:NAME, hf:NAME, st:NAME, file.py:function; several times for several."
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="The same forms, and layers:N, slice:NAME=N, copy, static, condensed:N.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A data set by name, file or folder.")] = None,
    method: Annotated[str | None, typer.Option(help="A name that `limbeck methods` lists, or file.py:Class.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time for the whole run, such as 90s, 5m or 1h.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of one step.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Distil a teacher into a student; without arguments, the demonstration on a real sentence encoder."""
    from limbeck.cli.run import execute, show_run

    engine = {"epochs": epochs, "batch_size": batch_size, "device": device}
    engine = {name: value for name, value in engine.items() if value is not None}
    if not (teacher or student or data or method or engine or set_ or dry_run):
        from limbeck.demo import main_job

        show_run(main_job(budget, out), json)
        return
    from limbeck.api import settings_of
    from limbeck.core.recipe import Recipe

    teachers = teacher[0] if teacher and len(teacher) == 1 else teacher or None
    tree = {"teacher": teachers, "student": student, "data": data, "out": None if out is None else str(out)}
    tree = {name: value for name, value in tree.items() if value is not None}
    recipe = Recipe.parse(tree | settings_of(teachers, data, method, engine, set_ or ()), set_ or ())
    execute(recipe, budget, dry_run, json)
