"""`distill`, `build`, `run`, `load` and `export`: from models and data to a run's folder, and back."""

import json

import pytest
import torch
import yaml
from torch import nn

import limbeck
from limbeck import api
from limbeck.convert.record import load_student
from limbeck.core import registry
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource, TextSource, load_data
from limbeck.evaluate.tasks import predict
from limbeck.finished import Finished, export
from limbeck.methods.kd.method import KD
from limbeck.timing import seconds_of

ADAM = {"student": {"lr": 0.02}}


def points(count=600, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, (x @ torch.randn(4, classes, generator=generator)).argmax(1)


def fitted(classes=3):
    """A teacher that knows the classes of `points`."""
    generator = torch.Generator().manual_seed(0)
    torch.randn(600, 4, generator=generator)
    model = nn.Linear(4, classes, bias=False)
    model.weight.data = 3 * torch.randn(4, classes, generator=generator).T.contiguous()
    return model


def student(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def distill(out, **more):
    settings = {"engine": {"epochs": 3}, "optim": ADAM, "progress": "off", **more}
    return limbeck.distill(fitted(), student(), points(), out=out, **settings)


def weights(result):
    return [p.detach().clone() for p in result.roles.student.module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def test_a_run_leaves_what_the_report_needs(tmp_path):
    result = distill(tmp_path / "run", method="kd", temperature=2.0)
    found = metrics(result.out)
    assert found["task"] == "classification"
    assert found["primary"] == "top1"
    assert found["models"]["teacher"]["top1"] == 1.0
    assert found["models"]["student_before"]["top1"] < found["models"]["student"]["top1"]
    assert found["models"]["student"]["top1"] > 0.9
    assert found["models"]["student"]["parameters"] == 4 * 16 + 16 + 16 * 3 + 3
    assert found["models"]["student"]["bytes"] == 4 * found["models"]["student"]["parameters"]
    assert sum(found["data"].values()) == 600
    assert found["lineage"]["method"] == "kd"
    assert [c["chosen"] for c in found["candidates"]] == [True]
    assert (result.out / "report.html").stat().st_size > 10_000
    assert yaml.safe_load((result.out / "recipe.yaml").read_text())["method"] == {
        "name": "kd",
        "temperature": 2.0,
        "label_weight": 0.1,
    }


def test_numbers_are_those_of_the_saved_student_on_the_test_split(tmp_path):
    result = distill(tmp_path / "run")
    module = api.load(result.out, student(seed=7))
    data = load_data(points())
    scores, labels = predict(limbeck.Roles(student=module).student, data.test)
    assert (scores.argmax(1) == labels).float().mean() == pytest.approx(
        metrics(result.out)["models"]["student"]["top1"]
    )
    assert same(weights(result), list(load_student(result.out / "student", student(seed=9)).parameters()))


def test_called_again_it_is_finished_and_the_same(tmp_path):
    first = weights(distill(tmp_path / "run"))
    before = metrics(tmp_path / "run")["models"]
    again = distill(tmp_path / "run")
    assert same(first, weights(again))
    after = metrics(tmp_path / "run")["models"]
    assert after["teacher"] == before["teacher"]
    assert after["student_before"] == before["student_before"]
    assert after["student"]["top1"] == before["student"]["top1"]


def test_a_method_by_object_by_name_and_by_default_are_one(tmp_path):
    one = distill(tmp_path / "a", method=KD())
    two = distill(tmp_path / "b", method="kd")
    three = distill(tmp_path / "c")
    assert same(weights(one), weights(two))
    assert same(weights(one), weights(three))


def test_a_function_as_optimizer(tmp_path):
    made = []

    def sgd(module):
        made.append(torch.optim.SGD(module.parameters(), lr=0.1))
        return made[-1]

    distill(tmp_path / "run", optim={"student": sgd}, engine={"steps": 3})
    assert made


def test_the_teacher_and_the_global_generator_stay(tmp_path):
    teacher = fitted()
    before = [p.clone() for p in teacher.parameters()]
    limbeck.distill(teacher, student(), points(), out=tmp_path / "run", engine={"steps": 3}, progress="off")
    assert same(before, list(teacher.parameters()))


def test_unlabelled_data_are_judged_by_agreement(tmp_path):
    x, _ = points()
    result = limbeck.distill(
        fitted(), student(), x, out=tmp_path / "run", engine={"epochs": 5}, optim=ADAM, progress="off"
    )
    found = metrics(result.out)
    assert found["primary"] == "agreement"
    assert set(found["models"]["student"]) >= {"agreement", "teacher_kl"}
    assert "top1" not in found["models"]["student"]
    assert found["models"]["student"]["agreement"] > 0.8


def test_data_without_other_splits_are_trained_on_and_not_judged(tmp_path):
    result = limbeck.distill(
        fitted(),
        student(),
        Data(train=TensorSource(*points())),
        out=tmp_path / "run",
        engine={"steps": 2},
        progress="off",
    )
    found = metrics(result.out)
    assert found["primary"] == ""
    assert set(found["models"]["student"]) == {"parameters", "bytes", "throughput"}


class Counting(nn.Module):
    """A teacher that counts the samples it is asked about while gradients are possible or not."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = fitted(), 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


def test_a_cached_teacher_is_asked_once_and_teaches_the_same(tmp_path):
    data = load_data(points())
    plain = distill(tmp_path / "plain", engine={"epochs": 8})
    teacher = Counting()
    recipe = api.Recipe.parse(
        {
            "teacher": "a teacher",
            "student": "a student",
            "data": "points",
            "method": "kd",
            "engine": {"epochs": 8},
            "optim": ADAM,
            "cache": str(tmp_path / "store"),
            "out": str(tmp_path / "cached"),
        }
    )
    job = api.gather(recipe, teacher, student(), data, recipe.optim, None)
    teacher.seen = 0
    result = api.run(job, progress="off")
    held_out = len(data.validation) + len(data.test)
    measured = 6 * 32  # of its speed: one call to warm up, five timed
    assert teacher.seen == len(data.train) + held_out + measured
    assert metrics(result.out)["models"]["student"]["top1"] == pytest.approx(
        metrics(plain.out)["models"]["student"]["top1"], abs=0.03
    )


def test_a_budget_chooses_steps_once(tmp_path):
    first = distill(tmp_path / "run", budget="4s")
    steps = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["engine"]["steps"]
    assert steps >= 1
    assert first.history[-1]["step"] == steps
    again = distill(tmp_path / "run", budget="4s")
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["engine"]["steps"] == steps
    assert same(weights(first), weights(again))


def test_a_budget_does_not_change_what_the_steps_do(tmp_path):
    timed = distill(tmp_path / "timed", budget="3s")
    steps = yaml.safe_load((tmp_path / "timed" / "recipe.yaml").read_text())["engine"]["steps"]
    counted = distill(tmp_path / "counted", engine={"epochs": 3, "steps": steps})
    assert same(weights(timed), weights(counted))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2m", 120), ("1.5h", 5400), ("7", 7), (7, 7), (" 3 m ", 180)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


def test_another_run_in_the_folder_is_refused_and_left(tmp_path):
    distill(tmp_path / "run", temperature=2.0)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"another run[\s\S]*method.temperature"):
        distill(tmp_path / "run", temperature=3.0)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_settings_that_change_no_number_may_differ(tmp_path):
    distill(tmp_path / "run")
    distill(tmp_path / "run", engine={"epochs": 3, "keep": 5, "checkpoint_every": 7})


def test_fields_for_a_whole_method_are_refused(tmp_path):
    with pytest.raises(UsageError, match="takes no further fields"):
        distill(tmp_path / "run", method=KD(), temperature=3.0)


NET = """
import torch
from torch import nn

def teacher():
    torch.manual_seed(0)
    return nn.Linear(4, 3)

def student(num_classes):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, num_classes))

def data():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    return x, x.argmax(1) % 3
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "teacher: net.py:teacher\nstudent: net.py:student\ndata: net.py:data\nmethod: kd\nengine: {epochs: 2}\nout: run\n"
    )
    return file


