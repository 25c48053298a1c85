"""FTD and MTT: what experts are like, what is delivered, and a set that is better than where it began."""

from dataclasses import replace

import pytest
import torch

import limbeck
from limbeck import Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.core.optim import Ema
from limbeck.data import Data, TensorSource
from limbeck.data.condensed import Condensed, from_source
from limbeck.engine.run import execute
from limbeck.evaluate.condensation import Training, protocol
from limbeck.methods.ftd.method import FTD
from limbeck.nn.convnet import ConvNet
from limbeck.nn.mlp import mlp
from limbeck.optim.unroll import flatten
from limbeck.prove import seeded
from limbeck.teachers.trajectories import Segments, Trajectories, train_experts

FAST = FTD(experts=3, epochs=4, expert_lr=0.1, expert_batch_size=16, student_steps=5, starts=3, step_size=0.05, ema=0.0)


def source(n=90):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return TensorSource(2 * torch.eye(6)[y] + 0.8 * torch.randn(n, 6, generator=g), y)


def network():
    return seeded(0, lambda: mlp(6, 12, 3))


def roles(images=2):
    return Roles(teacher=network(), student=from_source(source(), images))


def run(method, m, steps=20, **engine):
    settings = Engine(steps=steps, batch_size=3, device="cpu", log_every=1, evaluate_every=0, **engine)
    return execute(method, m, Data(train=source()), settings, optim={"student": Optim("sgd", lr=2.0, momentum=0.5)})


def test_flat_experts_are_less_sharp(tmp_path):
    """The loss rises less around their ends, where plain ones do as well on the data."""
    data, rise = source(), {}
    x, y = data.x, data.labels
    for name, method in (
        ("plain", FTD(**{**vars(FAST), "radius": 0.0})),
        ("flat", FTD(**{**vars(FAST), "radius": 0.5})),
    ):
        training = method.expert_training
        train_experts(network(), data, tmp_path / name, training)
        experts = Trajectories(tmp_path / name, network(), training)
        from limbeck.optim.unroll import call_flat

        net, rises = network(), []
        for k in range(3):
            w = experts(k, 4)
            at = w.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(call_flat(net, at, x), y)
            (g,) = torch.autograd.grad(loss, at)
            far = torch.nn.functional.cross_entropy(call_flat(net, w + 0.3 * g / g.norm(), x), y)
            rises.append(float((far - loss).detach()))
        rise[name] = sum(rises) / 3
    assert rise["flat"] < rise["plain"]


def test_the_loss_falls_and_the_set_teaches_better():
    before = from_source(source(), 1)
    m = roles(1)
    result = run(FAST, m, steps=120)
    losses = [row["train/loss/student"] for row in result.history if "train/loss/student" in row]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    how = Training(60, optim=Optim("sgd", lr=0.1, momentum=0.9))
    scores = [sum(protocol(s, source(), {"": network}, how)[""]) for s in (before, m.student.module)]
    assert scores[1] > scores[0]


def test_experts_are_drawn_by_the_seed_of_the_run(tmp_path):
    ends = []
    for seed in (0, 0, 1):
        m = roles()
        m.seed = seed
        stage = next(FAST.trained(m, Data(train=source())))
        (tmp_path / str(len(ends))).mkdir()
        stage.make(m, tmp_path / str(len(ends)))
        experts = Trajectories(tmp_path / str(len(ends)), network(), replace(FAST.expert_training, seed=seed))
        ends.append(experts(0, 4))
    assert ends[0].equal(ends[1])
    assert not ends[0].allclose(ends[2])


def test_the_average_is_what_is_delivered():
    m = roles()
    run(FTD(**{**vars(FAST), "ema": 0.9}), m)
    assert m.student.module.x.equal(m.student_average.module.x)
    plain = roles()
    run(FAST, plain)
    assert not plain.student.module.x.equal(m.student.module.x)


def test_an_average_has_a_closed_form():
    one, two = (Condensed(torch.full((1, 2), v), torch.tensor([0])) for v in (0.0, 1.0))
    ema = Ema("student", 0.9)
    for k in range(5):
        ema.move(one, two, k)
    assert one.x[0, 0].item() == pytest.approx(1 - 0.9**5)


