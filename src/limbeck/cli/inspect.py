"""`limbeck plan` and `limbeck doctor`: what will happen, before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Recipe = Annotated[Path, typer.Argument(help="A recipe in YAML.")]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Such as engine.batch_size=32.")
]


def plan(recipe: _Recipe, overrides: _Overrides = None) -> None:
    """Say what a recipe will need, without weights and without a GPU."""
    from limbeck.core.recipe import Recipe
    from limbeck.plan import plan_recipe

    print(plan_recipe(Recipe.load(recipe, overrides or ())))


def doctor(recipe: _Recipe, overrides: _Overrides = None) -> None:
    """Say what will go wrong with a recipe, and how to mend it."""
    from limbeck.api import build
    from limbeck.core.recipe import Recipe
    from limbeck.doctor import diagnose

    findings = diagnose(build(Recipe.load(recipe, overrides or ())))
    for finding in findings:
        print(finding)
    if not findings:
        print("nothing found")
