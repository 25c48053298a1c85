"""Each method's card: its form, its examples, and that the numbers it quotes are those of its proof."""

import json
import re
import sys
from dataclasses import fields
from types import ModuleType

import pytest
import yaml

from limbeck.cli import main
from limbeck.core import registry

FRONT = ["name", "seed", "paper", "year", "families", "needs", "produces", "status"]
SECTIONS = [
    "When to use it, and when not",
    "Run it",
    "Knobs",
    "Cost",
    "What it won",
    "Differences from the paper",
    "References",
]
FAMILIES = {"classify", "perceive", "compress", "elastic", "condense", "fewstep", "language", "graph"}
LONG = ("prove",)  # run by hand; its results are committed

cards = pytest.mark.parametrize("card", [registry.card(name) for name in registry.METHODS], ids=lambda card: card.name)


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)


@cards
def test_form(card):
    assert list(card.metadata) == FRONT
    assert card.metadata["name"] == card.name
    assert set(card.metadata["families"]) <= FAMILIES
    assert card.metadata["status"] in ("runs", "reproduces", "differs")
    assert re.findall("^## (.*)$", card.text, re.MULTILINE) == SECTIONS
    assert len(blocks(card, "python")) >= 2
    assert f"from limbeck.methods.{card.name}.method import" in blocks(card, "python")[-1]


@cards
def test_every_field_has_its_knob(card):
    knobs = card.text.partition("## Knobs")[2].partition("## Cost")[0]
    assert re.findall(r"`(\w+)`: ", knobs) == [field.name for field in fields(registry.find(card.name))]


@cards
def test_quoted_numbers_are_those_of_the_proof(card):
    proof = json.loads((card.path.parent / "proof.json").read_text(encoding="utf-8"))
    text = " ".join(card.text.partition("## What it won")[2].split())
    assert f"| {' | '.join(proof['arms'])} |" in text
    row = [f"{s['mean']:.2f} ± {s['deviation']:.2f}" for s in proof["summary"].values()]
    assert f"| {' | '.join(row)} |" in text
    for c in proof["comparisons"]:
        assert f"{c['mean']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]" in text
    assert (proof["verdict"] == "shown") == (card.metadata["status"] == "reproduces")
    if proof["verdict"] != "shown":
        assert "not shown" in text


@cards
def test_the_commands_run(card, tmp_path, monkeypatch, capsys):
    """Python blocks that write what the commands read, the commands, and blocks that load what these wrote.

    A block that begins with a file's name is that file.
    """
    monkeypatch.chdir(tmp_path)
    module = ModuleType("card")
    monkeypatch.setitem(sys.modules, "card", module)
    for block in blocks(card, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block)
        elif ".txt" in block:
            exec(block, vars(module))
    for line in "".join(blocks(card, "console")).splitlines():
        words = line.removeprefix("$ limbeck ").split()
        if words[0] not in LONG:
            assert main(words) == 0, capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["method"]["name"] == card.name
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "student").is_dir()
    python = blocks(card, "python")
    for block in python:
        if 'load("run")' in block:
            exec("".join(python[: python.index(block) + 1]), vars(module))
