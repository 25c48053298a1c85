"""Numbers of the log that say that a run goes wrong before it diverges."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """What a number of the log should not exceed: a number, or a multiple of another one of the log.

    The engine compares the means that it writes as rows, so nothing more is read from the device, and warns once in a stage.

    Args:
        log: The number, by its name in `Update.logs`.
        above: The number, or the multiple.
        what: What is wrong beyond it, in a sentence.
        fix: What to do about it.
        over: The other number of the log, if any.
    """

    log: str
    above: float
    what: str
    fix: str
    over: str | None = None