def test_a_recipe_runs_and_its_record_goes_on(recipe, tmp_path):
    first = api.run(recipe, progress="off")
    assert first.out == tmp_path / "run"
    recorded = first.out / "recipe.yaml"
    again = api.run(recorded, progress="off")
    assert again.out.resolve() == first.out.resolve()
    assert same(weights(first), weights(again))


def test_the_same_seed_makes_the_same_student(recipe):
    one, two = (api.build(recipe).roles.student.module for _ in range(2))
    assert same(list(one.parameters()), list(two.parameters()))


def test_building_draws_nothing_from_the_global_generator(recipe):
    torch.manual_seed(5)
    expected = torch.rand(1)
    parsed, teacher, data = api.Recipe.load(recipe), fitted(), points()
    torch.manual_seed(5)
    api.gather(parsed, teacher, parsed.student, data, {}, None)
    assert torch.equal(torch.rand(1), expected)
    assert not (recipe.parent / "run").exists()


def test_several_teachers_are_an_ensemble(recipe):
    recipe.write_text(recipe.read_text().replace("net.py:teacher", "[net.py:teacher, net.py:teacher]"))
    job = api.build(recipe)
    assert type(job.roles.teacher.module).__name__ == "Ensemble"
    assert "top1" in api.run(job, progress="off").metrics


