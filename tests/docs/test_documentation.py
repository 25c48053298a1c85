"""What the documentation shows works: Python blocks and examples run, commands parse, recipes are valid, links lead somewhere."""

import re
import runpy
import shlex
import sys
from types import ModuleType

import pytest
import yaml
from pages import CARDS, EXAMPLES, PAGES, ROOT, blocks, commands, program
from typer.main import get_command

from limbeck import Method
from limbeck.cli import app
from limbeck.core import registry
from limbeck.core.errors import UsageError
from limbeck.core.recipe import Recipe


def name_of(path):
    return f"{path.parent.name}/{path.stem}" if path.name == "card.md" else path.stem


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")


@pytest.mark.parametrize("path", [p for p in [*PAGES, *CARDS] if blocks(p, "python")], ids=name_of)
def test_the_python_of_a_page_runs(path, in_folder, monkeypatch):
    module = ModuleType(f"page_{path.stem}")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(program(path), path, "exec"), vars(module))


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_an_example_runs(path, in_folder):
    runpy.run_path(str(path), run_name="__main__")


COMMANDS = sorted({command for path in [*PAGES, *CARDS] for command in commands(path)})


def parse(command):
    words = shlex.split(command)[1:]
    group = get_command(app)
    with group.make_context("limbeck", list(words)) as context:
        name, found, rest = group.resolve_command(context, words)
        found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    parse(command)


@pytest.mark.parametrize(
    "command", ["limbeck distill --teach x", "limbeck prove", "limbeck prove kd --seeds few", "limbeck ruin"]
)
def test_a_wrong_command_does_not_parse(command):
    with pytest.raises(Exception, match=r"No such|Missing|valid integer"):
        parse(command)


def recipes():
    found = [(path, block) for path in PAGES for block in blocks(path, "yaml")]
    return [pytest.param(block.text, id=f"{path.stem}-{block.line}") for path, block in found]


@pytest.mark.parametrize("text", recipes())
def test_a_recipe_is_valid(text):
    assert isinstance(Recipe.parse(yaml.safe_load(text)).method, Method)


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(
        r"^```.*?^```$|\$\$.*?\$\$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        pages = ["methods/index.md", "contributing.md", *(f"methods/{name}.md" for name in registry.METHODS)]
        generated = target in pages
        assert target.startswith("http") or generated or (path.parent / target).exists(), target


def test_the_readme_lists_the_methods_that_there_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\]\(src/limbeck/methods/\1/card\.md\)", text, re.MULTILINE)) == set(
        registry.METHODS
    )


def test_the_example_method_works_by_name_and_says_what_it_does_not_know(in_folder):
    recipe = {"student": "s", "data": "d", "method": {"name": "examples/own_method.py:Hint", "weight": 2.0}}
    assert Recipe.parse(recipe).method.weight == 2.0
    with pytest.raises(UsageError, match="unknown field"):
        Recipe.parse(recipe, ["method.wait=1"])
