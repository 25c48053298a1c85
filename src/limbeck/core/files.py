"""Files that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, moved to `path` when the block ends; when it raises, what was at `path` stays as it was.

    Files written next to the yielded path move along (the external weights of an ONNX file), the main file last.

    Args:
        path: Where the file shall be; folders are made.

    Returns:
        A path of the same file name in an empty folder beside it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "a" / "note.txt"
        ...     with aside(target) as scratch:
        ...         _ = scratch.write_text("done")
        ...     target.read_text(), [p.name for p in target.parent.iterdir()]
        ('done', ['note.txt'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all; returns its path."""
    with aside(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return Path(path)
