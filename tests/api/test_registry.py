"""The table of methods: found by name, listed without being imported."""

import subprocess
import sys

import pytest

from limbeck.core import registry
from limbeck.core.errors import UsageError
from limbeck.core.method import Method


@pytest.mark.parametrize("name", registry.METHODS)
def test_every_row_is_a_method_with_a_card(name):
    kind = registry.find(name)
    assert issubclass(kind, Method)
    assert registry.name_of(kind) == name
    card = registry.card(name)
    assert card.metadata["name"] == name
    assert card.text.startswith("#")


def test_listing_imports_no_method_and_no_torch():
    code = (
        "import sys; from limbeck.core import registry; [registry.card(n) for n in registry.METHODS];"
        "bad = [m for m in sys.modules if m == 'torch' or m.endswith('.method')]; raise SystemExit(bool(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_method_of_ones_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom limbeck import Method\n"
        "@dataclass(frozen=True)\nclass Own(Method):\n    weight: float = 1.0\n"
    )
    kind = registry.find(f"{file}:Own")
    assert kind().weight == 1.0
    assert registry.find(registry.name_of(kind)) is kind


@pytest.mark.parametrize("name", ["nothing", "no.py:Own", "math:gcd"])
def test_what_is_no_method(name):
    with pytest.raises(UsageError):
        registry.find(name)


def test_damaged_card(tmp_path):
    (tmp_path / "card.md").write_text("# no front matter\n")
    with pytest.raises(UsageError, match="no front matter"):
        registry.card(f"{tmp_path / 'method.py'}:Own")
    with pytest.raises(UsageError, match="no card"):
        registry.card(f"{tmp_path / 'missing' / 'method.py'}:Own")
