"""Whatever is wrong is told in one message, with exit code 2 and nothing written."""

import subprocess
import sys

import pytest
import torch

from limbeck.cli import main

NET = """
import torch
from torch import nn

def net(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))

def teacher():
    return net(3)

def student():
    return net(3)

def five():
    return net(5)

def wide():
    return nn.Linear(7, 3)

def broken():
    model = net(3)
    model[1].weight.data.fill_(float("nan"))
    return model

def raises():
    raise OSError("no licence for this model")

def number():
    return 3

def data():
    torch.manual_seed(0)
    return torch.randn(200, 4), torch.arange(200) % 3

def high():
    return torch.randn(200, 4), torch.arange(200) % 9

def low():
    return torch.randn(200, 4), torch.arange(200) % 3 - 1

def infinite():
    return torch.full((200, 4), float("inf")), torch.arange(200) % 3

def nothing():
    return torch.randn(0, 4), torch.arange(0)

def splits(**others):
    from limbeck.data import Data, TensorSource

    x, y = data()
    parts = {"train": (x[:120], y[:120]), "validation": (x[120:160], y[120:160]), "test": (x[160:], y[160:])}
    return Data(**{name: TensorSource(*part) for name, part in (parts | others).items()})

def pool():
    return splits(unlabelled=(torch.ones(50, 4) * torch.arange(50).unsqueeze(1),))

def labelled_pool():
    return splits(unlabelled=(torch.randn(50, 4), torch.arange(50) % 3))

def again():
    return splits(increment_1=(torch.randn(50, 4), torch.arange(50) % 2))

def never():
    x, y = data()
    return splits(train=(x[y < 2], y[y < 2]))

def gap():
    x, y = data()
    part = x[y != 1][:80], y[y != 1][:80]
    return splits(train=part, unlabelled=(torch.ones(50, 4) * torch.arange(50).unsqueeze(1),))

class Plain:
    pass
"""

