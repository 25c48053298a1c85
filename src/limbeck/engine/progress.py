"""What a person sees while a run works."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol


class Progress(Protocol):
    """Told about stages, steps and history rows."""

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        """A stage begins, or goes on from step `done`."""

    def step(self, step: int) -> None:
        """A step has ended; called for every step, so it must be cheap."""

    def row(self, row: dict[str, Any]) -> None:
        """A history row was written."""

    def say(self, text: str) -> None:
        """A message."""

    def close(self) -> None:
        """The run has ended or stopped."""


class Silent:
    """Shows nothing but warnings."""

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        return

    def step(self, step: int) -> None:
        return

    def row(self, row: dict[str, Any]) -> None:
        return

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def close(self) -> None:
        return


class Lines(Silent):
    """A line for each evaluation and every few seconds; for logs and pipes."""

    def __init__(self, every: float = 15.0) -> None:
        self.every, self.last = every, time.monotonic()
        self.name, self.total, self.began, self.first = "", None, time.monotonic(), 0

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        self.name, self.total, self.began, self.first = name, total, time.monotonic(), done  # type: ignore[assignment]
        steps = f": {total} steps" if total else ""  # a conversion is no number of steps
        self.say(f"{name}{steps}" + (f", going on from {done}" if done else ""))

    def row(self, row: dict[str, Any]) -> None:
        evaluated = any(key.startswith("val/") for key in row)
        if evaluated or time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            self.say(f"{self.name} {row['step']}/{self.total or '?'}{self._left(row['step'])}  {numbers(row)}")

    def _left(self, step: int) -> str:
        if not self.total or step <= self.first:
            return ""
        seconds = (time.monotonic() - self.began) / (step - self.first) * (self.total - step)
        return f"  {seconds:.0f} s left"


class Bar(Silent):
    """A bar with the time left; for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = RichProgress(
            *columns, TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True), refresh_per_second=4,
        )  # fmt: skip
        self.task: Any = None
        self.shown = 0.0

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        if self.task is None:
            self.bar.start()
        self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def step(self, step: int) -> None:
        now = time.monotonic()
        if now - self.shown > 0.1:
            self.shown = now
            self.bar.update(self.task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        self.bar.update(self.task, completed=row["step"], note=numbers(row))

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        if self.task is not None:
            self.bar.stop()


def numbers(row: dict[str, Any]) -> str:
    """The losses and metrics of a row, short."""
    shown = {k: v for k, v in row.items() if k.startswith(("train/loss", "val/"))}
    return "  ".join(f"{k.removeprefix('train/').removeprefix('val/')} {v:.4g}" for k, v in list(shown.items())[:5])


def make_progress(kind: str = "auto", rank: int = 0) -> Progress:
    """A bar on a terminal, lines elsewhere; `off` shows nothing.

    Example:
        >>> type(make_progress("off")).__name__
        'Silent'
    """
    if kind == "off" or rank:
        return Silent()
    return Bar() if kind == "bar" or (kind == "auto" and sys.stderr.isatty()) else Lines()
