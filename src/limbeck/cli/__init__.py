"""The command line: one command per public verb. Whatever is heavy is imported when its command runs."""

import sys
from collections.abc import Sequence

import typer

from limbeck import __version__
from limbeck.cli import distill, inspect, methods, prove, results, run
from limbeck.core.errors import LimbeckError
from limbeck.core.memory import keep_freed_memory

app = typer.Typer(
    help="Distil something big into something small, and see the evidence. Add --debug to any command for a traceback.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

for command in (
    distill.distill,
    run.run,
    methods.methods,
    methods.card,
    results.report,
    results.compare,
    results.export,
    results.family,
    inspect.plan,
    inspect.doctor,
    prove.prove,
    methods.new,
    methods.schema,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 (a run that stopped), 2 (usage), 130 (interrupted).

    Args:
        arguments: The words after `limbeck`; default: those of this process.

    Example:
        >>> main(["--version"]) == 0
        limbeck ...
        True
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        keep_freed_memory()
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], prog_name="limbeck")
    except LimbeckError as error:
        if debug:
            raise
        print(error if error.exit_code == 130 else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        if stop.code == 130:
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 0
    return 0


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True)) -> None:
    if version:
        print(f"limbeck {__version__}")
        raise typer.Exit