def test_export_writes_onnx_of_the_saved_student(recipe):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = api.run(recipe, progress="off")
    with pytest.raises(UsageError, match="trust=True"):
        export(result.out)
    found = export(result.out, trust=True)
    assert found.onnx.path == str(result.out / "student" / "model.onnx")
    assert found.onnx.max_rel_error < 1e-4
    assert found.deployed is None


def test_export_in_the_form_in_which_it_runs(recipe):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torchao")
    result = api.run(recipe, progress="off")
    found = export(result.out, trust=True, to="int8-weight")
    assert found.onnx.path == str(result.out / "student" / "model-int8-weight.onnx")
    assert found.deployed.layers > 0
    assert found.before == pytest.approx(Finished.open(result.out, trust=True).judge(result.roles.student.module))
    assert found.after["top1"] == pytest.approx(found.before["top1"], abs=0.05)
    with pytest.raises(UsageError, match="not 2:4"):
        export(result.out, trust=True, to="2:4")
    (result.out / "recipe.yaml").unlink()
    again = export(result.out, trust=True, to="int8-weight")  # without the data, outputs alone are compared
    assert again.before == {}
    assert "does not say what its data are" in again.unjudged
    assert again.deployed.relative_difference < 0.02


def test_a_runs_own_recipe_goes_on_from_where_it_began(recipe, tmp_path, monkeypatch):
    place = recipe.parent / "code"
    place.mkdir()
    (recipe.parent / "net.py").rename(place / "net.py")
    monkeypatch.chdir(recipe.parent)
    recipe.write_text(recipe.read_text().replace("net.py", "code/net.py"))
    out = api.run(api.Recipe.load(recipe.name), progress="off").out
    assert api.run(api.Recipe.load(out / "recipe.yaml"), progress="off").metrics


def test_methods_are_cards():
    assert set(api.methods()) == set(registry.METHODS)


def letters(texts):
    return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_texts_get_the_tokenizer_of_the_student():
    class Reader(nn.Module):
        def __init__(self, tokenizer):
            super().__init__()
            self.tokenizer = tokenizer

    from limbeck.job import tokenised

    texts = Data(train=TextSource(["ab", "c"]))
    read, taught = tokenised(texts, Reader(letters), Reader(letters))
    assert taught is None
    assert read.train.batch(torch.tensor([0]), 0).x["input_ids"].tolist() == [[97, 98]]
    upper = lambda texts: letters([text.upper() for text in texts])  # noqa: E731
    read, taught = tokenised(texts, Reader(upper), Reader(letters))
    assert read.train.batch(torch.tensor([0]), 0).x["input_ids"].tolist() == [[97, 98]]
    assert taught.train.batch(torch.tensor([0]), 0).x["input_ids"].tolist() == [[65, 66]]
    assert taught.train.ids.equal(read.train.ids)


def test_a_budget_for_a_run_without_one_changes_nothing(tmp_path):
    one = distill(tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    again = distill(tmp_path / "run", budget="1s")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    assert same(weights(one), weights(again))


def test_libraries_models_on_a_folder_of_images(tmp_path):
    image, timm = pytest.importorskip("PIL.Image"), pytest.importorskip("timm")
    for k, name in enumerate("abc"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            image.new("RGB", (32, 32), (80 * k, i, 40)).save(tmp_path / "images" / name / f"{i}.png")
    weights_file = tmp_path / "teacher.pt"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), weights_file)
    result = limbeck.distill(
        f"timm:test_resnet@{weights_file}",
        "timm:test_efficientnet",
        {"spec": tmp_path / "images", "image_size": 32, "views": 1},
        "pld",
        out=tmp_path / "run",
        engine={"steps": 2, "batch_size": 8},
        pretrained=False,
        progress="off",
    )
    assert result.roles.student.preprocess is not None
    found = metrics(result.out)
    assert found["lineage"]["input"] == {"x": ["float32", 3, 32, 32]}
    again = limbeck.load(result.out)
    assert same(weights(result), list(again.parameters()))
