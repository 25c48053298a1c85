"""Warns of numbers beyond a method's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from limbeck.core.limits import Limit
from limbeck.engine.history import Row


class Watch:
    """A sink of history rows.

    Args:
        limits: The method's.
        say: Told each warning.
    """

    def __init__(self, limits: Sequence[Limit], say: Callable[[str], None]) -> None:
        self.limits, self.say = limits, say
        self.told: set[tuple[str, Limit]] = set()

    def __call__(self, row: Row) -> None:
        """Look at a row that was written."""
        for limit in self.limits:
            value, other = row.get(f"train/{limit.log}"), row.get(f"train/{limit.over}") if limit.over else 1.0
            if value is None or other is None or (row["stage"], limit) in self.told or value <= limit.above * other:
                continue
            self.told.add((row["stage"], limit))
            beside = f", {limit.over} {other:.3g}" if limit.over else ""
            self.say(
                f"warning: stage '{row['stage']}', step {row['step']}: {limit.what}\n"
                f"    found: {limit.log} {value:.3g}{beside}\n    fix: {limit.fix}"
            )
