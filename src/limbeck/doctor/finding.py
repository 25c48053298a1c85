"""What an examination found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "skipped", "ok"]
_MARKS = {"error": "✗", "warning": "!", "skipped": "–", "ok": "✓"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        check: The check's name.
        severity: Whether the run cannot work, may go wrong, could not be judged, or is in order.
        what: One sentence.
        where: The role, field or module it concerns.
        found: What was there.
        expected: What should have been there.
        fix: What to do about it, in words.

    Example:
        >>> print(Finding("labels", "warning", "all labels are the same", found="class 3", fix="shuffle the data"))
        ! labels: all labels are the same
            found: class 3
            fix: shuffle the data
    """

    check: str
    severity: Severity
    what: str
    where: str | None = None
    found: str | None = None
    expected: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        parts = {"where": self.where, "found": self.found, "expected": self.expected, "fix": self.fix}
        lines = [f"    {name}: {text}" for name, text in parts.items() if text is not None]
        return "\n".join([f"{_MARKS[self.severity]} {self.check}: {self.what}", *lines])


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all checks, in the order of the checks; iterating gives errors and warnings alone.

    Args:
        findings: One for each check.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return not any(f.severity == "error" for f in self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return (f for f in self.findings if f.severity in ("error", "warning"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, check: str) -> Finding:
        return next(f for f in self.findings if f.check == check)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": self.ok, "findings": [asdict(f) for f in self.findings]}

    def render(self) -> str:
        """The findings as text, one line for each check that is in order."""
        errors = sum(f.severity == "error" for f in self.findings)
        total = f"{len(self.findings)} checks: {errors} errors, {len(self) - errors} warnings"
        return "\n".join([*map(str, self.findings), total])
