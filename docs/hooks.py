"""What the site shows of the code: method pages from cards and proofs, the reference, tables of fields and commands."""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "limbeck"

# Packages that users do not import from, and what of them they meet all the same.
HIDDEN = {"cli": [], "methods": [], "engine": ["limbeck.engine.run.execute", "limbeck.engine.run.Result"]}
MODULES = ("api", "prove")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    pages = {
        "Methods": [{"All methods": "methods/index.md"}, *({n: f"methods/{n}.md"} for n in method_names())],
        "Reference": [{name: f"reference/{name}.md"} for name in reference()],
    }
    config.nav = [{t: pages.get(t) or p for t, p in entry.items()} for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and pictures."""
    made: dict[str, str] = {
        "index.md": from_root((ROOT / "README.md").read_text(encoding="utf-8")),
        "contributing.md": from_root((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
        "methods/index.md": "# Methods\n\n" + methods_table("") + "\n",
    }
    for name in method_names():
        made[f"methods/{name}.md"] = method_page(name)
        if (proof := read_proof(name)) is not None:
            from limbeck.report.figures import proof_svg

            made[f"methods/{name}.svg"] = proof_svg(proof)
    for name, objects in reference().items():
        made[f"reference/{name}.md"] = reference_page(name, objects)
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace marks in comments: `fields module:Class`, `file path`, `results name`, `fewstep task`, `commands`, and so on."""
    named: dict[str, Callable[[str], str]] = {
        "file": file_block,
        "fields": lambda name: fields_table(find(name)),
        "results": lambda name: results_table(read_result(name)),
        "fewstep": lambda task: fewstep_table(read_result("fewstep")["tables"][task]),
        "condensed": lambda task: condensed_tables(read_result("condense")[task]),
    }
    for name, make in named.items():
        markdown = re.sub(rf"<!-- {name} (\S+) -->", lambda m, make=make: make(m[1]), markdown)
    made = {
        "commands": commands,
        "methods": lambda: methods_table("methods/"),
        "steps": lambda: steps_table(read_result("steps")),
    }
    return re.sub(r"<!-- (commands|methods|steps) -->", lambda m: made[m[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script and without a network."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', formula, content, flags=re.DOTALL)


def from_root(text: str) -> str:
    """A page of the repository's root as a page of the site: links into docs/ and to cards become links between pages."""
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)
    text = re.sub(r"\]\(src/limbeck/methods/(\w+)/card\.md\)", r"](methods/\1.md)", text)
    text = re.sub(r"\]\(src/limbeck/(\w+)/__init__\.py\)", r"](reference/\1.md)", text)
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^\]]*)\]\((LICENSE|CHANGELOG\.md|changes/|recipes/|examples/\S*|benchmarks/\S*)\)", r"\1", text)


def from_card(text: str) -> str:
    """A card's text as a page of the site: links between cards become links between their pages."""
    return re.sub(r"\]\(\.\./(\w+)/card\.md\)", r"](\1.md)", text)


def file_block(path: str) -> str:
    """A file of the repository as a block of code."""
    return f'```python title="{path}"\n{(ROOT / path).read_text(encoding="utf-8")}```'


def find(spec: str) -> Any:
    """The object that `module:name` names."""
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


# Methods


def method_names() -> list[str]:
    """All methods of the table."""
    from limbeck.core import registry

    return sorted(registry.METHODS)


def read_proof(name: str) -> dict[str, Any] | None:
    """The committed result of a method's proof."""
    path = SOURCE / "methods" / name / "proof.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def methods_table(folder: str) -> str:
    """One row for each method."""
    from limbeck.core import registry

    rows = ["| method | paper | needs | proof |", "|---|---|---|---|"]
    for name in method_names():
        data, proof = registry.card(name).metadata, read_proof(name)
        cells = [f"[{name}]({folder}{name}.md)", f"{data.get('paper', '')} ({data.get('year', '')})"]
        rows.append(row([*cells, words(data.get("needs", "")), "none yet" if proof is None else proof["verdict"]]))
    return "\n".join(rows)


