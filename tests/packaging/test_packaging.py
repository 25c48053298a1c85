"""What is installed, and what it costs to import it."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import limbeck

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "limbeck"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def test_importing_limbeck_does_not_import_torch():
    heavy = "{'torch', 'numpy', 'pandas', 'transformers', 'typer', 'pydantic'}"
    assert python("-c", f"import limbeck, sys; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_help_works_and_does_not_import_torch():
    code = "import sys; from limbeck.cli import main; code = main(['--help']); print(code, 'torch' in sys.modules)"
    out = python("-c", code)
    assert out.splitlines()[-1] == "0 False"
    assert all(verb in out for verb in ("distill", "run", "plan", "doctor", "prove"))


def test_the_command_is_installed():
    assert PROJECT["scripts"] == {"limbeck": "limbeck.cli:main"}
    assert python("-m", "limbeck", "--version").strip() == f"limbeck {limbeck.__version__}"


def test_every_public_name_loads():
    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        limbeck.distil  # noqa: B018


def test_the_wheel_holds_everything_that_the_package_folder_does(wheel):
    here = {
        f"limbeck/{p.relative_to(PACKAGE)}" for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    inside = {name for name in wheel.namelist() if name.startswith("limbeck/")}
    assert inside == here
    for needed in ("py.typed", "report/page.html.j2", "cli/skeleton/method.py.txt"):
        assert f"limbeck/{needed}" in inside
    for method in (p.parent.name for p in PACKAGE.glob("methods/*/method.py")):
        assert f"limbeck/methods/{method}/card.md" in inside


def test_the_wheel_says_what_it_is(wheel):
    info = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(info).decode()
    assert "License-Expression: Apache-2.0" in text
    assert f"Version: {limbeck.__version__}" in text
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_extras_that_errors_name_exist():
    extras = set(PROJECT["optional-dependencies"])
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"require\([^)]*extra=\"(\w+)\"", code)) - {"core"}
    assert named
    assert named <= extras


def test_change_fragments_have_the_form():
    fragments = [p for p in (ROOT / "changes").iterdir() if p.name != "README.md"]
    assert fragments
    for path in fragments:
        assert re.fullmatch(r"[a-z0-9-]+\.(added|changed|deprecated|removed|fixed)\.md", path.name), path.name
        assert path.read_text(encoding="utf-8").strip().endswith(".")


def test_ci_runs_the_command_of_the_readme():
    command = re.search(r"## Tests\n+```bash\n(.+)\n", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert command
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"bash -c '{command[1]}'" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert all(
        step in script
        for step in ("set -euo pipefail", "ruff check", "ruff format --check", "mypy", "mkdocs build --strict")
    )


def test_pre_commit_runs_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["ruff check --fix", "ruff format"]
