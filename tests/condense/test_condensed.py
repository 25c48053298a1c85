"""Condensed sets: what they hold, back from a folder, trained on, judged, and made by a run."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import limbeck
from limbeck import Engine, Method, Optim, Roles, Train
from limbeck.cli.show import outcome
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource, load_data
from limbeck.data.augment import Views
from limbeck.data.condensed import Condensed, from_source, per_class
from limbeck.evaluate.condensation import Condensation, Training, fresh, protocol, train_on
from limbeck.finished import export
from limbeck.nn.convnet import ConvNet
from limbeck.nn.mlp import mlp
from limbeck.teachers.fingerprint import fingerprint

FAST = Training(40, optim=Optim(lr=0.05))


def source(n=60, classes=3, dim=4):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    return TensorSource(3 * torch.eye(dim)[y] + 0.3 * torch.randn(n, dim, generator=g), y)


def shared():
    """Two images of each of two classes, one compensator."""
    x, u = torch.rand(4, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    composed = torch.tensor([[0, -1], [1, -1], [2, -1], [3, -1], [0, 0], [3, 0]])
    y = torch.tensor([0, 0, 1, 1, 0, 1])
    return Condensed(
        x, y, compensators=u, composed=composed, learn=("compensators",), info={"clip": [0.0, 1.0]},
        soft=torch.randn(6, 2),
    )  # fmt: skip


def test_samples_are_composed_and_clipped_and_gradients_reach_what_learns():
    small = shared()
    found = small()
    assert found[:4].equal(small.x)
    assert found[4].equal((small.x[0] + 0.5).clamp(0, 1))
    assert small(torch.tensor([5, 0])).equal(found[[5, 0]])
    small(torch.tensor([4, 5])).sum().backward()
    inside = sum((small.x[k] + 0.5 <= 1).float() for k in (0, 3))
    assert small.compensators.grad[0].equal(inside)
    assert small.x.grad is None


def test_each_channel_has_its_own_ends():
    clip = [[0.0, -1.0], [1.0, 0.0]]
    small = Condensed(torch.zeros(1, 2, 1, 1), torch.tensor([0]), info={"clip": clip})
    assert small.clipped(torch.full((1, 2, 1, 1), 5.0)).flatten().tolist() == [1.0, 0.0]


def test_it_comes_back_from_a_folder_and_its_size_is_that_of_the_file(tmp_path):
    small = shared()
    small.save(tmp_path)
    again = Condensed.load(tmp_path)
    assert again().equal(small())
    assert again.soft.equal(small.soft)
    assert again.info == small.info
    assert [n for n, p in again.named_parameters() if p.requires_grad] == ["compensators"]
    assert small.bytes() == {"x": 64, "y": 6, "soft": 48, "compensators": 16, "composed": 48}
    assert sum(small.bytes().values()) <= (tmp_path / "condensed.safetensors").stat().st_size
    with pytest.warns(UserWarning, match="no samples to judge by"):
        read = load_data(f"condensed:{tmp_path}").train
    assert read.batch(torch.tensor([5, 0]), 0).soft.equal(small.soft[[5, 0]])
    assert read.batch(torch.arange(6), 0).x.equal(small().detach())
    (tmp_path / "condensed.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="damaged"):
        Condensed.load(tmp_path)


def test_other_libraries_read_it():
    pytest.importorskip("datasets")
    small = shared()
    x, y, soft = small.dataset()[4]
    assert soft.equal(small.soft[4])
    assert len(Condensed(small.x, torch.arange(4)).dataset()[0]) == 2
    views = Condensed(torch.rand(3, 2), torch.arange(3), soft=torch.rand(5, 3, 4))  # [E, N, C]
    assert views.dataset()[1][2].equal(views.soft[:, 1])
    assert torch.tensor(views.hf()[2]["soft_label"]).equal(views.soft[:, 2])
    table = small.hf()
    assert torch.tensor(table[4]["x"]).equal(x)
    assert table[4]["label"] == y
    assert table.column_names == ["x", "label", "soft_label"]


@pytest.mark.parametrize("part", ["x", "soft", "compensators", "step_size"])
def test_numbers_that_are_not_finite_are_neither_made_nor_saved_nor_read(part, tmp_path, monkeypatch):
    small = shared()
    parts = {"soft": small.soft, "compensators": small.compensators, "step_size": torch.tensor(0.1)}
    small = Condensed(small.x, small.y, composed=small.composed, **parts)
    with torch.no_grad():
        getattr(small, part).view(-1)[0] = float("nan")
    with pytest.raises(UsageError, match="NaN") as refused:
        small.save(tmp_path / "a")
    assert refused.value.where == f"condensed.{part}"
    assert not (tmp_path / "a" / "condensed.json").exists()
    monkeypatch.setattr("limbeck.data.condensed._check_finite", lambda parts: None)
    small.save(tmp_path / "b")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="NaN"):
        Condensed.load(tmp_path / "b")


def test_random_samples_of_each_class():
    data = source()
    small = from_source(data, 4, seed=1)
    rows = per_class(data, 4, seed=1)
    assert small.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert small().equal(data.x[rows])
    turned = data.subset(torch.arange(59, -1, -1))
    assert set(turned.ids[per_class(turned, 4, seed=1)].tolist()) == set(data.ids[rows].tolist())
    assert not small().equal(from_source(data, 4, seed=2)())
    assert from_source(data, 4, noise=True)().mean().abs() < 0.5


@pytest.mark.parametrize(("make", "words"), [
    (lambda: from_source(source(), 21), "too few samples"),
    (lambda: from_source(source(), 0), "out of range"),
    (lambda: from_source(TensorSource(torch.rand(4, 2)), 1), "needs labels"),
    (lambda: Condensed(torch.full((1, 2), float("nan")), torch.tensor([0])), "NaN"),
    (lambda: Condensed(torch.zeros(2, 2), torch.tensor([0])), "differ in number"),
    (lambda: Condensed(torch.zeros(1, 2), torch.tensor([0]), soft=torch.zeros(2, 3)), "differ in number"),
    (lambda: train_on(from_source(source(), 1), nn.Linear(4, 3), labels="soft"), "no soft labels"),
    (lambda: Condensed.load("/nowhere"), "no condensed"),
])  # fmt: skip
def test_what_does_not_fit(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_a_training_is_a_function_of_its_seed():
    small = from_source(source(), 3)
    one, two, other = (train_on(small, fresh(mlp(4, 8, 3), 0), FAST, seed=s, views=Views(4)) for s in (0, 0, 1))
    assert one[0].weight.equal(two[0].weight)
    assert not one[0].weight.equal(other[0].weight)


def test_replayed_labels_are_those_of_the_views_that_are_seen():
    """A linear teacher that labels every view is learned to the end by a student of its kind, mixing and all."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    views = Views(batch_size=4, operations=("flip", "shift"), mixing="cutmix", seed=5)
    x = torch.rand(9, 1, 4, 4)
    soft = torch.zeros(2, 9, 3)
    for epoch in range(2):
        for rows, see in views.epoch(epoch, 9):
            soft[epoch, rows] = teacher(see(x[rows])[0]).detach()
    info = {"views": {"batch_size": 4, "operations": ["flip", "shift"], "mixing": "cutmix", "seed": 5}}
    small = Condensed(x, torch.arange(9) % 3, soft=soft, info=info)
    student = fresh(teacher, 3)
    trained = train_on(small, student, Training(600, optim=Optim("sgd", lr=1.0)), seed=7)
    for rows, see in views.epoch(1, 9):
        seen = see(x[rows])[0]
        a, b = trained(seen), teacher(seen)
        torch.testing.assert_close(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), atol=0.02, rtol=0.1)


