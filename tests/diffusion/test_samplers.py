"""Generators of several steps, experts, adapters: the same functions as their parts, and back from a folder."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Batch, Roles
from limbeck.convert.lora import AddLora, MergeLora
from limbeck.convert.record import load_student, save_student
from limbeck.convert.slicing import Slice
from limbeck.convert.steps import ToExperts, ToSampler
from limbeck.core.errors import UsageError
from limbeck.data import TensorSource
from limbeck.diffusion import Denoiser, Draws, Experts, RectifiedFlow, Sampler, few_step, flow, ring
from limbeck.evaluate.generation import Generation
from limbeck.nn.time_mlp import TimeMLP

FLOW = RectifiedFlow()
TIMES = (1.0, 0.75, 0.5, 0.25)


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, 8, 2, classes=classes), FLOW, "flow_prediction", null=classes or None)


def inputs(n=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, generator=g), torch.rand(n, generator=g), torch.arange(n) % 4


def test_a_sampler_is_its_denoiser_where_a_time_is_given_and_all_its_steps_where_none_is():
    x, t, y = inputs()
    net = network()
    fast = Sampler(net, TIMES, "fixed")
    assert fast(x, t=t, condition=y).equal(net(x, t, y))
    expected = few_step(net, x, FLOW, torch.tensor(TIMES), y, noise="fixed")
    assert fast(x, condition=y).equal(expected)
    assert Sampler(net, (1.0,))(x, condition=y).equal(net(x, condition=y))


def test_implied_noise_is_the_flow():
    x, _, y = inputs()
    net = network()
    torch.testing.assert_close(
        Sampler(net, TIMES, "ddim")(x, condition=y), flow(net, x, FLOW, 4, y), rtol=1e-4, atol=1e-5
    )


def test_fresh_noise_of_a_judged_sampler_is_always_the_same():
    known = ring(8, schedule=FLOW)
    judge = Generation(TensorSource(known.sample(50, torch.Generator().manual_seed(0))))
    m = Roles(student=Sampler(known, TIMES))
    first = judge.generate(m.student, 50)
    torch.rand(3)
    assert first.equal(judge.generate(m.student, 50))


@pytest.mark.parametrize("how", [{"bounds": (0.6, 0.3)}, {"owners": (0, 1, 1, 2)}])
def test_experts_answer_for_their_own_samples_alone(how):
    x, t, y = inputs(40)
    experts = Experts([network(k) for k in range(3)], **how)
    chosen = experts.route(t, y)
    assert set(chosen.tolist()) == {0, 1, 2}
    found = experts(x, t=t, condition=y)
    for i in range(40):
        one = experts.experts[chosen[i]](x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], one)
    found[chosen == 1].sum().backward()
    moved = [any(p.grad is not None and p.grad.any() for p in e.parameters()) for e in experts.experts]
    assert moved == [False, True, False]


def test_experts_by_time_and_by_class():
    by_time = Experts([network(0), network(1)], bounds=(0.6,))
    assert by_time.route(torch.tensor([1.0, 0.61, 0.6, 0.0])).tolist() == [0, 0, 1, 1]
    by_class = Experts([network(0), network(1)], owners=(1, 0, 1, 0))
    assert by_class.route(torch.ones(5), torch.tensor([0, 1, 2, 3, 4])).tolist() == [1, 0, 1, 0, 0]
    with pytest.raises(UsageError, match="know no embeddings"):
        by_class.route(torch.ones(5), torch.ones(5, 3))


def test_they_come_back_from_a_folder(tmp_path):
    x, _, y = inputs()
    net, records = network(), []
    for how in (ToExperts(bounds=(0.6,)), ToSampler(TIMES, "ddim")):
        net, record = how(net)
        records.append(record)
    save_student(tmp_path, net, records)
    again = load_student(tmp_path, network(5))
    assert again(x, condition=y).equal(net(x, condition=y))
    assert again.steps == 4


def test_adapters_share_the_weights_and_merge_into_the_same_function(tmp_path):
    x, t, y = inputs()
    m = Roles(teacher=network())
    m.freeze("teacher")
    record = m.convert("fake", AddLora(rank=2, alpha=4), of="teacher")
    assert m.fake(x, t=t, condition=y).equal(m.teacher(x, t=t, condition=y))
    names = [name for name, p in m.fake.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    base = {id(p) for p in m.teacher.parameters()}
    assert sum(id(p) in base for p in m.fake.parameters()) == len(base)
    for p in m.fake.parameters():
        if p.requires_grad:
            p.data += 0.1
    assert not m.fake(x, t=t, condition=y).equal(m.teacher(x, t=t, condition=y))
    merged, _ = MergeLora()(m.fake.module)
    torch.testing.assert_close(merged(x, t, y), m.fake(x, t=t, condition=y))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    save_student(tmp_path, m.fake.module, [record])
    assert load_student(tmp_path, network(3))(x, t, y).equal(m.fake(x, t=t, condition=y))


def test_a_copy_that_learns_may_not_share():
    class Same:
        def __call__(self, module):
            return copy.copy(module), {"kind": "x"}

    with pytest.raises(UsageError, match="shares parameters"):
        Roles(teacher=nn.Linear(2, 2)).convert("student", Same(), of="teacher")


def test_a_copy_of_a_model_that_was_given_frozen_learns():
    teacher = nn.Linear(2, 2).requires_grad_(False)
    m = Roles(teacher=teacher)
    m.convert("fake", Slice({}), of="teacher")
    m.convert("student", Slice({}), of="fake")
    assert all(p.requires_grad for name in ("fake", "student") for p in m[name].parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    part = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    m = Roles(teacher=part)
    m.convert("fake", Slice({}), of="teacher")
    assert [p.requires_grad for p in m.fake.parameters()] == [False, False, True, True]


def test_a_number_of_the_whole_step_is_that_of_its_parts():
    m, batch = Roles(), Batch(x=torch.zeros(4, 2), id=torch.arange(4))
    whole = Draws(m, batch).once("k")
    assert [Draws(m, part).once("k") for part in batch.split(2)] == [whole, whole]
    m.step = 1
    assert Draws(m, batch).once("k") != whole
    found = []
    for m.step in range(400):
        found.append(Draws(m, batch).once("k"))
    assert 0.45 < sum(found) / 400 < 0.55


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Sampler(network(), ()), "no steps"),
    (lambda: Sampler(network(), (0.5, 1.0)), "no steps"),
    (lambda: Sampler(network(), (1.0,), "other"), "no steps"),
    (lambda: Experts([network()]), "not clear"),
    (lambda: Experts([network(), network()], owners=(0, 0)), "not clear"),
    (lambda: Experts([network(), network()], bounds=(0.5, 0.2)), "not clear"),
    (lambda: AddLora(targets=("to_q",))(network()), "no layer"),
])  # fmt: skip
def test_what_does_not_fit(make, words):
    with pytest.raises(UsageError, match=words):
        make()
