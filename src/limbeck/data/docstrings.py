"""A real text corpus that every machine has: the docstrings and documentation topics of Python's standard library.

Source files are parsed, never imported. Modules, not sentences, are divided into train, validation and test, so that no
text of a held-out module is trained on.
"""

import ast
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from limbeck.core.errors import UsageError

SPLITS = ("train", "validation", "test")

# Folders that hold no library text.
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Distributions often leave these out (or newer versions removed them): training text where present, so that the held-out
# modules are the same on every machine with the same Python.
_OPTIONAL = {"idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv", "pydoc_data"}
# Chosen by the sizes it gives (Python 3.11: about 400 pairs in validation and in test), before any model was run.
_SALT = 27
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`(])")
_WORD = re.compile(r"[A-Za-z]{2,}")


class Docstring(NamedTuple):
    """One docstring: dotted module, qualified name inside it, cleaned text."""

    module: str
    name: str
    text: str


class Pair(NamedTuple):
    """The summary line of a docstring and the rest of it."""

    summary: str
    body: str


@dataclass(frozen=True)
class Split:
    """Texts and (summary, body) pairs of the modules of one split."""

    texts: tuple[str, ...]
    pairs: tuple[Pair, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Three splits that share no module and no text."""

    train: Split
    validation: Split
    test: Split

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of modules, texts and pairs of each split."""
        fields = ("modules", "texts", "pairs")
        return {name: {f: len(getattr(getattr(self, name), f)) for f in fields} for name in SPLITS}


def docstrings(root: Path, skip: Iterable[str] = ()) -> Iterator[Docstring]:
    """Every docstring of the Python files below a folder, in the order of their paths.

    Args:
        root: Folder of the modules; its name is not part of the dotted module names.
        skip: Names of further files' stems and folders to leave out.

    Yields:
        Docstrings, cleaned of indentation; files that this Python cannot parse are passed over.

    Example:
        >>> import json
        >>> docs = list(docstrings(Path(json.__file__).parent))
        >>> [d.module for d in docs][:2], "JSON" in docs[0].text
        (['__init__', '__init__'], True)
    """
    unwanted = _SKIP | set(skip)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if unwanted.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            module = ".".join(parts).removesuffix(".__init__")
            yield from _walk(tree, module, "")


def topics(root: Path) -> dict[str, str]:
    """The language reference's topics that `help()` shows, from `pydoc_data/topics.py` of a standard library folder.

    Args:
        root: Folder of the standard library.

    Returns:
        Topic name -> text; empty where the file is missing.
    """
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(k): str(v) for k, v in ast.literal_eval(node.value).items()}
    return {}


def split_of(module: str, held_out: float = 0.3) -> str:
    """The split of a top-level module: a hash of its name decides, so all its submodules go together.

    Twins such as `_pydecimal` and `decimal` share a split; modules that some distributions leave out are trained on.

    Args:
        module: Dotted module name.
        held_out: Share of names in validation and test together, in [0, 1].

    Example:
        >>> split_of("email.mime.text") == split_of("email"), split_of("_pydecimal") == split_of("decimal")
        (True, True)
        >>> split_of("tkinter.ttk")
        'train'
    """
    top = module.split(".")[0]
    if top in _OPTIONAL:
        return "train"
    family = top.lstrip("_").removeprefix("py").split("_")[0] or top
    position = crc32(f"{_SALT}:{family}".encode()) / 2**32
    return "train" if position >= held_out else "validation" if position < held_out / 2 else "test"


def pair(text: str) -> Pair | None:
    """Summary and body of a docstring, where it has both and the body does not give the summary away.

    Args:
        text: A cleaned docstring.

    Returns:
        The first paragraph on one line and all that follows the blank line; None where the summary has fewer than 3 or
        more than 30 words, the body fewer than 10, or the body contains the summary.

    Example:
        >>> pair("Return the sum.").__class__.__name__
        'NoneType'
        >>> pair("Add two whole numbers.\\n\\n" + "Both are given in base ten; the carry is kept in one extra digit.").summary
        'Add two whole numbers.'
    """
    first, _, rest = text.partition("\n\n")
    summary, body = " ".join(first.split()), rest.strip()
    if not 3 <= len(_WORD.findall(summary)) <= 30 or len(_WORD.findall(body)) < 10:
        return None
    return None if key(summary) in key(body) else Pair(summary, body)


def sentences(text: str, shortest: int = 4) -> list[str]:
    """Sentences of the paragraphs of a text, in order, each on one line.

    Args:
        text: Paragraphs divided by blank lines.
        shortest: Smallest number of words of a sentence that is kept.

    Example:
        >>> sentences("Open a file for\\nreading. It must exist already.\\n\\nToo short.")
        ['Open a file for reading.', 'It must exist already.']
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if len(_WORD.findall(sentence)) >= shortest:
                found.append(sentence)
    return found


def key(text: str) -> str:
    """What two texts have in common when they count as the same: their words in lower case.

    Example:
        >>> key("Return  True, if `x`;") == key("return true if x")
        True
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def load_corpus(packages: Sequence[str] = (), root: Path | None = None) -> Corpus:
    """The standard library's docstrings and topics, divided by top-level module and freed of duplicates.

    Texts are sentences, summaries and whole bodies. A text that occurs in several splits stays in the held-out one only. A
    pair whose summary or body occurs more than once in its split is dropped, since the task would have two right answers.

    Args:
        packages: Installed packages whose docstrings are added to the training texts, such as `"torch.nn"`.
        root: Folder to read in place of the standard library.

    Returns:
        The same corpus for the same Python, in the same order.

    Raises:
        UsageError: The folder holds no source files, or a package is not installed.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Docstring]] = {name: [] for name in SPLITS}
    for doc in docstrings(root):
        found[split_of(doc.module)].append(doc)
    found["train"] += [Docstring("pydoc_data.topics", name, text) for name, text in topics(root).items()]
    if not any(found.values()):
        raise UsageError("no docstrings found", where=root, expected="the standard library's .py files")
    for package in packages:
        found["train"] += [d._replace(module=f"{package}.{d.module}") for d in docstrings(_folder(package))]
    seen: set[str] = set()
    parts = {name: _split(found[name], seen) for name in reversed(SPLITS)}
    return Corpus(**parts)


def _walk(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield Docstring(module, name, inspect.cleandoc(text))
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, module, f"{name}.{child.name}".lstrip("."))


def _split(docs: Sequence[Docstring], seen: set[str]) -> Split:
    """One split; `seen` holds the keys of the texts already given to another one, and grows."""
    found = [p for d in docs if (p := pair(d.text)) and not {key(p.summary), key(p.body)} & seen]
    times = Counter(key(text) for p in found for text in set(p))
    pairs = [p for p in found if times[key(p.summary)] == times[key(p.body)] == 1]
    texts = []
    for text in [t for d in docs for t in sentences(d.text)] + [t for p in pairs for t in p]:
        if (k := key(text)) not in seen:
            seen.add(k)
            texts.append(text)
    return Split(tuple(texts), tuple(pairs), tuple(sorted({d.module.split(".")[0] for d in docs})))


def _folder(package: str) -> Path:
    """Where an installed package lies; dotted names are looked up below the top-level one without importing it."""
    top, *rest = package.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("this package is not installed, or has no source files", where="packages", found=package)
    return Path(spec.submodule_search_locations[0]).joinpath(*rest)
