"""`limbeck methods`, `limbeck card`, `limbeck new` and `limbeck schema`: the catalogue."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from limbeck.core.errors import UsageError

_SHOWN = ("families", "needs", "produces", "status", "year", "paper")


def methods(
    json: Annotated[bool, typer.Option("--json", help="Print the cards' front matter as JSON.")] = False,
) -> None:
    """List the methods."""
    from limbeck.cli import show
    from limbeck.core import registry

    cards = [registry.card(name) for name in sorted(registry.METHODS)]
    if json:
        show.as_json([{"name": card.name, **card.metadata} for card in cards])
    else:
        show.table([{"name": card.name, **{key: card.metadata.get(key) for key in _SHOWN}} for card in cards])


def card(
    method: Annotated[str, typer.Argument(help="A method's name, or file.py:Class.")],
    json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Show a method's card: what it is for, what it costs, what it won."""
    from limbeck.cli import show
    from limbeck.core import registry

    found = registry.card(method)
    if json:
        show.as_json({**found.metadata, "text": found.text})
        return
    import sys

    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(found.text))
    else:
        print(found.text)


def schema() -> None:
    """Print the JSON schema of recipes, for editors: limbeck schema > recipe.schema.json."""
    from limbeck.cli import show
    from limbeck.core.recipe import json_schema

    show.as_json(json_schema())


def new(
    name: Annotated[str, typer.Argument(help="A name such as my_method.")],
    folder: Annotated[Path, typer.Option(help="Where the method's folder is made.")] = Path(),
) -> None:
    """Write the folder of a new method, which works as it is."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(
            "this cannot be a method's name",
            where="NAME",
            found=name,
            expected="small letters, digits and _, such as my_method",
        )
    target = folder / name
    if target.exists():
        raise UsageError("there is something already", where=target, fix="choose another name or folder")
    kind = "".join(part.capitalize() for part in name.split("_"))
    inside = (folder / "__init__.py").is_file() and folder.resolve().name == "methods"
    spec = name if inside else f"{target}/method.py:{kind}"
    target.mkdir(parents=True)
    if inside:
        (target / "__init__.py").write_text(f'"""{kind}."""\n', encoding="utf-8")
    for template in sorted((Path(__file__).parent / "skeleton").iterdir()):
        text = Template(template.read_text(encoding="utf-8")).substitute(name=name, kind=kind, spec=spec)
        (target / template.name.removesuffix(".txt")).write_text(text, encoding="utf-8")
    print(f"written  {target}")
    if inside:
        print(
            f'row      "{name}": "limbeck.methods.{name}.method:{kind}",  (add it to METHODS in limbeck/core/registry.py)'
        )
    print(f"try      limbeck distill --teacher T --student S --data D --method {spec}")
