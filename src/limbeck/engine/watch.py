"""Warns of numbers beyond a method's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from limbeck.core.limits import Limit
from limbeck.engine.history import History, Row


class Watch:
    """A sink of history rows.

    Args:
        limits: The method's.
        history: Whose rows they are.
        say: Told each warning.
    """

    def __init__(self, limits: Sequence[Limit], history: History, say: Callable[[str], None]) -> None:
        self.limits, self.history, self.say = limits, history, say
        self.told: set[tuple[str, Limit]] = set()

    def __call__(self, row: Row) -> None:
        """Look at a row that was written."""
        for limit in self.limits:
            value, against = row.get(f"train/{limit.log}"), self._against(limit, row)
            if value is None or not against or (row["stage"], limit) in self.told:
                continue
            if value > limit.above * against:
                self.told.add((row["stage"], limit))
                other = limit.over or "at first"
                self.say(
                    f"warning: stage '{row['stage']}', step {row['step']}: {limit.what}\n"
                    f"    found: {limit.log} {value:.3g}, {other} {against:.3g}\n    fix: {limit.fix}"
                )

    def _against(self, limit: Limit, row: Row) -> float | None:
        if limit.over is not None:
            return row.get(f"train/{limit.over}")
        name = f"train/{limit.log}"
        return next((r[name] for r in self.history.rows if r["stage"] == row["stage"] and name in r), None)
