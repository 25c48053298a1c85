"""The commands that work, as a person uses them."""

import json
import statistics
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import limbeck
from limbeck.cli import app, main
from limbeck.core import registry

NET = """
import torch
from torch import nn

def net(width):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

def teacher():
    return net(32)

def student():
    return net(4)

def data():
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)
"""
WORDS = ["--teacher", "net.py:teacher", "--student", "net.py:student", "--data", "net.py:data"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def call(capsys, *words):
    capsys.readouterr()
    code = main(words)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def test_distill_says_what_came_out_and_what_next(capsys, place):
    shown = call(capsys, "distill", *WORDS, "--epochs", "1", "--out", "run")
    assert "report   run/report.html" in shown
    assert "next     limbeck export run --trust\n" in shown
    assert (place / "run" / "report.html").is_file()
    assert (place / "run" / "student" / "model.safetensors").is_file()


def test_distill_chooses_a_folder(capsys, place):
    call(capsys, "distill", *WORDS, "--epochs", "1")
    assert (place / "runs" / "kd-student" / "metrics.json").is_file()


def test_dry_run_prints_a_recipe_that_runs(capsys, place):
    shown = call(capsys, "distill", *WORDS, "--set", "method.temperature=2", "--batch-size", "32", "--dry-run")
    tree = yaml.safe_load(shown)
    assert tree["method"] == {"name": "kd", "temperature": 2.0, "label_weight": 0.1}
    assert tree["engine"]["batch_size"] == 32
    assert sorted(p.name for p in place.iterdir()) == ["net.py"]
    (place / "recipe.yaml").write_text(shown)
    call(capsys, "run", "recipe.yaml", "engine.epochs=1", "--out", "run")
    assert (place / "run" / "report.html").is_file()


def test_overrides_and_options_of_run(capsys, place):
    (place / "recipe.yaml").write_text(
        "teacher: net.py:teacher\nstudent: net.py:student\ndata: net.py:data\nmethod: kd\n"
    )
    shown = call(capsys, "run", "recipe.yaml", "engine.epochs=1", "method=pld", "--out", "run", "--json")
    found = json.loads(shown)
    assert found["out"] == "run"
    assert found["lineage"]["method"] == "pld"
    assert found["models"]["student"]["parameters"] == 4 * 4 + 4 + 4 * 3 + 3


def test_compare_and_report(capsys, place):
    for name, method in (("a", "kd"), ("b", "pld")):
        call(capsys, "distill", *WORDS, "--epochs", "1", "--method", method, "--out", name)
    shown = call(capsys, "compare", "a", "b")
    assert [line.split()[:2] for line in shown.splitlines()[1:]] == [["a", "kd"], ["b", "pld"]]
    rows = json.loads(call(capsys, "compare", "a", "b", "--json"))
    assert [row["method"] for row in rows] == ["kd", "pld"]
    assert "page     both.html" in call(capsys, "compare", "a", "b", "--out", "both.html")
    (place / "a" / "report.html").unlink()
    assert call(capsys, "report", "a").strip() == "a/report.html"
    assert (place / "a" / "report.html").is_file()


def test_a_family_is_measured_and_one_is_picked(capsys, place):
    elastic = ["--student", "net.py:student", "--data", "net.py:data", "--method", "deps", "--set"]
    told = call(
        capsys,
        "distill",
        *elastic,
        "method={name: deps, expand: [0.5, 1.0], divisor: 1}",
        "--epochs",
        "1",
        "--out",
        "run",
    )
    assert "next     limbeck family run --trust" in told
    assert main(["family", "run"]) == 2
    assert "trust" in capsys.readouterr().err
    shown = call(capsys, "family", "run", "--trust")
    assert shown.startswith("Parameters  FLOPs")
    assert "next     limbeck family run --parameters" in shown
    written = (place / "run" / "family.json").read_text()
    found = json.loads(call(capsys, "family", "run", "--trust", "--parameters", "30", "--out", "small", "--json"))
    assert (place / "run" / "family.json").read_text() == written  # measured once
    assert found["picked"]["parameters"] == 4 * 2 + 2 + 2 * 3 + 3
    small = limbeck.load("small", trust=True)
    assert sum(p.numel() for p in small.parameters()) == found["picked"]["parameters"]
    assert "The family" in (place / "run" / "report.html").read_text()
    assert main(["family", "run", "--trust", "--parameters", "3"]) == 2
    assert "within the budget" in capsys.readouterr().err


def test_export_in_a_form(capsys, place):
    pytest.importorskip("onnxscript")
    pytest.importorskip("torchao")
    call(capsys, "distill", *WORDS, "--epochs", "1", "--out", "run")
    shown = call(capsys, "export", "run", "--trust", "--to", "int8-weight")
    assert "model-int8-weight.onnx" in shown
    assert "int8-weight" in next(line for line in shown.splitlines() if "student  " in line)
    assert main(["export", "run", "--to", "int4"]) == 2


def test_plan_and_doctor(capsys, place):
    (place / "recipe.yaml").write_text(
        "teacher: net.py:teacher\nstudent: net.py:student\ndata: net.py:data\nmethod: kd\n"
    )
    assert "GB" in call(capsys, "plan", "recipe.yaml")
    assert json.loads(call(capsys, "plan", "recipe.yaml", "--json"))["fits"] is True
    assert main(["doctor", "recipe.yaml", "optim.student.lr=1e-3", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert {f["check"] for f in found["findings"]} >= {"inputs", "labels", "shapes"}
    assert sorted(p.name for p in place.iterdir() if p.name != "__pycache__") == ["net.py", "recipe.yaml"]


def test_methods_and_cards(capsys):
    shown = call(capsys, "methods")
    assert [line.split()[0] for line in shown.splitlines()] == ["name", *sorted(registry.METHODS)]
    assert {card["name"] for card in json.loads(call(capsys, "methods", "--json"))} == set(registry.METHODS)
    assert call(capsys, "card", "pld").startswith("# ")
    assert json.loads(call(capsys, "card", "pld", "--json"))["year"] == 2025


def test_schema_is_json(capsys):
    assert json.loads(call(capsys, "schema"))["properties"]["engine"]


def test_a_new_method_works_as_it_is(capsys, place):
    shown = call(capsys, "new", "my_method")
    assert "--method my_method/method.py:MyMethod" in shown
    assert sorted(p.name for p in (place / "my_method").iterdir()) == ["card.md", "method.py", "proof.py"]
    call(capsys, "distill", *WORDS, "--epochs", "1", "--method", "my_method/method.py:MyMethod", "--out", "run")
    assert call(capsys, "card", "my_method/method.py:MyMethod").startswith("# my_method")
    from limbeck.prove import load_proof

    assert list(load_proof("my_method/method.py:MyMethod").arms)[-1] == "my_method"


def test_a_new_method_of_the_library_says_its_row(capsys, place):
    (place / "methods").mkdir()
    (place / "methods" / "__init__.py").write_text("")
    shown = call(capsys, "new", "my_method", "--folder", "methods")
    assert '"my_method": "limbeck.methods.my_method.method:MyMethod"' in shown
    assert (place / "methods" / "my_method" / "__init__.py").is_file()


def test_a_new_method_is_clean(capsys, place):
    call(capsys, "new", "my_method")
    config = (
        "line-length = 120\nlint.select = ['E', 'F', 'UP', 'B', 'SIM', 'RUF', 'D1']\nlint.ignore = ['D105', 'D107']\n"
    )
    (place / "ruff.toml").write_text(config)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "my_method"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_main_job_takes_no_arguments(capsys, place, monkeypatch):
    import limbeck.demo

    asked = []

    def main_job(budget, out):
        asked.append((budget, out))
        call(capsys, "distill", *WORDS, "--epochs", "1", "--out", "run")
        return place / "run"

    monkeypatch.setattr(limbeck.demo, "main_job", main_job)
    assert "report.html" in call(capsys, "distill", "--budget", "2m")
    assert asked == [("2m", None)]


def test_every_command_has_help(capsys):
    names = [command.callback.__name__ for command in app.registered_commands]
    verbs = "distill run methods card report compare export family plan doctor prove new schema"
    assert sorted(names) == sorted(verbs.split())
    for name in names:
        assert call(capsys, name, "--help").startswith("Usage: ")
    assert call(capsys, "--version").startswith("limbeck ")


@pytest.mark.processes
def test_a_stopped_run_goes_on_to_the_same_end(capsys, place):
    steps = ["--set", "engine.steps=1500", "--set", "engine.evaluate_every=0"]
    words = ["distill", *WORDS, *steps, "--out"]
    code = "from limbeck.cli import main; raise SystemExit(main())"
    first = [*words, "run", "--set", "engine.checkpoint_every=20"]
    process = subprocess.Popen([sys.executable, "-c", code, *first], stderr=subprocess.PIPE, text=True)
    while not list(place.glob("run/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is lost" in said
    assert "Traceback" not in said
    assert not (place / "run" / "report.html").exists()
    call(capsys, *words, "run")
    call(capsys, *words, "whole")
    one, other = (load_file(place / name / "student" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupt_outside_the_engine_says_how_to_go_on(capsys, place, monkeypatch):
    import limbeck.demo

    def main_job(budget, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(limbeck.demo, "main_job", main_job)
    assert main(["distill"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.processes
def test_help_imports_nothing_heavy():
    code = (
        "import sys, limbeck.cli as c; code = c.main(['--help']);"
        "heavy = {'torch', 'pydantic', 'numpy', 'rich', 'yaml'} & set(sys.modules);"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


@pytest.mark.processes
def test_help_takes_little_time_of_the_processor():
    code = "import time, limbeck.cli as c; c.main(['--help']); print(time.process_time())"
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(done.stdout.splitlines()[-1]))
    assert statistics.median(times) < 0.5