def test_the_step_size_has_a_rate_of_its_own_and_stays_above_zero():
    m = roles()
    m.student = FAST.begun(m)
    groups = FAST.optimizer(m, "student", Optim("sgd", lr=2.0)).param_groups
    rates = {tuple(group["params"][0].shape): group["lr"] for group in groups}
    assert rates[()] == pytest.approx(1e-5)
    assert rates[(6, 6)] == 2.0
    m.student.module.step_size.data.fill_(-1.0)
    FAST.after_update(m, "student")
    assert m.student.module.step_size > 0
    kept = roles()
    run(FTD(**{**vars(FAST), "step_size_lr": 0.0}), kept, steps=3)
    assert kept.student.module.step_size.item() == pytest.approx(0.05)


def test_gradients_reach_samples_and_step_size_alone():
    m = roles()
    m.student = FAST.begun(m)
    start = flatten([p.detach() for p in network().parameters()])
    way = torch.randn(len(start), generator=torch.Generator().manual_seed(0))
    update = FAST.follow(lambda k, epoch: start + 0.02 * epoch * way, m, Segments(3, 3).batch(torch.tensor([0, 4]), 0))
    assert update.role == "student"
    update.loss.backward()
    student = m.student.module
    assert student.x.grad.abs().sum() > 0
    assert student.step_size.grad != 0
    assert all(p.grad is None for p in m.teacher.module.parameters())


@pytest.mark.parametrize("fields", [
    {"experts": 0}, {"epochs": 0}, {"student_steps": 0}, {"radius": -0.1}, {"gsam_alpha": -1.0}, {"step_size": 0.0},
    {"step_size_lr": -1.0}, {"ema": 1.0}, {"form": "half"}, {"starts": 0},
])  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        FTD(**fields)


def test_samples_without_value_are_refused_before_experts_are_trained(monkeypatch):
    bad, trained = source(), []
    monkeypatch.setattr("limbeck.methods.trajectory_matching.train_experts", lambda *given: trained.append(given))
    bad.x[7, 2] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite") as error:
        execute(FAST, roles(), Data(train=bad), Engine(steps=1, device="cpu"), optim={"student": Optim("sgd", lr=1.0)})
    assert "1 samples, first 7" in str(error.value)
    assert not trained


def test_models_that_do_not_fit():
    batch = source().batch(torch.arange(2), 0)
    with pytest.raises(UsageError, match="weights alone"):
        FTD().check(Roles(teacher=ConvNet(3, 1, 8, 4, 2, norm="batch"), student=from_source(source(), 1)), batch)
    with pytest.raises(UsageError, match="no condensed set"):
        FTD().check(Roles(teacher=network(), student=network()), batch)
    with pytest.raises(UsageError, match="too few epochs"):
        FTD(epochs=5, starts=5).check(roles(), batch)


def test_experts_of_an_earlier_run_are_taken_and_others_refused_before_any_work(tmp_path):
    """Kept by the first run, taken by the second with another seed, refused for another network, training or data."""
    kept = replace(FAST, buffer=str(tmp_path / "experts"))
    first = run(kept, roles(), steps=2, seed=0)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "experts").iterdir()}
    assert len(times) == 7
    second = run(kept, roles(), steps=2, seed=1)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "experts").iterdir()} == times
    assert (first.results[0].value.get("reused"), second.results[0].value["reused"]) == (None, True)
    alone = run(FAST, roles(), steps=2, seed=0)
    assert alone.roles.student(None).equal(first.roles.student(None))
    optim, engine = {"student": Optim("sgd", lr=1.0)}, {"steps": 2, "device": "cpu"}
    other = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    shifted = TensorSource(source().x + 1, source().labels)
    for name, net, method, data, words in (
        ("net", other, kept, source(), "another architecture"),
        ("way", network(), replace(kept, expert_lr=0.2), source(), "another way"),
        ("few", network(), replace(kept, experts=9), source(), "too few experts"),
        ("data", network(), kept, shifted, "other data"),
    ):
        with pytest.raises(UsageError, match=words):
            limbeck.distill(
                net, "condensed:2", Data(train=data), method, out=tmp_path / name, optim=optim, engine=engine
            )
        assert not (tmp_path / name).exists()
