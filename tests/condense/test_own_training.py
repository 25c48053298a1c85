"""A run on a condensed set learns what the set holds, and is judged by held-out samples."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.core.errors import UsageError
from limbeck.data import load_data
from limbeck.data.augment import Views
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.graphs import motifs
from limbeck.data.lessons import Lessons
from limbeck.evaluate.condensation import SGD, Training, fresh, train_on
from limbeck.evaluate.graphs import judge_graphs
from limbeck.methods.mirage.method import Mirage
from limbeck.nn.gnn import GNN
from limbeck.nn.mlp import mlp

RUN = {"engine": {"steps": 30, "device": "cpu"}, "progress": "off"}
WITHOUT = pytest.mark.filterwarnings("ignore:.*no samples to judge by")


def made(tmp_path, small, data="digits"):
    """A set in the folder of a run that says what its data were."""
    small.save(tmp_path / "made" / "student")
    (tmp_path / "made" / "recipe.yaml").write_text(yaml.safe_dump({"data": data}))
    return f"condensed:{tmp_path / 'made'}"


def blobs(classes=3, n=12, **more):
    torch.manual_seed(0)
    return Condensed(torch.randn(n, 4), torch.arange(n) % classes, **more)


@WITHOUT
@pytest.mark.parametrize("soft", ["views", "mixed"])
def test_a_run_is_the_sets_own_training(soft, tmp_path):
    """Tables of views are gone through, and static labels mixed, as `condensed.train` does: to the same weights."""
    how = {"batch_size": 5, "operations": [], "mixing": "mixup", "alpha": 0.8}
    info = {"views" if soft == "views" else "training": how, "temperature": 2.0}
    small = blobs(soft=torch.randn(*((2,) if soft == "views" else ()), 12, 3), info=info)
    small.save(tmp_path / "set")
    start = mlp(4, 8, 3)
    by_hand = small.train(fresh(start, 1), steps=30)
    plain = train_on(small, fresh(start, 1), steps=30)
    found = limbeck.distill(None, fresh(start, 1), f"condensed:{tmp_path / 'set'}", out=tmp_path / "net", **RUN)
    for a, b in zip(found.roles.student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert by_hand[0].weight.equal(plain[0].weight) == (soft == "views")  # sets are compared without their own mixing


@WITHOUT
def test_soft_labels_are_learned_where_class_numbers_say_otherwise(tmp_path):
    y = torch.arange(12) % 3
    small = Condensed(3 * torch.eye(4)[y], y, soft=8 * nn.functional.one_hot((y + 1) % 3, 3).float())
    small.save(tmp_path / "set")
    data = f"condensed:{tmp_path / 'set'}"
    how = RUN | {"engine": {"steps": 200, "device": "cpu"}, "optim": {"student": {"lr": 0.05}}}
    soft = limbeck.distill(None, nn.Linear(4, 3), data, out=tmp_path / "a", **how).roles.student
    name = "limbeck.evaluate.own_training:OwnTraining"
    hard = limbeck.distill(None, nn.Linear(4, 3), data, name, labels="hard", out=tmp_path / "b", **how).roles.student
    assert soft(small.x).argmax(1).tolist() == ((y + 1) % 3).tolist()
    assert hard(small.x).argmax(1).tolist() == y.tolist()
    with pytest.warns(UserWarning, match="not the set's soft labels"):
        limbeck.distill(None, nn.Linear(4, 3), data, "limbeck.evaluate.baselines:Supervised", out=tmp_path / "c", **how)
    with pytest.raises(UsageError, match="no condensed set"):
        limbeck.distill(
            None, nn.Linear(4, 3), (torch.rand(60, 4), torch.arange(60) % 3), name, out=tmp_path / "d", **how
        )


def test_a_learned_step_size_is_the_rate():
    small, start = blobs(step_size=0.3), mlp(4, 8, 3)
    own, by_hand, compared, given = (
        small.train(fresh(start, 1), steps=5),
        train_on(small, fresh(start, 1), steps=5, optim=replace(SGD, lr=small.step_size.item())),
        train_on(small, fresh(start, 1), steps=5),
        small.train(fresh(start, 1), steps=5, optim=SGD),
    )
    assert own[0].weight.equal(by_hand[0].weight)
    assert not own[0].weight.equal(compared[0].weight)
    assert given[0].weight.equal(compared[0].weight)


def test_the_command_line_trains_and_judges(tmp_path, monkeypatch):
    """The data of the run that made the set are found; the recipe says steps and rate, and `limbeck run` takes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    digits = load_data("digits")
    start = from_source(digits.train, 5)
    data = made(tmp_path, Condensed(start.x, start.y, step_size=0.05, info=start.info))
    call = ["distill", "--data", data, "--student", "net.py:net", "--out", "run", "--device", "cpu"]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["models"]["student"]["top1"] > 0.75 > metrics["models"]["student_before"]["top1"]
    assert metrics["data"] == {"train": 50, "test": len(digits.test)}
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["engine"]["steps"] == Training.steps
    assert recipe["optim"]["student"]["lr"] == pytest.approx(0.05)
    again = CliRunner().invoke(app, [*call[:-4], "--dry-run", "--set", "engine.epochs=3"])
    assert yaml.safe_load(again.output)["engine"]["steps"] is None