def test_parts_of_a_batch_have_statistics_of_their_own_in_a_training():
    """One step on a whole batch by hand, half after half; a set that says so is shown so where its labels are trained on."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    start = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optim = Optim("sgd", lr=0.5)
    told = Condensed(x, y, soft=torch.randn(1, 8, 3), info={"label_parts": 2, "views": {"batch_size": 8}})
    ((rows, _),) = Views(8).epoch(0, 8)
    by_hand = copy.deepcopy(start).train()
    logits = torch.cat([by_hand(half) for half in x[rows].chunk(2)])
    (-(told.soft[0][rows].softmax(1) * logits.log_softmax(1)).sum(1).mean()).backward()
    expected = by_hand[0].weight.detach() - 0.5 * by_hand[0].weight.grad
    halves = train_on(told, copy.deepcopy(start), steps=1, optim=optim)
    torch.testing.assert_close(halves[0].weight.detach(), expected)
    whole = train_on(told, copy.deepcopy(start), steps=1, optim=optim, parts=1)
    assert not whole[0].weight.allclose(expected, atol=1e-5)
    plain, one = (train_on(told, copy.deepcopy(start), steps=1, optim=optim, labels="hard", parts=p) for p in (None, 1))
    assert plain[0].weight.equal(one[0].weight)


def test_several_networks_several_times():
    data = source()
    networks = {"linear": lambda: nn.Linear(4, 3), "mlp": lambda: mlp(4, 8, 3)}
    found = protocol(from_source(data, 5), data, networks, FAST, trainings=2)
    assert {name: len(scores) for name, scores in found.items()} == {"linear": 2, "mlp": 2}
    assert min(found["linear"]) > 0.9


def test_fresh_weights_leave_the_network_as_it_was():
    m = Roles(teacher=ConvNet(3, 1, 8, 4, 2, norm="batch"))
    m.freeze("teacher")
    before = {k: v.clone() for k, v in m.teacher.state_dict().items()}
    new = fresh(m.teacher.module, 1)
    assert new.training
    assert all(p.requires_grad for p in new.parameters())
    assert not new.classifier.weight.equal(m.teacher.classifier.weight)
    assert all(v.equal(before[k]) for k, v in m.teacher.state_dict().items())
    assert not m.teacher.module.train().training

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

    with pytest.raises(UsageError, match="cannot be drawn again"):
        fresh(Own())


@dataclass(frozen=True)
class Means(Method):
    """Each sample moves to the mean of its class."""

    logits: ClassVar[tuple[str, ...]] = ("teacher",)
    reads: ClassVar[tuple[str, ...]] = ("teacher",)

    def stages(self, m, data):
        yield Train(self.step, roles={"student": None}, frozen=("teacher",), data=data.train)

    def step(self, m: Roles, batch: Batch):
        x, y = m.student(None), m.student.module.y
        means = torch.stack([batch.x[batch.y == k].mean(0) for k in range(3)])
        return (x - means[y]).square().mean()


def test_a_run_makes_judges_and_saves_one(tmp_path, capsys):
    data = source(300)
    splits = Data(train=data.subset(range(240)), test=data.subset(range(240, 300)))
    teacher = train_on(from_source(data, 50), mlp(4, 8, 3), FAST)
    result = limbeck.distill(
        teacher, "condensed:2", splits, Means(), out=tmp_path / "run", progress="off",
        engine=Engine(steps=80, batch_size=60, device="cpu"), optim={"student": Optim(lr=0.1)},
    )  # fmt: skip
    small = Condensed.load(tmp_path / "run")
    assert small().equal(result.roles.student(None))
    torch.testing.assert_close(small()[0].detach(), 3 * torch.eye(4)[0], atol=0.5, rtol=0.1)
    assert limbeck.load(tmp_path / "run")().equal(small())
    info = small.info["made"]
    assert (info["fields"], info["seed"], info["data"]) == ({}, 0, splits.train.fingerprint())
    assert info["method"].endswith(":Means")
    assert info["teachers"] == {"teacher": fingerprint(result.roles.teacher)}
    assert ":Means, seed 0, limbeck" in repr(small)
    assert info["data"] in (tmp_path / "run" / "report.html").read_text()
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert '"data-set condensation"' in text
    assert '"student_before"' in text
    outcome(tmp_path / "run")
    assert f"next     limbeck distill --data condensed:{tmp_path / 'run'} " in capsys.readouterr().out
    with pytest.raises(UsageError, match="no graph"):
        export(tmp_path / "run")
    again = limbeck.distill(
        None, mlp(4, 8, 3), f"condensed:{tmp_path / 'run'}", out=tmp_path / "net", progress="off",
        engine=Engine(epochs=30, batch_size=6, device="cpu"), optim={"student": Optim(lr=0.05)},
    )  # fmt: skip
    test = splits.test.batch(torch.arange(60), 0)
    assert (again.roles.student(test).argmax(1) == test.y).float().mean() > 0.9


def test_a_run_is_judged_by_networks_of_the_teachers_kind():
    data = source()
    m = Roles(teacher=mlp(4, 8, 3), student=from_source(data, 5))
    numbers = Condensation(data, training=FAST, trainings=2).judge(m, "student")
    assert numbers["top1"] > 0.8
    assert Condensation(data).judge(m, "teacher")["top1"] < 0.8
