"""The code blocks of the documentation."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "src" / "limbeck" / "methods").glob("*/card.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, and the line that its text begins on."""

    language: str
    text: str
    line: int


def blocks(path: Path, *languages: str) -> list[Block]:
    """The blocks of a page in some languages."""
    page = path.read_text(encoding="utf-8")
    found = [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in _BLOCK.finditer(page)]
    return [b for b in found if b.language in languages]


def program(path: Path) -> str:
    """The Python blocks of a page as one program, each on the lines that it has in the page.

    Blocks that load what the page's commands write are left to the test that runs the commands.
    """
    lines: list[str] = []
    for block in blocks(path, "python"):
        if 'load("run")' in block.text:
            continue
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


def commands(path: Path) -> list[str]:
    """The `limbeck` commands of a page's shell blocks."""
    lines = [line for block in blocks(path, "bash", "console") for line in block.text.splitlines()]
    parts = [part.strip() for line in lines for part in line.removeprefix("$ ").split("&&")]
    return [part for part in parts if part.startswith("limbeck")]
