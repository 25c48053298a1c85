"""SwiftBrush: where it rests, what its guidance does, and the order in which its two networks learn."""

import copy

import pytest
import torch

from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.lora import AddLora
from limbeck.core.errors import UsageError
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import Cosine, Denoiser, Draws, RectifiedFlow, ring
from limbeck.diffusion.score_gap import alpha_weight
from limbeck.diffusion.scores import denoising_loss, noisy, predicted
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.swiftbrush.method import SwiftBrush
from limbeck.nn.time_mlp import TimeMLP

FLOW = RectifiedFlow()


def network(seed=0, schedule=FLOW, hidden=8):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, hidden, 2, classes=4), schedule, "flow_prediction", null=4)


def teacher():
    return ring(8, 2.0, 0.2, FLOW, classes=4)


def batch(n=8):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    return Batch(x=z, y=torch.arange(n) % 4, id=torch.arange(n))


def gap(method, m):
    return float(next(iter(method.step(m, batch()))).logs["gap"])


@pytest.mark.parametrize("guidance", [1.0, 0.5, 4.5])
def test_it_rests_where_both_are_guided_and_the_distributions_are_equal(guidance):
    m = Roles(teacher=teacher(), student=network(), fake=teacher())
    assert gap(SwiftBrush(guidance=guidance), m) == 0
    alone = gap(SwiftBrush(guidance=guidance, guide_fake=False), m)
    assert alone == 0 if guidance == 1.0 else alone > 1e-3


def test_a_copy_of_the_teacher_gives_no_gradient_at_first():
    whole = network()
    m = Roles(teacher=whole, student=network(1), fake=copy.deepcopy(whole))
    update = next(iter(SwiftBrush().step(m, batch())))
    gradients = torch.autograd.grad(update.loss, list(m.student.parameters()), allow_unused=True)
    assert not any(g.any() for g in gradients if g is not None)  # the label of no class is not used


def test_one_call_of_the_student_is_its_prediction_at_pure_noise():
    b, student = batch(), network()
    m = Roles(student=student)
    x = SwiftBrush().generate(m, b)
    t = torch.ones(8)
    torch.testing.assert_close(x, b.x - student.net(b.x, t, b.y))  # of a flow, x_0 = z - u
    table = Denoiser(student.net, Cosine(), "v_prediction", null=4)
    torch.testing.assert_close(
        SwiftBrush().generate(Roles(student=table), b), -student.net(b.x, t, b.y), atol=1e-6, rtol=1e-5
    )


def test_of_gaussian_data_the_exact_student_gives_the_mean():
    from limbeck.diffusion import GaussianMixture, Table

    schedule = Table.scaled_linear()
    one = GaussianMixture(torch.zeros(1, 2), 0.7, schedule)
    z = batch().x
    alpha, sigma = (f(torch.ones(1)).item() for f in (schedule.alpha, schedule.sigma))
    expected = alpha * 0.49 * z / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(one(z), expected, rtol=1e-4, atol=1e-6)


def test_what_follows_learns_from_the_samples_before_the_update_with_its_own_noise():
    m = Roles(teacher=teacher(), student=network(), fake=network(2))
    b = batch()
    before = SwiftBrush().generate(m, b).detach()
    steps = SwiftBrush(dropout=0.0).step(m, b)
    next(steps)
    with torch.no_grad():
        for p in m.student.parameters():
            p.zero_()  # as an update would move them
    second = next(steps)
    expected = denoising_loss(m, "fake", Draws(m, b), before, b.y, times=(0.001, 1.0), weight=alpha_weight, dropout=0.0)
    torch.testing.assert_close(second.loss, expected)
    _, t = noisy(FLOW, Draws(m, b), "student", before, 0.02, 0.98)
    _, own = noisy(FLOW, Draws(m, b), "fake", before, 0.02, 0.98)
    assert not torch.equal(t, own)


def test_both_sides_times_alpha():
    alpha, sigma = FLOW.factors(torch.tensor([0.3]), torch.zeros(1, 2))
    x, e, x_0 = (torch.randn(1, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x_t = FLOW.add_noise(x, e, torch.tensor([0.3]))
    predicted_e = (x_t - alpha * x_0) / sigma
    found = alpha_weight(alpha, sigma) * (x_0 - x).square()
    torch.testing.assert_close(found, (alpha * predicted_e - alpha * e).square())


def test_a_share_of_what_follows_is_told_nothing():
    m = Roles(teacher=teacher(), student=network(), fake=network(2))
    heard = []
    m.fake.module.register_forward_pre_hook(lambda _, args, kw: heard.append(kw["condition"]), with_kwargs=True)
    big = Batch(x=torch.randn(2000, 2), y=torch.arange(2000) % 4, id=torch.arange(2000))
    denoising_loss(m, "fake", Draws(m, big), big.x, big.y, dropout=0.1)
    assert (heard[0] == 4).double().mean().item() == pytest.approx(0.1, abs=0.03)


def test_guidance_takes_one_call():
    m = Roles(teacher=teacher(), student=network(), fake=network(2))
    calls = []
    m.teacher.module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    b = batch()
    predicted(m.teacher, b.x, torch.full((8,), 0.5), b.y, 3.0)
    predicted(m.teacher, b.x, torch.full((8,), 0.5), b.y, 1.0)
    assert calls == [16, 8]


def test_a_student_far_off_comes_near():
    known = teacher()
    m = Roles(teacher=known, student=network(0, hidden=32), fake=network(0, hidden=32))
    m.student.module.net.last[1].bias.data += 1.5
    data = Data(train=Noise((2,), 4096, 4))
    optim = {"student": Optim("adam", lr=2e-3), "fake": Optim("adam", lr=1e-2)}
    z, y = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)), torch.arange(1000) % 4
    true = known.sample(1000, torch.Generator().manual_seed(8), y)

    def distance():
        with torch.no_grad():
            return energy_distance(m.student(z, condition=y), true)

    first = distance()
    execute(SwiftBrush(guidance=1.0, ema=0.9), m, data, Engine(steps=300, batch_size=64, device="cpu"), optim=optim)
    assert distance() < 0.4 * first
    assert "student_average" in m


