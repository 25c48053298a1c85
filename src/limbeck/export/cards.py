"""The model card that goes with a student."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck import __version__
from limbeck.core.files import write_text
from limbeck.report.format import label, show


def model_card(
    name: str,
    results: Mapping[str, Any],
    load: str,
    licence: str | None = None,
    library: str = "limbeck",
    base_model: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """A `README.md` in the form that model hubs read: what the model is, how to load it, and the evidence.

    Args:
        name: The model's name.
        results: Content of the run's `metrics.json`.
        load: Python code that loads and uses the model.
        licence: Licence identifier of the teacher, such as `"apache-2.0"`, stated for the student too; None when unknown.
        library: The library that loads it, as hubs name it.
        base_model: Hub id of the teacher, when it has one.
        tags: Further tags.

    Returns:
        Markdown text.

    Example:
        >>> results = {"primary": "top1", "models": {"teacher": {"top1": 0.9}, "student": {"top1": 0.85}}}
        >>> card = model_card("tiny", results, load="model = load('tiny')", licence="mit")
        >>> print(card.split("---")[1].strip())
        library_name: limbeck
        license: mit
        tags:
        - knowledge-distillation
        - limbeck
        >>> "| Top-1 | 0.900 | 0.850 |" in card
        True
    """
    lineage = results.get("lineage", {})
    head = {
        "library_name": library,
        "license": licence,
        "base_model": base_model,
        "tags": ["knowledge-distillation", "limbeck", *tags],
    }
    front = yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---\n\n# {name}",
        _summary(lineage),
        f"## Use\n\n```python\n{load.strip()}\n```",
        _section("Evidence", _models(results.get("models", {}))),
        _section("Candidates that were tried", _candidates(results.get("candidates", []))),
        _section("Data", _facts(results.get("data", {}))),
        _section("How it was made", _facts(lineage)),
        _section("Measured on", _facts(results.get("environment", {}))),
        _section("Licence", _licence(licence, lineage.get("teacher"))),
        f"*Written by Limbeck {__version__}.*",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def write_card(folder: str | os.PathLike[str], name: str, results: Mapping[str, Any], load: str, **fields: Any) -> Path:
    """Write `README.md` into a model's folder; the further fields are those of `model_card`. Returns its path."""
    return write_text(Path(folder) / "README.md", model_card(name, results, load, **fields))


def _summary(lineage: Mapping[str, Any]) -> str:
    teacher, method = lineage.get("teacher"), lineage.get("method")
    by = f" by the method `{method}`" if isinstance(method, str) else ""
    source = f" from `{teacher}`" if isinstance(teacher, str) else ""
    return f"A student model, distilled{source}{by} with Limbeck."


def _section(heading: str, body: str) -> str:
    return f"## {heading}\n\n{body}" if body else ""


def _models(models: Mapping[str, Mapping[str, Any]]) -> str:
    metrics = dict.fromkeys(metric for numbers in models.values() for metric in numbers)
    rows = [[label(metric), *(show(metric, numbers.get(metric)) for numbers in models.values())] for metric in metrics]
    return _table(["Quantity", *map(label, models)], rows)


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> str:
    records = [{**row, **row.get("metrics", {})} for row in candidates]
    keys = dict.fromkeys(key for row in records for key in row if key not in ("metrics", "chosen"))
    return _table([label(key) for key in keys], [[show(key, row.get(key)) for key in keys] for row in records])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    rule = "|".join(["---", *["---:"] * (len(heads) - 1)])
    lines = [heads, *rows]
    text = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([text[0], f"|{rule}|", *text[1:]])


def _facts(values: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {label(key)}:", _facts(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else show(key, value)
            lines.append(f"{indent}- {label(key)}: {text}")
    return "\n".join(filter(None, lines))


def _licence(licence: str | None, teacher: object) -> str:
    if licence:
        return (
            f"The teacher's licence is `{licence}`. Its terms may bind this model too: read them before you pass it on."
        )
    of = f" of `{teacher}`" if isinstance(teacher, str) else " of the teacher"
    return f"The licence{of} was not stated to Limbeck. Find it before you pass this model on."
