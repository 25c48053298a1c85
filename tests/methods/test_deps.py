"""DepS: its gradients, its ramp, its stages, and what it refuses."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles, Train
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.methods.deps.method import DepS
from limbeck.nn.elastic import Elastic, MakeElastic
from limbeck.nn.mlp import mlp

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
BATCH = Batch(x=X, y=Y, id=torch.arange(12))
METHOD = DepS(expand=(0.25, 0.5, 1.0), divisor=4, ramp=0.0, delay=0.0)


def roles(method=METHOD, make=lambda: mlp(6, 16, 16, 3)):
    torch.manual_seed(0)
    net = make()
    return Roles(student=MakeElastic(method.space(net))(net)[0])


def gradients(m):
    found = {n: p.grad.clone() for n, p in m.student.named_parameters() if p.grad is not None}
    m.student.module.zero_grad()
    return found


def step(method, m):
    for update in method.step(m, BATCH):
        update.backward(m)
    return gradients(m)


def weighed(eps):
    class Fixed(DepS):
        def epsilon(self, m):
            return eps

    return Fixed(**vars(METHOD))


def test_without_sub_networks_the_gradient_is_the_whole_networks():
    m = roles()
    F.cross_entropy(m.student(X), Y, label_smoothing=0.1).backward()
    whole = gradients(m)
    found = step(weighed(0.0), m)
    assert all(found[n].equal(g) for n, g in whole.items())


def test_at_full_weight_it_is_the_sum_of_four():
    m = roles()
    m.seed, m.step = 3, 5
    logits = m.student(X)
    q = logits.detach().softmax(-1)
    F.cross_entropy(logits, Y, label_smoothing=0.1).backward()
    space = m.student.module.space
    for arch in space.sandwich(Random(1_000_003 * 3 + 5), 4)[1:]:
        (-(q * m.student(X, arch=arch).log_softmax(-1)).sum(-1).mean()).backward()
    expected = gradients(m)
    for n, g in step(weighed(1.0), m).items():
        torch.testing.assert_close(g, expected[n])


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_gradient_of_a_sub_network_is_the_closed_form_and_none_reaches_the_whole(tau):
    method = DepS(**{**vars(METHOD), "temperature": tau, "subnets": 2})
    z, whole = torch.randn(12, 3, requires_grad=True), torch.randn(12, 3, requires_grad=True)

    class Given(nn.Module):
        space = roles().student.module.space

        def forward(self, x, arch=None):
            return whole * 1 if arch is None else z * 1

    m = Roles(student=Given())
    updates = list(method.step(m, BATCH))
    assert [u.apply for u in updates] == [False, False, True]
    (grad_z, grad_whole) = torch.autograd.grad(updates[1].loss, [z, whole], allow_unused=True)
    q = (whole / tau).softmax(-1)
    torch.testing.assert_close(grad_z, tau * ((z / tau).softmax(-1) - q) / 12)
    assert grad_whole is None
    entropy = -(q * q.log()).sum(-1).mean() * tau**2
    assert updates[1].loss >= entropy


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step"])
def test_the_rate_of_sub_networks_grows_linearly_to_the_whole_networks(schedule):
    method = DepS(delay=0.5, ramp=0.1)
    optim, total = Optim("sgd", lr=0.1, schedule=schedule, milestones=(0.3, 0.9)), 200
    stage = Train(span=(0.4, 1.0))
    m = Roles(student=nn.Linear(1, 1))
    m.total = stage.share(total)
    m._rates["student"] = lambda s: optim.factor(*stage.at(s, m.total))
    rates = []
    for s in range(30):
        m.step = s
        rates.append(method.epsilon(m) * m.rate("student"))
    end = m.rate("student", 20)
    assert end == pytest.approx(optim.factor(100, total))
    assert rates[:19] == pytest.approx([(s + 1) / 20 * end for s in range(19)])
    assert rates[20:] == pytest.approx([m.rate("student", s) for s in range(20, 30)])  # exactly the schedule


def test_without_a_ramp_sub_networks_join_at_once():
    m = Roles(student=nn.Linear(1, 1))
    m.total = 100
    assert DepS(ramp=0.0).epsilon(m) == 1.0


def test_stages_share_one_schedule():
    seen = []

    class Watching(DepS):
        def whole(self, m, batch):
            seen.append((m.rate("student"), "whole"))
            return super().whole(m, batch)

        def step(self, m, batch):
            seen.append((m.rate("student"), "all"))
            yield from super().step(m, batch)

    optim = Optim("sgd", lr=0.05, schedule="cosine")
    source = Data(train=TensorSource(X, Y))
    method = Watching(expand=(0.5, 1.0), divisor=4, delay=0.5, ramp=0.1)
    m = Roles(student=mlp(6, 16, 3))
    result = execute(method, m, source, Engine(steps=20, batch_size=4), optim={"student": optim})
    assert [rate for rate, _ in seen] == pytest.approx([optim.factor(s, 20) for s in range(20)])
    assert [kind for _, kind in seen] == ["whole"] * 8 + ["all"] * 12
    assert isinstance(result.roles.student.module, Elastic)
    row = next(r for r in result.history if r["stage"] == "sort")
    assert row["convert/max_abs_difference"] < 1e-5


def test_processes_and_micro_batches_draw_the_same_sub_networks():
    def run(parts):
        torch.manual_seed(0)
        m = Roles(student=mlp(6, 16, 3))
        data = Data(train=TensorSource(X, Y))
        engine = Engine(steps=6, batch_size=12, micro_batches=parts)
        execute(METHOD, m, data, engine, optim={"student": Optim("sgd", lr=0.1)})
        return m.student.module.model.state_dict()

    one, two = run(1), run(3)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expand": (0.0,)}, "expand"),
        ({"depth": ()}, "depth"),
        ({"delay": 1.0}, "delay"),
        ({"ramp": -0.1}, "ramp"),
        ({"subnets": 1}, "subnets"),
        ({"temperature": 0.0}, "temperature"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"coupled": True, "depth": (1, 2)}, "as many shares as depths"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(UsageError, match=words):
        DepS(**fields)


def test_what_it_cannot_work_with_is_said_before_any_step():
    with pytest.raises(UsageError, match="no blocks that can be thinner"):
        METHOD.check(Roles(student=nn.Linear(6, 3)), BATCH)
    with pytest.raises(UsageError, match="learns from labels"):
        METHOD.check(Roles(student=mlp(6, 16, 3)), Batch(x=X))


def test_depths_and_shares_can_go_together():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    net = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
    space = DepS(expand=(0.25, 0.5, 1.0), depth=(1, 2, 3), divisor=4, coupled=True).space(net)
    draws = {tuple(space.sample(Random(i)).values()) for i in range(40)}
    assert draws == {(4, 4, 4, 1), (8, 8, 8, 2), (16, 16, 16, 3)}
    assert space.count() == 3
