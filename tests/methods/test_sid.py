"""SiD: the identity, what its gradient goes through, steps, scales of guidance, the discriminator."""

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Draws, GaussianMixture, RectifiedFlow, Sampler, few_step, ring, sid_loss
from limbeck.diffusion.matching import discriminator_scores, telling
from limbeck.diffusion.scores import denoising_loss, noisy
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.sid.method import SiD, _flow
from limbeck.nn.time_mlp import TimeMLP

FLOW = RectifiedFlow()
TIMES = (1.0, 0.75, 0.5, 0.25)


def network(seed=0, classes=0, hidden=8):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, hidden, 2, classes=classes), FLOW, "flow_prediction", null=classes or None)


def batch(n=8, classes=0):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    return Batch(x=z, id=torch.arange(n), **({"y": torch.arange(n) % classes} if classes else {}))


def roles(teacher=None, fake=None, times=TIMES, noise="fresh"):
    return Roles(
        teacher=teacher or ring(8, schedule=FLOW), student=Sampler(network(), times, noise), fake=fake or network(2)
    )


def student_update(method, m, b):
    return list(method.step(m, b))[1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_with_an_exact_fake_the_loss_is_a_share_of_the_squared_gap(alpha):
    g = torch.Generator().manual_seed(0)
    truth = GaussianMixture(torch.tensor([[-1.0], [1.0]]).double(), 0.3, FLOW)
    own = GaussianMixture(torch.tensor([[0.5]]).double(), 0.8, FLOW)
    x = own.sample(200_000, g)
    t = torch.full((len(x),), 0.5, dtype=torch.float64)
    x_t = FLOW.add_noise(x, torch.randn(x.shape, generator=g, dtype=torch.float64), t)
    real, fake = truth(x_t, t), own(x_t, t)
    found = sid_loss(x, real, fake, alpha, torch.ones(len(x)).double())
    gap = (real - fake).square().mean()
    assert found.item() == pytest.approx((1 - alpha) * gap.item(), abs=0.02 * gap.item())


def test_nothing_moves_where_fake_is_the_teacher():
    known = ring(8, schedule=FLOW)
    m = roles(known, ring(8, schedule=FLOW))
    for alpha in (0.5, 1.0, 1.2):
        update = SiD(alpha=alpha).improve(m, Draws(m, batch()), batch())
        assert update.loss.item() == pytest.approx(0, abs=1e-6)
        gradients = torch.autograd.grad(update.loss, list(m.student.parameters()), allow_unused=True)
        assert all(g is None or g.abs().max() < 1e-5 for g in gradients)


def test_at_one_the_loss_is_the_short_form():
    x, real, fake = (torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = ((real - fake) * (fake - x)).sum(1).mean()
    torch.testing.assert_close(sid_loss(x, real, fake, 1.0, torch.ones(5)), expected)


def test_the_gradient_goes_through_both_networks():
    """It is that of finite differences of the loss by the samples, which takes the noisy samples along."""
    known, own = ring(5, std=0.5, schedule=FLOW), network(2).double()
    known.double()
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t, noise = torch.tensor([0.3, 0.5, 0.7, 0.9]).double(), torch.randn(4, 2, dtype=torch.float64)

    def loss(x):
        x_t = FLOW.add_noise(x, noise, t)
        return sid_loss(x, known(x_t, t), own(x_t, t), 1.0, torch.ones(4).double())

    assert torch.autograd.gradcheck(loss, (x,))
    (full,) = torch.autograd.grad(loss(x), x)
    x_t = FLOW.add_noise(x.detach(), noise, t)
    (direct,) = torch.autograd.grad(sid_loss(x, known(x_t, t), own(x_t, t), 1.0, torch.ones(4).double()), x)
    assert not torch.allclose(full, direct)


def test_one_step_of_several_is_a_generator_of_one():
    b, one = batch(), SiD(steps=1)
    m = roles(times=(1.0,))
    x = one.generate(m, Draws(m, b), b, "student")
    assert x.equal(m.student.module.denoiser(b.x))
    for noise in ("fixed", "ddim"):
        assert SiD(steps=1, noise=noise).generate(roles(times=(1.0,), noise=noise), Draws(m, b), b, "student").equal(x)


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
def test_the_number_of_steps_is_drawn_for_all_and_the_last_alone_learns(noise):
    b, method = batch(), SiD(noise=noise)
    m = roles(noise=noise)
    calls = []
    m.student.module.denoiser.register_forward_hook(lambda _, __, out: calls.append(out))
    seen = set()
    for m.step in range(60):
        calls.clear()
        x = method.generate(m, Draws(m, b), b, "student")
        seen.add(len(calls))
        assert [c.requires_grad for c in calls] == [False] * (len(calls) - 1) + [True]
        part = method.generate(m, Draws(m, b[4:8]), b[4:8], "student")
        torch.testing.assert_close(part, x[4:])
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
def test_the_gradient_may_go_through_all_steps(noise):
    b = batch()
    m = roles(noise=noise)
    m.step = next(
        m.step for m.step in range(60) if int(len(m.student.module.times) * Draws(m, b).once("steps")) == 2
    )  # three steps
    calls, found = [], {}
    m.student.module.denoiser.register_forward_hook(lambda _, __, out: calls.append(out))
    for steps in ("last", "all"):
        calls.clear()
        x = SiD(noise=noise, gradient_steps=steps).generate(m, Draws(m, b), b, "student")
        found[steps] = (x, torch.autograd.grad(x.square().sum(), list(m.student.parameters()), retain_graph=True))
    torch.testing.assert_close(found["all"][0], found["last"][0])
    assert all(torch.autograd.grad(x.square().sum(), call, retain_graph=True)[0].any() for call in calls)

    times = m.student.module.times  # the same three steps, written out
    draws, z = Draws(m, b), b.x
    x_0 = added = None
    for i in range(3):
        t = times[i].expand(len(z))
        if i:
            added = {"fresh": draws.normal(f"student step {i}", z), "fixed": z, "ddim": added}[noise]
        x_t = t[:, None] * z if i == 0 else FLOW.add_noise(x_0, added, t)
        x_0 = m.student.module.denoiser(x_t, t=t)
        added = FLOW.convert(x_0, x_t, t, "sample", "epsilon")
    expected = torch.autograd.grad(x_0.square().sum(), list(m.student.parameters()))
    for a, b_, c in zip(found["all"][1], expected, found["last"][1], strict=True):
        torch.testing.assert_close(a, b_)
        assert not torch.allclose(a, c)


def test_elements_are_a_factor_of_the_students_losses():
    b = batch()
    fields = {"steps": 1, "gan_weight": 0.5, "discriminator": "net.body"}
    added, averaged = (list(SiD(**fields, elements=how).step(roles(times=(1.0,)), b)) for how in ("sum", "mean"))
    torch.testing.assert_close(added[1].loss, 2 * averaged[1].loss)
    torch.testing.assert_close(added[0].loss, averaged[0].loss)


def test_what_follows_learns_first_from_samples_of_its_own_noise():
    m, b, method = roles(), batch(), SiD(steps=1)
    updates = list(method.step(m, b))
    assert [u.role for u in updates] == ["fake", "student"]
    assert not method.generate(m, Draws(m, b), b, "fake").equal(method.generate(m, Draws(m, b), b, "student"))
    grads = torch.autograd.grad(updates[0].loss, list(m.student.parameters()), allow_unused=True)
    assert all(g is None for g in grads)


@pytest.mark.parametrize(("fields", "scales"), [
    ({"guidance": 3.0}, (3.0, 3.0, 3.0)),
    ({"guidance": 1.0, "fake_guidance": 0.0}, (1.0, 0.0, 0.0)),
    ({"guidance": 1.0, "fake_guidance": -1.0}, (1.0, -1.0, -1.0)),
    ({"guidance": 2.0, "fake_guidance": 1.0, "train_guidance": 1.5}, (2.0, 1.0, 1.5)),
])  # fmt: skip
def test_scales_of_guidance(fields, scales):
    method = SiD(**fields)
    assert (method.guidance, method._scale("fake"), method._scale("train")) == scales


def test_zero_guidance_is_a_call_without_condition():
    b = batch(classes=4)
    m = Roles(teacher=ring(8, schedule=FLOW, classes=4), student=Sampler(network(0, 4), (1.0,)), fake=network(2, 4))
    heard = []
    m.fake.module.register_forward_pre_hook(lambda _, args, kw: heard.append(kw["condition"]), with_kwargs=True)
    list(SiD(steps=1, fake_guidance=0.0).step(m, b))
    assert all((c == 4).all() for c in heard)


@pytest.mark.parametrize("fields", [
    {"alpha": 1.0}, {"alpha": 0.5}, {"guidance": 3.0}, {"guidance": 1.0, "fake_guidance": -1.0},
])  # fmt: skip
def test_the_students_gradient_is_that_of_the_whole_graph(fields):
    """Through the samples, and through what both networks say of them with noise, each at its own scale."""
    b, method = batch(classes=4), SiD(steps=1, weight="flow", **fields)
    m = Roles(teacher=ring(8, schedule=FLOW, classes=4), student=Sampler(network(0, 4), (1.0,)), fake=network(2, 4))
    parameters = list(m.student.parameters())
    update = method.improve(m, Draws(m, b), b)
    found = torch.autograd.grad(update.loss, parameters)
    x = m.student.module.denoiser(b.x, condition=b.y)
    x_t, t = noisy(FLOW, Draws(m, b), "student", x, *method.times)

    def at(model, scale):
        with_it, without = model(x_t, t, b.y), model(x_t, t, torch.full_like(b.y, 4))
        return without + scale * (with_it - without)

    real, fake = at(m.teacher.module, method.guidance), at(m.fake.module, fields.get("fake_guidance", method.guidance))
    loss = ((1 - t) * ((real - fake) * (real - x - method.alpha * (real - fake))).sum(1)).mean()
    torch.testing.assert_close(update.loss, loss)
    for a, e in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("fields", "scale", "dropout"), [
    ({}, 1.0, 0.0),
    ({"guidance": 3.0}, 3.0, 0.1),
    ({"guidance": 3.0, "train_guidance": 1.5}, 1.5, 0.1),
    ({"guidance": 3.0, "train_guidance": 1.0}, 1.0, 0.1),
    ({"guidance": 3.0, "fake_guidance": 1.0}, 1.0, 0.0),
])  # fmt: skip
def test_what_follows_learns_at_its_scale_and_forgets_conditions_only_where_it_is_guided(fields, scale, dropout):
    b, method = batch(64, classes=4), SiD(steps=1, weight="flow", **fields)
    m = Roles(teacher=ring(8, schedule=FLOW, classes=4), student=Sampler(network(0, 4), (1.0,)), fake=network(2, 4))
    draws = Draws(m, b)
    x = method.generate(m, draws, b, "fake")

    def velocity(alpha, sigma):
        return (1 / sigma**2).clamp(max=1e4)

    expected = denoising_loss(
        m, "fake", draws, x, b.y, times=method.fake_times, dropout=dropout, guidance=scale, weight=velocity
    )
    torch.testing.assert_close(next(method.step(m, b)).loss, expected)


def test_the_discriminator_is_told_the_condition_without_guidance_too():
    b = batch(classes=4)
    m = Roles(teacher=ring(8, schedule=FLOW, classes=4), student=Sampler(network(0, 4), (1.0,)), fake=network(2, 4))
    heard = []
    m.fake.module.register_forward_pre_hook(lambda _, args, kw: heard.append(kw["condition"]), with_kwargs=True)
    list(SiD(steps=1, fake_guidance=0.0, gan_weight=0.1, discriminator="net.body").step(m, b))
    told = [bool(c.equal(b.y)) for c in heard]
    assert any(told)
    assert not any(told[:1])  # what it learns of the student's samples
    assert told[-1]  # as the student's judge


def test_steps_begin_where_they_are_told_to():
    m = Roles(teacher=network(), student=network(1))
    stages = SiD(steps=4, start=0.5).stages(m, Data(train=Noise((2,), 8)))
    next(stages)
    made = stages.send(None).how(m.student.module)[0]
    assert made.times.tolist() == [0.5, 0.375, 0.25, 0.125]


def test_steps_are_those_of_a_shifted_flow_and_times_of_training_are_not():
    shifted = RectifiedFlow(shift=3.0)
    m = Roles(**{name: Denoiser(TimeMLP(2, 8), shifted, "flow_prediction") for name in ("teacher", "student")})
    stages = SiD(steps=4).stages(m, Data(train=Noise((2,), 8)))
    next(stages)
    made = stages.send(None).how(m.student.module)[0]
    torch.testing.assert_close(made.times, torch.tensor([1.0, 0.9, 0.75, 0.5]))
    torch.testing.assert_close(made.times, shifted.grid(4)[:-1])
    x, draws = torch.zeros(8, 2), Draws(m, batch())
    assert noisy(shifted, draws, "student", x, 0.02, 0.98)[1].equal(noisy(FLOW, draws, "student", x, 0.02, 0.98)[1])


def test_all_steps_of_the_student_are_drawn_whatever_its_number():
    b, m = batch(), roles(times=(1.0, 0.5))
    calls = []
    m.student.module.denoiser.register_forward_hook(lambda _, __, out: calls.append(out))
    counts = [0, 0]
    for m.step in range(100):
        calls.clear()
        SiD(steps=4).generate(m, Draws(m, b), b, "student")
        counts[len(calls) - 1] += 1
    assert min(counts) > 30


def test_real_samples_leave_noise_of_their_own_to_each_update():
    b, m = batch(), roles(times=(1.0,))
    method = SiD(steps=1, gan_weight=0.1, discriminator="net.body")
    made = [method.generate(m, Draws(m, b), b, name) for name in ("fake", "student")]
    assert not made[0].allclose(made[1])
    assert not any(x.allclose(m.student.module.denoiser(b.x)) for x in made)


def test_the_discriminator_is_the_mean_over_channels_within_limits():
    b = batch()
    m = roles()
    t = torch.full((8,), 0.5)
    scores = discriminator_scores(m.fake, "net.body", b.x, t)
    net = m.fake.module.net
    phase = t[:, None] * net.waves
    body = net.body(net.first(torch.cat([b.x, phase.sin(), phase.cos()], 1)))
    torch.testing.assert_close(scores, body.mean(1))
    for p in m.fake.module.net.body.parameters():
        p.data *= 1e4
    far = discriminator_scores(m.fake, "net.body", b.x, t)
    assert far.abs().max() == 10
    (gradient,) = torch.autograd.grad(far[far.abs() == 10].sum(), net.first.weight, allow_unused=True)
    assert not gradient.any()


def test_the_adversarial_terms():
    b, method = batch(), SiD(steps=1, alpha=1.0, gan_weight=0.5, discriminator="net.body", weight="flow")
    m = roles(times=(1.0,))
    draws = Draws(m, b)
    first, second = method.step(m, b)
    x = method.generate(m, draws, b, "fake").detach()
    told_apart = telling(m, draws, "net.body", b.x, x) / 2
    assert told_apart.item() == pytest.approx(math.log(2), abs=0.3)
    error = denoising_loss(
        m, "fake", draws, x, b.get("y"), times=method.fake_times, dropout=method._dropout(),
        guidance=method._scale("train"), weight=_flow,
    )  # fmt: skip
    torch.testing.assert_close(first.loss, error + told_apart)
    x = method.generate(m, draws, b, "student")
    x_t, t = noisy(FLOW, draws, "student", x, *method.times)
    share = 1 - t
    fooled = (share * F.softplus(-discriminator_scores(m.fake, "net.body", x_t, t)) * 2).mean()
    late = SiD(**{**vars(method), "gan_start": 0.5})
    torch.testing.assert_close(second.loss - late.improve(m, draws, b).loss, 0.5 * fooled)


def test_a_student_far_off_comes_near_and_is_what_it_is(tmp_path):
    known = ring(8, 2.0, 0.2, FLOW)
    m = Roles(teacher=known, student=network(0, hidden=32), fake=network(0, hidden=32))
    m.student.module.net.last[1].bias.data += 1.5
    data = Data(train=Noise((2,), 4096))
    optim = {"student": Optim("adam", lr=2e-3), "fake": Optim("adam", lr=1e-2)}
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9))
    true = known.sample(1000, torch.Generator().manual_seed(8))

    def distance():
        with torch.no_grad():
            return energy_distance(m.student(z), true)

    first = distance()
    execute(SiD(steps=2, ema=0.9), m, data, Engine(steps=300, batch_size=64, device="cpu"), optim=optim)
    assert distance() < 0.4 * first
    assert m.student.module.steps == 2
    assert m.student.module.times.tolist() == [1.0, 0.5]
    assert "student_average" in m
    with torch.no_grad():
        expected = few_step(m.student, z, FLOW, torch.tensor([1.0, 0.5]), noise="fixed")
    m.student.module.noise = "fixed"
    assert m.student(z).equal(expected)