def read_result(name: str) -> dict[str, Any]:
    """The committed result of a benchmark."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def results_table(found: dict[str, Any]) -> str:
    """The arms of a comparison with the labels alone, best first."""
    against = {c["arm"]: c for c in found["comparisons"]}
    order = sorted(found["arms"], key=lambda name: -found["summary"][name]["mean"])
    rows = [f"| method | {found['metric']} | over the labels alone | tuned |", "|---|---|---|---|"]
    for name in order:
        summary, tuning = found["summary"][name], found["tuning"][name]["tunes"]
        difference = "" if (c := against.get(name)) is None else f"{c['mean']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]"
        rows.append(row([name, f"{summary['mean']:.1f} ± {summary['deviation']:.1f}", difference, tuning]))
    return "\n".join([f"{found['task']}.", "", *rows])


def fewstep_table(found: dict[str, Any]) -> str:
    """Ways to sample one teacher, those of few passes first, and of equally many the best first."""
    columns = (
        "Frechet distance",
        "right class (%)",
        "density (%)",
        "coverage (%)",
        "passes",
        "images a second",
        "minutes",
        "rate",
    )
    rows = [row(["sampled by", *columns]), "|---" * (len(columns) + 1) + "|"]
    lines = found["rows"]
    for name in sorted(lines, key=lambda name: (lines[name]["nfe"], lines[name]["frechet"][0])):
        line = lines[name]
        scores = [line[key] for key in ("frechet", "agreement", "density", "coverage")]
        cells = [f"{mean:.1f} ± {deviation:.1f}" if deviation else f"{mean:.1f}" for mean, deviation in scores]
        trained = [f"{line['minutes']:.1f}", f"{line['lr']:g}"] if line["lr"] else ["", ""]
        rows.append(
            row([name, *cells, str(line["nfe"] or ""), f"{line['speed']:g} times" if line["nfe"] else "", *trained])
        )
    return "\n".join(rows)


def steps_table(found: dict[str, Any]) -> str:
    """What a step of each method costs."""
    rows = ["| method | classes | a step over a step of `kd` | quartiles |", "|---|---|---|---|"]
    for classes, part in found.items():
        for name, ratio in part.get("over_kd", {}).items():
            quartiles = f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
            rows.append(row([name, classes.split()[0], f"{ratio['median']:.2f}", quartiles]))
    return "\n".join(rows)


def condensed_tables(task: dict[str, Any]) -> str:
    """What networks learn from small sets: a table for each number of images of a class, best first."""
    head = ["set", "ConvNet", "ResNet", "MLP", "all, soft", "all, soft by views", "CPU s", "kB"]
    parts = []
    for each in sorted((key for key in task if key.isdecimal()), key=int):
        summaries = {name: part["summary"] for name, part in task[each].items() if "summary" in part}
        rows = [row(head), "|---" * len(head) + "|"]
        for name in sorted(summaries, key=lambda name: -condensed_score(summaries[name])):
            found = summaries[name]
            hard = found["accuracy"].get("hard", {})
            cells = [percent(hard.get(kind)) for kind in ("ConvNet", "ResNet", "MLP")]
            cells += [percent(found["accuracy"].get(kind, {}).get("all three")) for kind in ("table", "views")]
            sizes = " / ".join(f"{size / 1000:.1f}" for size in found["bytes"].values())
            rows.append(row([name, *cells, f"{sum(found['seconds'].values()):.1f}", sizes]))
        parts += [f"**{each} of each class**" if each != "1" else "**One image of each class**", "\n".join(rows)]
    return "\n\n".join(parts)


def condensed_score(found: dict[str, Any]) -> float:
    """The mean accuracy of all networks with class numbers; with soft labels, where a set was not tried with these."""
    accuracy = found["accuracy"]
    return float((accuracy.get("hard") or accuracy["table"])["all three"]["mean"])


def percent(found: dict[str, float] | None) -> str:
    """A mean with its deviation, or nothing."""
    return "" if found is None else f"{found['mean']:.1f} ± {found['deviation']:.1f}"


def method_page(name: str) -> str:
    """A method's card, its fields, what its proof gave, and its code."""
    from limbeck.core import registry

    card, kind = registry.card(name), registry.find(name)
    title, _, text = card.text.partition("\n") if card.text.startswith("# ") else (f"# {name}", "", card.text)
    facts = [row([key, words(value)]) for key, value in card.metadata.items() if key not in ("name", "seed")]
    kinds = [
        one for one in kind.__mro__ if one.__module__.startswith("limbeck.methods.")
    ]  # with the base that two may share
    code = "\n\n".join(Path(inspect.getfile(one)).read_text(encoding="utf-8") for one in kinds)
    parts = [
        title,
        "| card | |\n|---|---|\n" + "\n".join(facts),
        from_card(text.strip()),
        "## Fields\n\n" + fields_table(kind),
        proof_section(name, read_proof(name)),
        f"## Code\n\n```python\n{code}```",
    ]
    return "\n\n".join(parts) + "\n"


def proof_section(name: str, proof: dict[str, Any] | None) -> str:
    """The numbers of a proof, as they were committed."""
    if proof is None:
        return f"## Proof\n\nNone is committed yet; `limbeck prove {name}` runs one where the method has a `proof.py`."
    arms = [f"| arm | {proof['metric']} | tuned |", "|---|---|---|"]
    for arm, numbers in proof["summary"].items():
        tuning = proof["tuning"][arm]
        arms.append(
            row(
                [
                    arm,
                    f"{numbers['mean']:.2f} ± {numbers['deviation']:.2f}",
                    f"{tuning['tunes']} over {words(tuning['grid'])}",
                ]
            )
        )
    gaps = ["| difference | mean | 95 % interval | asked | holds |", "|---|---|---|---|---|"]
    for c in proof["comparisons"]:
        asked = (f"not worse by {c['margin']:g}" if c["margin"] else "better") + (
            "" if c["asserted"] else " (reported only)"
        )
        interval = f"{c['low']:+.2f} to {c['high']:+.2f}"
        gaps.append(
            row([f"{c['arm']} − {c['baseline']}", f"{c['mean']:+.2f}", interval, asked, "yes" if c["holds"] else "no"])
        )
    where, cost = proof.get("environment", {}), proof["cost"]
    machine = f"{where.get('cpu', 'a CPU')}, torch {where.get('torch', '?')}"
    measured = f"{cost['trials']} trials in {cost['seconds']:.0f} s on {machine}"
    return "\n\n".join(
        [
            "## Proof",
            f"Claim: {proof['claim']}. Verdict: **{proof['verdict']}**.",
            f"Task: {proof['task']}.",
            f"![The arms of the proof, and their differences]({name}.svg)",
            "\n".join(arms),
            "\n".join(gaps),
            f"{len(proof['seeds'])} seeds, every arm with the same budget and as many values to tune; {measured}. "
            f"Run it again: `limbeck prove {name}`.",
        ]
    )


