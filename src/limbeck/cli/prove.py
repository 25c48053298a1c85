"""`limbeck prove`."""

from __future__ import annotations

from typing import Annotated

import typer


def prove(
    method: Annotated[str, typer.Argument(help="A method's name.")],
    seeds: Annotated[int | None, typer.Option(min=2, help="Seeds of every arm.")] = None,
) -> None:
    """Try a paper's claim on this machine."""
    from limbeck.prove import prove as prove_method

    print(prove_method(method, seeds))