def test_graphs_are_trained_on_and_judged(tmp_path):
    small = Mirage(depth=2, threshold=0.6).condense(motifs(100, noise=0.0))
    small.save(tmp_path / "sets")
    (tmp_path / "graphs.py").write_text(
        "from limbeck.data.graphs import motifs\ndef held(): return motifs(60, 0.0, seed=9)\n"
    )
    data = {
        "spec": f"condensed:{tmp_path / 'sets'}",
        "held_out": f"{tmp_path / 'graphs.py'}:held",
        "validation": 0.0,
        "test": 0.0,
    }
    torch.manual_seed(0)
    network = GNN("gin", labels=5, classes=2, layers=2)
    found = limbeck.distill(
        None, network, data, out=tmp_path / "run", engine={"steps": 150, "device": "cpu"}, progress="off"
    )
    metrics = json.loads((found.out / "metrics.json").read_text())
    assert metrics["data"] == {"train": len(small), "test": 60}
    assert "top1" in metrics["models"]["student"]
    # A readout by the mean of roots is high or low as a whole for graphs: their order is what is learned for certain.
    assert judge_graphs(found.roles.student.module, motifs(60, 0.0, seed=9))["auc"] > 0.9


@pytest.mark.parametrize(("data", "held", "words"), [
    ("digits", "iris", "another form"),
    ("digits", {"held": "graphs"}, "another kind"),
])  # fmt: skip
def test_held_out_samples_that_do_not_fit(data, held, words, tmp_path):
    spec = made(tmp_path, from_source(load_data(data).train, 1))
    if isinstance(held, dict):
        (tmp_path / "g.py").write_text("from limbeck.data.graphs import motifs\ndef held(): return motifs(60)\n")
        held = f"{tmp_path / 'g.py'}:held"
    with pytest.raises(UsageError, match=words):
        load_data(spec, held_out=held)


def test_code_that_a_folder_names_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit\n")
    spec = made(tmp_path, blobs(), f"{tmp_path / 'evil.py'}:data")
    with pytest.warns(UserWarning, match="not run unasked"):
        assert list(load_data(spec)) == ["train"]
    with pytest.warns(UserWarning, match="cannot be read"):
        assert list(load_data(made(tmp_path, blobs(), "nowhere.csv"))) == ["train"]
    with pytest.raises(UsageError, match="a test split of their own"):
        load_data("digits", held_out="digits")


def test_batches_are_a_function_of_the_step():
    lessons = Lessons(torch.rand(7, 3), torch.randn(2, 7, 4), Views(3))
    whole = [lessons(step) for step in range(len(lessons) * 3)]
    assert sorted(torch.cat([b.id for b in whole[: len(lessons)]]).tolist()) == list(range(7))
    late = Lessons(lessons.x, lessons.targets, lessons.views)(len(lessons) * 2 + 1)
    assert late.id.equal(whole[len(lessons) * 2 + 1].id)
    assert late.id.equal(whole[1].id)  # the tables are at an end, and begin anew
    assert late.target.equal(lessons.targets[0][late.id])