# Fields and commands


def fields_table(kind: type) -> str:
    """The fields of a dataclass or model: name, default and meaning, from the class itself."""
    from limbeck.core.recipe import descriptions

    texts = descriptions(kind)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, annotation, default in fields(kind):
        rows.append(row([f"`{name}`", f"`{annotation}`", f"`{default}`" if default else "", texts.get(name, "")]))
    return "\n".join(rows) if len(rows) > 2 else "It has none."


def fields(kind: Any) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of each field."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield (
                field.name,
                type_name(hints[field.name]),
                default_of(field.default, field.default_factory, dataclasses.MISSING),
            )
    else:
        for name, info in kind.model_fields.items():
            required = info.is_required()
            yield (
                name,
                type_name(info.annotation),
                "" if required else default_of(info.default, info.default_factory, None),
            )


def default_of(value: Any, factory: Any, missing: Any) -> str:
    """A default as it is written in a recipe."""
    if callable(factory):
        made = factory()
        return "" if dataclasses.is_dataclass(made) else json.dumps(made)
    return "" if value is missing and missing is not None else json.dumps(value)


def type_name(annotation: Any) -> str:
    """A type in short."""
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " | ").replace("'", ""), text)
    return re.sub(r"(\w+\.)+(?=\w)", "", text).replace(" | ", " or ")


def commands() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from limbeck.cli import app

    parts = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        rows = ["| argument | meaning |", "|---|---|"]
        for p in command.params:
            shown = ", ".join(p.opts) if p.param_type_name == "option" else p.name.upper()
            if p.name != "help":
                rows.append(row([f"`{shown}`", p.help or ""]))
        table = "\n".join(rows) if len(rows) > 2 else ""
        parts.append(f"## limbeck {name}\n\n{inspect.cleandoc(command.help or '')}\n\n{table}")
    return "\n\n".join(parts)


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |"


def words(value: Any) -> str:
    """Plain data in a cell."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# Reference


def reference() -> dict[str, list[str]]:
    """The objects of each page of the reference, by their full names; none is on two pages."""
    pages = {"limbeck": exported("limbeck") or []}
    pages |= {name: defined(f"limbeck.{name}") for name in MODULES}
    for package in sorted(p.parent for p in SOURCE.glob("*/__init__.py")):
        name = f"limbeck.{package.name}"
        if package.name in HIDDEN:
            pages[package.name] = HIDDEN[package.name]
        elif (listed := exported(name)) is not None:
            pages[package.name] = listed
        else:
            modules = sorted(p for p in package.glob("*.py") if not p.stem.startswith("_"))
            pages[package.name] = [o for m in modules for o in defined(f"{name}.{m.stem}")]
    seen: set[str] = set()
    for page, objects in pages.items():
        pages[page] = [o for o in objects if o not in seen]
        seen.update(objects)
    return {page: objects for page, objects in pages.items() if objects}


def reference_page(name: str, objects: Sequence[str]) -> str:
    """A page of the reference."""
    module = name if name == "limbeck" else f"limbeck.{name}"
    intro = ast.get_docstring(ast.parse(source_of(module))) or ""
    return "\n\n".join([f"# {module}", intro, *(f"::: {o}" for o in objects)]) + "\n"


def exported(module: str) -> list[str] | None:
    """The full names, where they are defined, of what a module lists in `__all__`."""
    if "__all__" not in source_of(module):
        return None
    found = import_module(module)
    values = [(name, getattr(found, name)) for name in found.__all__ if not name.startswith("__")]
    return [
        f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else f"{module}.{name}"
        for name, value in values
    ]


def defined(module: str) -> list[str]:
    """The full names of the public classes and functions that a module defines."""
    body = ast.parse(source_of(module)).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [f"{module}.{node.name}" for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def source_of(module: str) -> str:
    """The text of a module."""
    path = SOURCE.parent / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def draw() -> None:
    """Draw the picture of the README again, from the committed proof of `kd`."""
    from limbeck.report.figures import proof_svg

    proof = read_proof("kd")
    assert proof is not None
    (ROOT / "docs" / "img" / "proof.svg").write_text(proof_svg(proof), encoding="utf-8")


if __name__ == "__main__":
    draw()
