"""The pages that are made from the code hold what the code holds."""

import ast
import importlib.util
import json
import re

import pytest
from pages import ROOT

from limbeck.core import registry


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("limbeck_docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_names():
    """`module.name` for every name in an `__all__` of the package."""
    found = []
    for path in sorted((ROOT / "src" / "limbeck").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
                found += [f"{module}:{name}" for name in ast.literal_eval(node.value) if not name.startswith("__")]
    return found


def test_every_public_name_is_in_the_reference(hooks):
    shown = {name for objects in hooks.reference().values() for name in objects}
    names = public_names()
    assert len(names) > 50
    missing = []
    for spec in names:
        value = hooks.find(spec)
        where = (
            getattr(value, "__module__", spec.partition(":")[0]),
            getattr(value, "__qualname__", spec.partition(":")[2]),
        )
        if ".".join(where) not in shown and spec.replace(":", ".") not in shown:
            missing.append(spec)
    assert not missing


def test_no_object_is_on_two_pages_of_the_reference(hooks):
    shown = [name for objects in hooks.reference().values() for name in objects]
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_method_page_has_card_fields_proof_and_code(hooks, name):
    page = hooks.method_page(name)
    assert all(line in page for line in hooks.from_card(registry.card(name).text).splitlines())
    assert all(f"`{field}`" in page for field, _, _ in hooks.fields(registry.find(name)))
    bases = [kind.__name__ for kind in registry.find(name).__mro__ if kind.__module__.startswith("limbeck.methods.")]
    assert all(f"class {base}(" in page for base in bases)
    proof = hooks.read_proof(name)
    if proof is not None:
        assert all(f"{arm['mean']:.2f}" in page for arm in proof["summary"].values())
        assert f"**{proof['verdict']}**" in page


def test_a_field_shows_its_default_and_its_meaning(hooks):
    table = hooks.fields_table(registry.find("kd"))
    row = next(line for line in table.splitlines() if "`temperature`" in line)
    assert json.dumps(registry.find("kd")().temperature) in row
    assert "higher shows more" in row


def test_the_marks_of_a_page_are_replaced(hooks):
    marks = ("fields limbeck.core.optim:Optim", "file examples/own_loop.py", "commands", "methods", "fewstep digits")
    page = hooks.on_page_markdown("\n".join(f"<!-- {mark} -->" for mark in marks))
    assert "<!--" not in page
    assert all(text in page for text in ("`weight_decay`", "def mlp(", "## limbeck distill", "[kd](methods/kd.md)"))
    assert "| teacher, 50 steps |" in page


def test_formulas_become_mathml(hooks):
    page = hooks.on_page_content(
        r'<p>a</p><div class="arithmatex">\[x &lt; \frac{1}{2}\]</div><span class="arithmatex">\(y\)</span>'
    )
    assert page.count("<math") == 2
    assert "<mfrac>" in page
    assert 'display="block"' in page
    assert "arithmatex" not in page


def test_links_of_the_readme_become_links_of_the_site(hooks):
    text = (
        "[a](docs/start.md) ![b](docs/img/x.svg) [kd](src/limbeck/methods/kd/card.md) [L](LICENSE) [c](CONTRIBUTING.md)"
    )
    assert hooks.from_root(text) == "[a](start.md) ![b](img/x.svg) [kd](methods/kd.md) L [c](contributing.md)"


def test_links_between_cards_become_links_between_pages(hooks):
    assert hooks.from_card("[`dwa`](../dwa/card.md) [x](../x.md)") == "[`dwa`](dwa.md) [x](../x.md)"
    assert "card.md)" not in "".join(map(hooks.method_page, registry.METHODS))


def test_the_readme_tells_the_verdicts_and_numbers_of_the_committed_proofs(hooks):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in registry.METHODS:
        proof = hooks.read_proof(name)
        row = next(line for line in readme.splitlines() if line.startswith(f"| [{name}]("))
        assert row.endswith(f"| {'none yet' if proof is None else proof['verdict']} |")
    from limbeck.report.figures import proof_svg

    picture = (ROOT / "docs" / "img" / "proof.svg").read_text(encoding="utf-8")
    texts = re.findall(r"<text[^>]*>([^<]*)<", proof_svg(hooks.read_proof("kd")))
    assert re.findall(r"<text[^>]*>([^<]*)<", picture) == texts, "draw it again: python docs/hooks.py"


@pytest.mark.parametrize("task", ["digits", "cifar10"])
def test_the_page_of_condensed_sets_has_every_row_of_the_benchmark(hooks, task):
    result = hooks.read_result("condense")[task]
    page = hooks.on_page_markdown(f"<!-- condensed {task} -->")
    lines = page.splitlines()
    for each, rows in ((key, result[key]) for key in ("1", "10")):
        for name, part in rows.items():
            if "summary" not in part:  # not all of its sets are there
                continue
            kinds = part["summary"]["accuracy"]
            cells = (
                [hooks.percent(kinds["hard"][net]) for net in ("ConvNet", "ResNet", "MLP")] if "hard" in kinds else []
            )
            cells += [hooks.percent(kinds[kind]["all three"]) for kind in ("table", "views") if kind in kinds]
            own = [line for line in lines if line.startswith(f"| {name} |")]
            assert any(all(cell in line for cell in cells) for line in own), (each, name)