def test_real_samples_are_the_data_of_the_adversarial_form():
    real = ring(8, schedule=FLOW).sample(64, torch.Generator().manual_seed(0))
    m = Roles(teacher=ring(8, schedule=FLOW), student=network(), fake=network(1))
    method = SiD(steps=2, gan_weight=0.1, discriminator="net.body", gan_start=0.5)
    engine = Engine(steps=4, batch_size=16, device="cpu", log_every=1)
    optim = dict.fromkeys(("student", "fake"), Optim("sgd", lr=1e-3))
    result = execute(method, m, Data(train=TensorSource(real)), engine, optim=optim)
    assert len([row for row in result.history if "train/loss/student" in row]) == 4


@pytest.mark.parametrize("fields", [
    {"steps": 0}, {"start": 0.0}, {"noise": "x"}, {"alpha": 1.3}, {"times": (0.5, 0.4)}, {"dropout": 1.0}, {"ema": 1.0},
    {"gan_weight": -1.0}, {"weight": "x"},
])  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        SiD(**fields)


def test_models_that_do_not_fit():
    with pytest.raises(UsageError, match="cannot learn"):
        SiD().check(Roles(teacher=ring(8, schedule=FLOW), student=network()), batch())
    with pytest.raises(UsageError, match="discriminator is out of range"):
        SiD(gan_weight=0.1).check(roles(), batch())
    with pytest.raises(UsageError, match="discriminator is out of range"):
        SiD(discriminator="net.body")
    with pytest.raises(UsageError, match="no such module"):
        SiD(gan_weight=0.1, discriminator="net.mid").check(roles(), batch())
    other = Denoiser(lambda x, t: x[:, :1], FLOW, "sample")
    with pytest.raises(UsageError, match="other samples"):
        SiD().check(Roles(teacher=network(), student=other), batch())