RECIPE = """
teacher: net.py:teacher
student: net.py:student
data: net.py:data
method: {name: kd, temperature: 2.0}
engine: {epochs: 1}
out: run
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def check(capsys, place, words, *parts):
    before = sorted(place.rglob("*"))
    code = main(words)
    shown = capsys.readouterr()
    assert code == 2, shown.err
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("error: ") == 1
    assert "Traceback" not in shown.err
    for part in parts:
        assert part in shown.err, shown.err
    assert sum(f"\n  {name}: " in shown.err for name in ("where", "found", "expected", "fix")) >= 2, shown.err
    after = [path for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before


# Overrides of a recipe that works, and what the message says.
OVERRIDES = {
    "unknown field": (["engine.epoch=3"], "unknown field", "recipe.yaml: engine.epoch", "expected: epochs"),
    "unknown field at the top": (["techer=net.py:teacher"], "unknown field", "expected: teacher"),
    "unknown field of the method": (["method.temprature=1"], "unknown field", "method.temprature", "temperature"),
    "unknown field of an optimizer": (["optim.student.learning_rate=1"], "optim.student.learning_rate", "lr"),
    "wrong type": (["engine.epochs=many"], "wrong value", "engine.epochs", "found: 'many'", "expected: a number"),
    "a truth for a number": (["engine.batch_size=true"], "wrong value", "found: True", "a whole number"),
    "a number for a list": (["engine.compile=3"], "engine.compile", "expected: a list"),
    "none of the choices": (["engine.precision=fp8"], "engine.precision", "'fp32', 'bf16' or 'fp16'"),
    "out of range": (["engine.batch_size=0"], "out of range", "engine.batch_size", "expected: >= 1"),
    "hyper-parameter out of range": (["method.temperature=-1"], "out of range", "method.temperature", "above 0"),
    "rate out of range": (["optim.student.lr=0"], "out of range", "lr", "above 0"),
    "two problems": (["engine.epochs=x", "engine.steps=y"], "engine.epochs", "then mend engine.steps too"),
    "no override": (["engine.epochs"], "not an override", "found: engine.epochs", "field.path=value"),
    "an override into a number": (["engine.epochs.x=3"], "has no fields", "engine.epochs.x"),
    "an override that is no YAML": (["engine.epochs=["], "not YAML", "engine.epochs"),
    "unknown method": (["method=kdd"], "unknown method", "found: kdd", "expected: kd"),
    "a method file without the class": (["method=net.py:Missing"], "no such", "found: Missing"),
    "a class that is no method": (["method=net.py:Plain"], "not a method", "limbeck.Method"),
    "unknown role": (["optim.pupil.lr=0.1"], "a role that there is not", "optim.pupil", "student or teacher"),
    "no such data": (["data=dgits"], "no such data", "found: 'dgits'", "expected: digits"),
    "no such file": (["data=missing/file.csv"], "no such data", "missing/file.csv"),
    "unknown data option": (["data={spec: net.py:data, imagesize: 3}"], "unknown field", "image_size"),
    "data without a spec": (["data={image_size: 3}"], "data", "spec"),
    "unknown model": (["student=tim:resnet18"], "there is no such", "tim", "expected: timm"),
    "unknown function": (["student=net.py:studnt"], "no such function", "found: studnt", "expected: student"),
    "no model": (["student=net.py:number"], "no model", "found: int"),
    "making the model fails": (["student=net.py:raises"], "fails", "no licence for this model"),
    "no teacher": (["teacher=null"], "needs a teacher", "fix: give one"),
    "classes differ": (["student=net.py:five"], "do not have the same classes", "found: student"),
    "label too high": (["data=net.py:high"], "label is out of range", "labels from 0 to 8", "expected: 0 to 2"),
    "label below zero": (["data=net.py:low"], "label is out of range", "found: -1"),
    "infinite data": (["data=net.py:infinite"], "NaN or infinite", "200 such rows"),
    "no samples": (["data=net.py:nothing"], "no samples"),
    "the model takes another size": (["student=net.py:wide"], "the student cannot work with these data", "fix: give"),
    "NaN in the weights": (["teacher=net.py:broken"], "the teacher answers with numbers that are not finite"),
    "layers of what has none": (["student=layers:2"], "layers"),
    "unknown device": (["engine.device=tpu9"], "unknown device", "found: tpu9"),
    "nothing to shard over": (["engine.shard=[student]"], "nothing to shard over", "engine.processes"),
    "out lies in a file": (["out=net.py/run"], "cannot be written", "is a file"),
    "out holds other files": (["out=."], "holds other files", "--out"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_bad_override(case, capsys, place):
    overrides, *parts = OVERRIDES[case]
    check(capsys, place, ["run", "recipe.yaml", *overrides], *parts)


# What methods need beside a teacher and labelled data.
FAMILY = {
    "no pool": (["method=wad", "teacher=null"], "needs data.unlabelled", "where: data.unlabelled", "fix: give"),
    "no pool to choose from": (["method={name: ssld, images_per_class: 5}"], "no pool to choose images from"),
    "a pool with labels": (["method=ssld", "data=net.py:labelled_pool"], "unlabelled data have labels", "fix: give"),
    "a class without labels": (
        ["method=wad", "teacher=null", "data=net.py:gap"], "without a labelled sample", "class 1", "fix: label"
    ),
    "other classes than the teacher's": (
        ["method=ssld", "data=net.py:pool", "student=net.py:five"], "do not have the same classes", "found: student"
    ),
    "more sources than weights": (
        ["teacher=[net.py:teacher, net.py:five]", "method={name: distill_weighted, weights: [1.0]}"],
        "more sources than weights", "found: 2 sources, 1 weights",
    ),
    "no sources": (["teacher=null", "method=distill_nearest"], "needs classifiers of other tasks", "roles.teacher"),
    "a class that came before": (
        ["method=wa", "teacher=null", "data=net.py:again"], "arrived before", "data.increment_1", "class 0, 1"
    ),
    "a class that never comes": (
        ["method={name: wa, increments: 2}", "teacher=null", "data=net.py:never"], "never arrives", "class 2"
    ),
    "a memory without room": (["method={name: wa, increments: 3, memory: 2}", "teacher=null"], "memory", "3 or more"),
    "more increments than classes": (["method={name: wa, increments: 9}", "teacher=null"], "do not divide", "found: 9"),
    "a teacher that is not asked": (["method={name: wa, increments: 3}"], "leave the teacher out"),
    "fewer samples than subclasses": (["method={name: lelp, subclasses: 90}"], "subclasses", "the samples of a class"),
    "a narrow teacher": (["method={name: lelp, subclasses: 3}"], "too small for so many subclasses"),
    "an ensemble without an embedding": (
        ["method={name: lelp, subclasses: 1}", "teacher=[net.py:teacher, net.py:teacher]"], "no embedding of its own"
    ),
    "nothing to estimate on": (
        ["method=self_distillation", "data={spec: net.py:data, validation: 0, test: 0.1}"], "data.validation"
    ),
    "styles of what is no image": (["method=kd3"], "styles can be mixed in images only", "contrastive_weight=0"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILY)
def test_bad_input_of_methods(case, capsys, place):
    overrides, *parts = FAMILY[case]
    check(capsys, place, ["run", "recipe.yaml", "method=null", *overrides], *parts)


RECIPES = {
    "not YAML": ("teacher: [", "this is not YAML", "line 1"),
    "given twice": (RECIPE + "engine: {epochs: 2}\n", "not YAML", "'engine' is given twice"),
    "a list": ("- teacher\n", "not a recipe", "found: list"),
    "empty": ("", "not a recipe"),
    "no method": ("student: net.py:student\ndata: net.py:data\n", "names no method", "recipe.yaml: method"),
    "no student": ("data: net.py:data\nmethod: kd\n", "a field is missing", "recipe.yaml: student"),
    "not text": (b"\xff\xfe\x00", "not YAML"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_bad_recipe(case, capsys, place):
    text, *parts = RECIPES[case]
    (place / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    check(capsys, place, ["run", "recipe.yaml"], *parts)


COMMANDS = {
    "no recipe": (["run", "missing.yaml"], "cannot be read", "where: missing.yaml"),
    "a folder for a recipe": (["run", "."], "cannot be read"),
    "half a command": (["distill", "--teacher", "net.py:teacher"], "a field is missing", "student"),
    "no budget": (["run", "recipe.yaml", "--budget", "soon"], "not a budget", "found: soon", "90s, 2m or 1h"),
    "a budget of nothing": (["run", "recipe.yaml", "--budget", "0s"], "not a budget"),
    "a negative budget": (["run", "recipe.yaml", "--budget", "-3m"], "not a budget"),
    "a budget that is too short": (["run", "recipe.yaml", "--budget", "0.001s"], "too short", "give more time"),
    "no run to report": (["report", "missing"], "not a run folder", "missing"),
    "no run to compare": (["compare", "missing"], "not a run folder", "missing"),
    "no run to export": (["export", "missing"], "not a run folder", "missing"),
    "no such card": (["card", "pdl"], "unknown method", "expected: pld"),
    "no such proof": (["prove", "pdl"], "unknown method", "expected: pld"),
    "no name": (["new", "My-Method"], "cannot be a method's name", "found: My-Method"),
    "a plan of what is not there": (["plan", "missing.yaml"], "cannot be read"),
    "a doctor for what is not there": (["doctor", "recipe.yaml", "engine.epoch=3"], "unknown field"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_command(case, capsys, place):
    words, *parts = COMMANDS[case]
    check(capsys, place, words, *parts)


def test_missing_file_of_weights(capsys, place):
    check(capsys, place, ["run", "recipe.yaml", "student=net.py:student@no.safetensors"], "no such weights file")


def test_damaged_weights(capsys, place):
    (place / "w.safetensors").write_bytes(b"not weights")
    check(capsys, place, ["run", "recipe.yaml", "student=net.py:student@w.safetensors"], "not a whole safetensors")


def test_weights_of_another_architecture(capsys, place):
    from limbeck.export.safetensors import save

    save(torch.nn.Linear(9, 9), place / "w.safetensors")
    check(capsys, place, ["run", "recipe.yaml", "student=net.py:student@w.safetensors"], "not of this architecture")


def test_weights_that_would_run_code(capsys, place):
    torch.save({"model": torch.nn.Linear(2, 2)}, place / "w.pt")
    check(capsys, place, ["run", "recipe.yaml", "student=net.py:student@w.pt"], "cannot be loaded", "w.pt")


def test_nan_in_a_table(capsys, place):
    (place / "t.csv").write_text("a,b,c,d,label\n" + "1,2,3,4,0\n" * 50 + "1,nan,3,4,1\n" + "1,2,3,4,2\n" * 50)
    check(capsys, place, ["run", "recipe.yaml", "data=t.csv"], "NaN", "t.csv: b")


def test_empty_file(capsys, place):
    (place / "t.txt").write_text("\n\n")
    check(capsys, place, ["run", "recipe.yaml", "data=t.txt"], "no samples", "t.txt")


def test_texts_for_a_model_without_a_tokenizer(capsys, place):
    (place / "t.txt").write_text("".join(f"sentence {i}\n" for i in range(200)))
    check(capsys, place, ["run", "recipe.yaml", "data=t.txt"], "no tokenizer")


def images(place, classes):
    image = pytest.importorskip("PIL.Image")
    for name in classes:
        (place / "images" / name).mkdir(parents=True)
        for i in range(40):
            image.new("RGB", (8, 8), (i, i, i)).save(place / "images" / name / f"{i}.png")


def test_unreadable_image(capsys, place):
    images(place, "abc")
    for file in (place / "images").rglob("*.png"):
        file.write_bytes(b"no picture")
    check(capsys, place, ["run", "recipe.yaml", "data=images"], "image", ".png")


def test_classes_of_teacher_and_data_differ(capsys, place):
    images(place, "ab")
    (place / "net.py").write_text(NET.replace("nn.Linear(4, classes)", "nn.Linear(192, classes)"))
    check(
        capsys,
        place,
        ["run", "recipe.yaml", "data=images"],
        "teacher and data have different classes",
        "the data have 2",
    )


def test_missing_extra(capsys, place, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    check_parts = ("'timm' is needed", 'pip install "limbeck[vision]"')
    before = sorted(place.rglob("*"))
    assert main(["run", "recipe.yaml", "student=timm:resnet18"]) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in check_parts)
    assert [p for p in sorted(place.rglob("*")) if "__pycache__" not in p.parts] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one(capsys, place):
    words = ["distill", "--teacher", "net.py:teacher", "--student", "net.py:student", "--data", "net.py:data"]
    check(capsys, place, [*words, "--device", "cuda"], "a GPU was asked for", "found: cuda", "engine.device=auto")


def test_out_of_another_run(capsys, place):
    assert main(["run", "recipe.yaml"]) == 0
    capsys.readouterr()
    words = ["run", "recipe.yaml", "method.temperature=3"]
    check(capsys, place, words, "another run", "method.temperature", "found: 2.0", "expected: 3.0", "--out")


@pytest.mark.parametrize(
    "words", [["dstill"], ["run"], ["distill", "--epochs", "many"], ["prove", "kd", "--seeds", "1"]]
)
def test_words_that_the_command_line_does_not_know(words, capsys, place):
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "Error" in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(place):
    from limbeck import LimbeckError

    with pytest.raises(LimbeckError, match="unknown field"):
        main(["run", "recipe.yaml", "engine.epoch=3", "--debug"])


@pytest.mark.processes
@pytest.mark.parametrize("case", ["unknown field", "label too high"])
def test_as_a_process(case, place):
    overrides, *parts = OVERRIDES[case]
    code = "from limbeck.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "recipe.yaml", *overrides], capture_output=True, text=True, cwd=place
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts)
    assert not (place / "run").exists()
