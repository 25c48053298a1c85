"""`limbeck plan` and `limbeck doctor`: what will happen, before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Recipe = Annotated[Path, typer.Argument(help="A recipe in YAML.")]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Such as engine.batch_size=32.")
]


_Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


def plan(
    recipe: _Recipe,
    overrides: _Overrides = None,
    gpu: Annotated[str, typer.Option(help="The GPU to plan for.")] = "a100-80gb",
    samples: Annotated[int | None, typer.Option(help="Training samples, where the data are not here.")] = None,
    json: _Json = False,
) -> None:
    """Say what a recipe will need, without weights and without a GPU."""
    from limbeck.cli import show
    from limbeck.core.recipe import Recipe
    from limbeck.plan import plan_recipe

    found = plan_recipe(Recipe.load(recipe, overrides or ()), gpu, samples=samples)
    show.as_json(found.to_dict()) if json else print(found)


def doctor(recipe: _Recipe, overrides: _Overrides = None, json: _Json = False) -> None:
    """Say what will go wrong with a recipe, and how to mend it; exit code 1 where it cannot work."""
    from limbeck.api import build
    from limbeck.cli import show
    from limbeck.core.recipe import Recipe
    from limbeck.doctor import diagnose

    found = diagnose(build(Recipe.load(recipe, overrides or ())))
    show.as_json(found.to_dict()) if json else print(found.render())
    if not found.ok:
        raise typer.Exit(1)
