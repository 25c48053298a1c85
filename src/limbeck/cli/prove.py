"""`limbeck prove`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prove(
    method: Annotated[str, typer.Argument(help="A method's name.")],
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of every arm.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default runs/proof-METHOD.")] = None,
) -> None:
    """Try a paper's claim on this machine."""
    from limbeck.prove import prove as prove_method

    prove_method(method, seeds, out)