def adapted(rank, whole, alpha=None):
    m = Roles(teacher=whole, student=network(1))
    m.convert("fake", AddLora(rank, alpha), of="teacher")
    m.freeze("teacher")
    return m


@pytest.mark.parametrize("guidance", [1.0, 0.5, 4.5])
def test_adapters_at_zero_are_the_teacher_and_share_its_weights(guidance):
    pytest.importorskip("peft")
    m, b = adapted(2, network()), batch()
    x, t = b.x, torch.full((8,), 0.5)
    assert torch.equal(m.fake(x, t=t, condition=b.y), m.teacher(x, t=t, condition=b.y))
    assert gap(SwiftBrush(guidance=guidance), m) == 0
    own = {p.data_ptr() for p in m.teacher.parameters()}
    assert own < {p.data_ptr() for p in m.fake.parameters()}
    assert all("lora" in name for name, p in m.fake.named_parameters() if p.requires_grad)


def test_adapters_of_full_rank_are_any_network_of_these_layers():
    pytest.importorskip("peft")
    m, other = adapted(64, network()), network(2)  # no layer has a rank above
    layers, b = dict(other.named_modules()), batch()
    with torch.no_grad():
        for path, part in m.fake.module.named_modules():
            if hasattr(part, "lora_A"):
                u, s, v = (layers[path].weight - part.base_layer.weight).svd()
                part.lora_A["default"].weight.zero_()[: len(s)] = v.T
                part.lora_B["default"].weight.zero_()[:, : len(s)] = u * s
        changed = {
            id(p) for part in m.fake.module.modules() if hasattr(part, "lora_A") for p in [part.base_layer.weight]
        }
        for p, q in zip(m.teacher.parameters(), other.parameters(), strict=True):
            if id(p) not in changed:
                p.copy_(q)  # biases and embeddings are not in reach of adapters
        t = torch.full((8,), 0.5)
        torch.testing.assert_close(
            m.fake(b.x, t=t, condition=b.y), other(b.x, t=t, condition=b.y), atol=1e-5, rtol=1e-4
        )


def test_with_adapters_the_teacher_stays_and_they_alone_learn():
    pytest.importorskip("peft")
    whole = network()
    before = [p.clone() for p in whole.parameters()]
    m = Roles(teacher=whole, student=network(1))
    optim = {"student": Optim("adam", lr=1e-3), "fake": Optim("adam", lr=1e-2)}
    method = SwiftBrush(guidance=2.0, fake_rank=2)
    execute(method, m, Data(train=Noise((2,), 64, 4)), Engine(steps=3, batch_size=16, device="cpu"), optim=optim)
    assert all(torch.equal(a, b) for a, b in zip(before, m.teacher.parameters(), strict=True))
    found = dict(m.fake.named_parameters())
    assert all(p.any() for name, p in found.items() if "lora_B" in name)
    base = [p for name, p in found.items() if "lora" not in name]
    assert all(torch.equal(a, b) for a, b in zip(before, base, strict=True))


def test_a_plan_counts_adapters_and_no_third_network():
    pytest.importorskip("peft")
    from types import SimpleNamespace

    from limbeck.plan import plan_job

    def memory(rank):
        job = SimpleNamespace(
            method=SwiftBrush(guidance=2.0, fake_rank=rank), roles=Roles(teacher=network(), student=network(1)),
            data=Data(train=Noise((2,), 64, 4)), engine=Engine(steps=3, batch_size=16), taught=None,
            optim={name: Optim("sgd", momentum=0.9) for name in ("student", "fake")}, recipe=SimpleNamespace(cache=None),
        )  # fmt: skip
        return plan_job(job).memory

    whole, few = memory(0), memory(2)
    size = sum(p.nbytes for p in network().parameters())
    adapters = sum(p.nbytes for p in adapted(2, network()).fake.parameters() if p.requires_grad)
    assert whole.parameters - few.parameters == size - adapters
    assert whole.optimizer - few.optimizer == size - adapters


def test_models_that_do_not_fit():
    with pytest.raises(UsageError, match="cannot learn"):
        SwiftBrush().check(Roles(teacher=teacher(), student=network()), batch())
    with pytest.raises(UsageError, match="other samples"):
        SwiftBrush().check(
            Roles(teacher=network(), student=Denoiser(lambda x, t, c: x[:, :1], FLOW, "sample", null=4)), batch()
        )
    plain = Denoiser(TimeMLP(2, 8, classes=4), FLOW, "flow_prediction")
    with pytest.raises(UsageError, match="no empty condition"):
        list(SwiftBrush().step(Roles(teacher=plain, student=network(), fake=network(2)), batch()))
    for fields in (
        {"times": (0.5, 0.4)},
        {"fake_times": (0.0, 1.0)},
        {"dropout": -0.1},
        {"ema": 1.0},
        {"elements": "x"},
        {"fake_rank": -1},
        {"fake_alpha": 0.0},
    ):
        with pytest.raises(UsageError, match="out of range"):
            SwiftBrush(**fields)
    with pytest.raises(UsageError, match=r"snoopi"):
        SwiftBrush(guidance=(0.5, 4.0))
