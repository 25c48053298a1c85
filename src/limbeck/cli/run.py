"""`limbeck run`, and what it shares with `limbeck distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from limbeck.core.recipe import Recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Such as engine.epochs=3.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time for the whole run, such as 90s, 5m or 1h.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole recipe and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Run a recipe, or go on with it where it stopped."""
    from limbeck.core.recipe import Recipe

    found = Recipe.load(recipe, overrides or ())
    if out is not None:
        found = found.model_copy(update={"out": str(out)})
    execute(found, budget, dry_run, json)


def execute(recipe: Recipe, budget: str | None, dry_run: bool, json: bool) -> None:
    """Run a recipe and print what it came to; a dry run prints the recipe."""
    if dry_run:
        print(recipe.yaml(), end="")
        return
    from limbeck.api import build, leads
    from limbeck.api import run as run_job

    result = run_job(build(recipe, budget))
    if leads():
        show_run(Path(str(result.out)), json)


def show_run(folder: Path, json: bool) -> None:
    """Print what a finished run came to."""
    from limbeck.cli import show

    if json:
        from limbeck.report.run import read_run

        show.as_json({"out": str(folder), **read_run(folder).metrics})
    else:
        show.outcome(folder)
