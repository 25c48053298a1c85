"""AST: its parts one by one, and that without them it is trajectory matching."""

import math

import pytest
import torch

from limbeck import Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.condensed import from_source
from limbeck.engine.run import execute
from limbeck.methods.ast.method import AST, balance, perturb
from limbeck.methods.ftd.method import FTD
from limbeck.nn.convnet import ConvNet
from limbeck.prove import seeded
from limbeck.teachers.trajectories import ExpertTraining, Segments, Trajectories, train_experts

SIZES = {"experts": 2, "epochs": 4, "expert_batch_size": 12, "student_steps": 4, "starts": 3, "step_size": 0.05}
BARE = AST(**SIZES, momentum=0.0, perturbation=0.0, balanced=False, intermediate="none", init="real")


def source(n=36):
    g = torch.Generator().manual_seed(0)
    return TensorSource(torch.rand(n, 1, 4, 4, generator=g), torch.arange(n) % 3)


def network():
    return seeded(0, lambda: ConvNet(3, 1, 4, 4, 1))


def roles(images=1):
    m = Roles(teacher=network(), student=from_source(source(), images))
    m.student = FTD(**SIZES).begun(m)
    return m


@pytest.fixture
def experts(tmp_path):
    training = ExpertTraining(2, 4, 0.1, batch_size=12)
    train_experts(network(), source(), tmp_path, training)
    return Trajectories(tmp_path, network(), training)


def batch():
    return Segments(2, 3).batch(torch.tensor([1, 5]), 0)


def gradient(method, experts):
    m = roles()
    loss = method.follow(experts, m, batch()).loss
    return loss, torch.autograd.grad(loss, m.student.module.x)[0]


def test_without_its_parts_it_is_trajectory_matching(experts):
    for a, b in zip(gradient(BARE, experts), gradient(FTD(**SIZES), experts), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("part", [
    {"momentum": 0.9}, {"perturbation": 1.0}, {"balanced": True}, {"intermediate": "agg"}, {"intermediate": "adaptive"},
])  # fmt: skip
def test_each_part_changes_it_and_both_forms_agree(part, experts):
    plain, changed = gradient(BARE, experts), gradient(AST(**{**vars(BARE), **part}), experts)
    assert not torch.allclose(plain[1], changed[1], rtol=1e-3)
    full = gradient(AST(**{**vars(BARE), **part, "form": "full"}), experts)
    torch.testing.assert_close(full[1], changed[1], rtol=1e-3, atol=1e-6)


def test_the_balance_jumps_in_the_middle_and_is_even_about_it():
    assert balance(5, 5) == pytest.approx(math.log(8, 5))
    assert balance(4, 5) == pytest.approx(1 / math.log(9, 5))
    for away in range(1, 5):
        assert balance(5 + away, 5) * balance(5 - away, 5) == pytest.approx(1.0)


def test_the_perturbation_is_of_convolutions_and_has_a_size():
    net = network()
    shapes = [p.shape for p in net.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()]) + 0.5
    moved = perturb(flat, torch.tensor([3]), shapes, 0.7)
    sizes = [s.numel() for s in shapes]
    for before, after, shape in zip(flat.split(sizes), moved.split(sizes), shapes, strict=True):
        if len(shape) == 4:
            assert ((after - before) / before).norm().item() == pytest.approx(0.7, rel=1e-3)
        else:
            assert after.equal(before)
    assert perturb(flat, torch.tensor([3]), shapes, 0.0).equal(flat)
    assert not moved.equal(perturb(flat, torch.tensor([4]), shapes, 0.7))


def test_weights_on_the_way():
    assert AST(expert_epochs=1).weights == ()
    assert AST(expert_epochs=2).weights == (0.5,)
    assert AST(expert_epochs=3, intermediate="agg").weights == (1.0, 1.0)
    assert AST(expert_epochs=3, intermediate="none").weights == ()


@pytest.mark.parametrize("init", ["real", "medoids"])
def test_a_run(init):
    m = Roles(teacher=network(), student=from_source(source(), 2))
    engine = Engine(steps=4, batch_size=2, device="cpu", log_every=1, evaluate_every=0)
    method = AST(**{**SIZES, "penalty": 0.1, "init": init})
    real = {tuple(x.flatten().tolist()) for x in source().x}
    result = execute(method, m, Data(train=source()), engine, optim={"student": Optim("sgd", lr=1e-9)})
    assert m.student.module.y.tolist() == [0, 0, 1, 1, 2, 2]
    for x in m.student.module.x:
        assert any(torch.allclose(x.flatten(), torch.tensor(r), atol=1e-5) for r in real)
    assert all(math.isfinite(row.get("train/loss/student", 0.0)) for row in result.history)


@pytest.mark.parametrize("fields", [
    {"experts": 0}, {"penalty": -1.0}, {"perturbation": -1.0}, {"step_size": 0.0}, {"momentum": 1.0}, {"form": "tesla"},
])  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        AST(**fields)


def test_ten_centres_need_ten_samples():
    with pytest.raises(UsageError, match="variant is out of range"):
        AST(**SIZES, variant="code").check(roles(1), source().batch(torch.arange(2), 0))
    AST(**SIZES, variant="code", init="real").check(roles(1), source().batch(torch.arange(2), 0))
