"""A page that is one file: styles, pictures and numbers inside, nothing fetched."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from limbeck import __version__
from limbeck.core.files import write_text
from limbeck.report.chart import LIGHT, PALETTE
from limbeck.report.format import label, show

_WIDE, _NARROW = 860, 360


@dataclass(frozen=True)
class Cell:
    """A table cell whose text is already made.

    Args:
        text: What it says.
        best: Whether it is emphasised.
    """

    text: str
    best: bool = False


class Page:
    """A report page, built from top to bottom; every method returns the page.

    Args:
        title: What the page is about.
        subtitle: One sentence under it.
        eyebrow: The small line over the title.
        footer: A few words at the end.

    Example:
        >>> page = Page("Two encoders", "side by side").cards([("MRR@10 kept", "97 %", "0.512 of 0.528")])
        >>> page = page.section("Numbers").table([{"name": "a", "mrr": 0.5}, {"name": "b", "mrr": 0.6}], best={"mrr": "high"})
        >>> '<td class="best">0.600</td>' in page.html(), "http://" in page.html().replace("http://www.w3.org", "")
        (True, False)
    """

    def __init__(self, title: str, subtitle: str = "", eyebrow: str = "Limbeck report", footer: str = "") -> None:
        self.title, self.subtitle, self.eyebrow, self.footer = title, subtitle, eyebrow, footer
        self._parts: list[Markup] = []
        self._open = False

    def section(self, title: str, text: str = "") -> "Page":
        """Start a section: a heading and a sentence or two."""
        body = Markup("<p>{}</p>").format(text) if text else Markup("")
        self._parts.append(self._close() + Markup("<section><h2>{}</h2>").format(title) + body)
        self._open = True
        return self

    def cards(self, items: Sequence[tuple[str, str, str]]) -> "Page":
        """Key numbers, each as (name, value, note); the first is emphasised."""
        card = Markup('<div class="{}"><dt>{}</dt><dd>{}</dd><div class="note">{}</div></div>')
        cards = [card.format("" if i else "first", *item) for i, item in enumerate(items)]
        return self._add('<dl class="cards">{}</dl>', Markup("").join(cards)) if items else self

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[str] | None = None,
        best: Mapping[str, Literal["high", "low"]] | None = None,
        units: Mapping[str, str] | None = None,
        caption: str = "",
    ) -> "Page":
        """A table of records.

        Args:
            rows: One mapping per row; numbers are shown by the name of their column, strings and `Cell`s as they are.
            columns: Keys in order; default: those of all rows, in the order in which they appear.
            best: Columns whose highest or lowest numbers are emphasised.
            units: Units by column, shown in the heading.
            caption: A line below.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns
        tops = {key: _top(rows, key, way) for key, way in (best or {}).items()}
        heads = [f"{label(key)} ({units[key]})" if units and key in units else label(key) for key in columns]
        head = Markup("").join(Markup("<th>{}</th>").format(text) for text in heads)
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(Markup("").join(_cell(row.get(key), key, tops.get(key)) for key in columns))
            for row in rows
        )
        foot = Markup("<caption>{}</caption>").format(caption) if caption else ""
        frame = '<div class="table"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
        return self._add(frame, foot, head, body)

    def figure(self, draw: Callable[[int], str] | str, caption: str = "") -> "Page":
        """A picture: SVG or HTML text, or a function of the width, which is then drawn for wide and for narrow screens."""
        if callable(draw):
            wide, narrow = Markup(draw(_WIDE)), Markup(draw(_NARROW))
            content = Markup('<div class="wide-only">{}</div><div class="narrow">{}</div>').format(wide, narrow)
        else:
            content = Markup(draw)
        return self._figure(content, caption)

    def panels(self, pictures: Sequence[str], caption: str = "") -> "Page":
        """Small pictures in a grid that fits the screen."""
        return self._figure(Markup('<div class="panels">{}</div>').format(Markup("\n".join(pictures))), caption)

    def facts(self, values: Mapping[str, Any]) -> "Page":
        """Names and values, nested mappings flattened to dotted names."""
        pair = Markup("<dt>{}</dt><dd>{}</dd>")
        facts = [
            pair.format(label(name).replace(".", " › "), show(name, value)) for name, value in flatten(values).items()
        ]
        return self._add('<dl class="facts">{}</dl>', Markup("").join(facts)) if facts else self

    def code(self, text: str) -> "Page":
        """Code or a command line."""
        return self._add("<pre>{}</pre>", text.strip())

    def note(self, text: str) -> "Page":
        """Something the reader must not miss, such as a missing file."""
        return self._add('<p class="notes">{}</p>', text)

    @property
    def body(self) -> Markup:
        """The content so far."""
        return Markup("\n").join(self._parts) + (Markup("</section>") if self._open else "")

    def html(self) -> str:
        """The whole page."""
        environment = Environment(loader=PackageLoader("limbeck", "report"), autoescape=True)
        template = environment.get_template("page.html.j2")
        return template.render(page=self, version=__version__, palette=Markup(PALETTE), light=Markup(LIGHT))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page whole or not at all; returns its path."""
        return write_text(path, self.html())

    def _add(self, frame: str, *values: object) -> "Page":
        self._parts.append(Markup(frame).format(*values))
        return self

    def _figure(self, content: Markup, caption: str) -> "Page":
        below = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
        return self._add("<figure>{}{}</figure>", content, below)

    def _close(self) -> Markup:
        return Markup("</section>") if self._open else Markup("")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; lists as comma-separated text.

    Example:
        >>> flatten({"student": {"layers": [0, 5], "dim": 384}})
        {'student.layers': '0, 5', 'student.dim': 384}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def _top(rows: Sequence[Mapping[str, Any]], key: str, way: Literal["high", "low"]) -> float | None:
    numbers = [row[key] for row in rows if isinstance(row.get(key), int | float) and row[key] == row[key]]
    return (max if way == "high" else min)(numbers) if len(numbers) > 1 else None


def _cell(value: Any, key: str, top: float | None) -> Markup:
    cell = value if isinstance(value, Cell) else Cell(show(key, value), top is not None and value == top)
    kind = "best" if cell.best else "words" if len(cell.text) > 40 else ""
    return Markup('<td class="{}">{}</td>' if kind else "<td>{1}</td>").format(kind, cell.text)
