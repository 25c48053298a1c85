"""Phased DMD: targets between two noise levels, what they are in the mean, and what learns in which phase."""

import pytest
import torch

from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.steps import Focus, ToExperts
from limbeck.core.errors import UsageError
from limbeck.core.stages import Train
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import (
    Cosine,
    Denoiser,
    Draws,
    Experts,
    GaussianMixture,
    RectifiedFlow,
    Sampler,
    Table,
    add_more_noise,
    flow,
    grid,
    interval_gradient,
    interval_loss,
    interval_target,
)
from limbeck.diffusion.scores import denoising_loss
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.phased_dmd.method import PhasedDMD
from limbeck.nn.time_mlp import TimeMLP

FLOW = RectifiedFlow()


def network(seed=0, classes=0, hidden=8):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, hidden, 2, classes=classes), FLOW, "flow_prediction", null=classes or None)


def batch(n=8, classes=0):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    return Batch(x=z, id=torch.arange(n), **({"y": torch.arange(n) % classes} if classes else {}))


def ready(method, teacher=None, student=None, fake=None, expert=0):
    m = Roles(teacher=teacher or grid(3, schedule=FLOW), student=student or network(), fake=fake or network(2))
    for conversion in method.experts(m):
        m.convert("student", conversion.how)
    m.convert("student", Focus(expert))
    return m


def drawn(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("schedule", [FLOW, Cosine(), Table.scaled_linear()])
def test_transitions_compose(schedule):
    r, s, t = (torch.tensor([v], dtype=torch.float64) for v in (0.2, 0.5, 0.8))
    a_sr, n_sr = schedule.transition(r, s)
    a_ts, n_ts = schedule.transition(s, t)
    a_tr, n_tr = schedule.transition(r, t)
    torch.testing.assert_close(a_ts * a_sr, a_tr)
    torch.testing.assert_close(n_tr**2, a_ts**2 * n_sr**2 + n_ts**2)


@pytest.mark.parametrize("schedule", [FLOW, Cosine()])
@pytest.mark.parametrize("s", [0.0, 0.3, 0.6])
def test_the_three_targets_are_one_prediction(schedule, s):
    """`D = x_t - t u` for a flow, and what the schedule says of others, for any samples and noise."""
    x, noise, t = drawn((5, 3), 0), drawn((5, 3), 1), torch.linspace(0.65, 0.95, 5).double()
    x_t = add_more_noise(schedule, x, noise, s, t)
    found = {}
    for name in ("sample", "epsilon", "flow_prediction"):
        scaled, sigma = interval_target(schedule, x, noise, s, t, name)
        found[name] = scaled / sigma
    for name, value in found.items():
        torch.testing.assert_close(schedule.convert(value, x_t, t, name, "sample"), found["sample"])
    if schedule == FLOW:
        torch.testing.assert_close(x_t - t[:, None] * found["flow_prediction"], found["sample"], rtol=0, atol=1e-14)


def test_the_targets_are_those_of_the_paper():
    s, t = 0.4, torch.tensor([0.5, 0.9]).double()
    x, noise = drawn((2, 3), 0), drawn((2, 3), 1)
    a_s, v_s, a_t, v_t = 0.6, 0.4, 1 - t[:, None], t[:, None]
    v = (v_t**2 - (a_t / a_s) ** 2 * v_s**2).sqrt()
    scaled, sigma = interval_target(FLOW, x, noise, s, t)
    torch.testing.assert_close(sigma, v)
    torch.testing.assert_close(scaled / sigma, (a_s**2 * v_t + a_t * v_s**2) / (a_s**2 * v) * noise - x / a_s)
    scaled, _ = interval_target(FLOW, x, noise, s, t, "sample")
    torch.testing.assert_close(scaled / sigma, x / a_s - a_t * v_s**2 / (a_s**2 * v) * noise)
    scaled, _ = interval_target(FLOW, x, noise, s, t, "epsilon")
    torch.testing.assert_close(scaled / sigma, v_t / v * noise)
    scaled, _ = interval_target(FLOW, x, noise, s, t, target="biased")
    torch.testing.assert_close(scaled / sigma, noise - x)


def test_clean_samples_are_plain_flow_matching_of_clamped_weight():
    x, noise, t = drawn((4, 2), 0), drawn((4, 2), 1), torch.tensor([0.1, 0.2, 0.5, 1.0]).double()
    found = drawn((4, 2), 2)
    for target in ("unbiased", "biased"):
        scaled, sigma = interval_target(FLOW, x, noise, 0.0, t, target=target)
        torch.testing.assert_close(scaled / sigma, noise - x)
    x_t = FLOW.add_noise(x, noise, t)
    u = (x_t - found) / t[:, None]
    expected = ((1 / t**2).clamp(max=10)[:, None] * (t[:, None] * (u - (noise - x))).square()).mean()
    torch.testing.assert_close(interval_loss(FLOW, found, x, noise, 0.0, t), expected)


def test_next_to_the_samples_nothing_explodes():
    x, noise, t = drawn((2, 2), 0, torch.float32), drawn((2, 2), 1, torch.float32), torch.tensor([0.5, 0.5 + 1e-6])
    assert interval_loss(FLOW, x, x, noise, 0.5, t).isfinite()


def test_of_gaussian_data_the_regression_on_the_target_is_the_exact_velocity():
    """Of a linear-Gaussian pair, slope and intercept of `E[target | x_t]` follow from covariances alone."""
    mean, std, s, t = 0.7, 0.5, 0.4, torch.tensor([0.65]).double()
    known = GaussianMixture(torch.tensor([[mean]]).double(), std, FLOW)
    a_s, v_s = 1 - s, s
    # The target is linear in (x_s, eps): its coefficients are read off at unit vectors.
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    for target, exact in (("unbiased", True), ("biased", False)):
        of_x, of_e = (
            float(interval_target(FLOW, x, e, s, t, target=target)[0] / interval_target(FLOW, x, e, s, t)[1])
            for x, e in ((one, zero), (zero, one))
        )
        ratio, sigma = (float(v) for v in FLOW.transition(torch.tensor([s]).double(), t))
        variance = a_s**2 * std**2 + v_s**2  # of x_s
        slope = (of_x * ratio * variance + of_e * sigma) / (ratio**2 * variance + sigma**2)
        x_t = torch.tensor([[-1.0], [0.0], [2.0]]).double()
        found = of_x * a_s * mean + slope * (x_t - ratio * a_s * mean)
        times = t.expand(3)
        true = FLOW.convert(known(x_t, times), x_t, times, "sample", "flow_prediction")
        assert torch.allclose(found, true, atol=1e-9) == exact


def test_of_a_mixture_the_mean_target_is_the_exact_velocity():
    """Figure of the paper: x_0 in {-1, 0, 1, 2}, samples at s = 0.5; the biased target is far off."""
    known = GaussianMixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]).double(), 0.02, FLOW)
    g, count, s = torch.Generator().manual_seed(0), 400_000, 0.5
    t = torch.full((count,), 0.75).double()
    clean = known.sample(count, g)
    x_s = 0.5 * clean + 0.5 * torch.randn(count, 1, generator=g).double()
    noise = torch.randn(count, 1, generator=g).double()
    x_t = add_more_noise(FLOW, x_s, noise, s, t)[:, 0]
    true = FLOW.convert(known(x_t[:, None], t), x_t[:, None], t, "sample", "flow_prediction")[:, 0]
    bins = ((x_t + 1.5) / 0.1).long().clamp(0, 31)
    counts = torch.bincount(bins, minlength=32)
    inside = counts > 5000
    errors = {}
    for target in ("unbiased", "biased"):
        scaled, sigma = interval_target(FLOW, x_s, noise, s, t, target=target)
        gap = (scaled / sigma)[:, 0] - true
        errors[target] = float((torch.bincount(bins, gap, 32) / counts)[inside].abs().max())
    assert errors["unbiased"] < 0.05
    assert errors["biased"] > 0.2


def test_the_gradient_is_that_of_the_reverse_kl():
    """`alpha_{t|s} (score_fake - score_real)` at x_t, and the velocities' form of the paper."""
    s, t, x_t = 0.4, torch.tensor([0.5, 0.8]).double(), drawn((2, 2), 0)
    real, fake = (GaussianMixture(drawn((3, 2), seed), 0.4, FLOW) for seed in (1, 2))
    found = interval_gradient(FLOW, real(x_t, t), fake(x_t, t), s, t)
    a_t, v_t = 1 - t[:, None], t[:, None]
    ratio = a_t / (1 - s)
    torch.testing.assert_close(found, ratio * (fake.score(x_t, t) - real.score(x_t, t)))
    u_real, u_fake = ((x_t - d(x_t, t)) / v_t for d in (real, fake))
    torch.testing.assert_close(found, a_t * ratio / (a_t * v_t + v_t**2) * (u_real - u_fake))


@pytest.mark.parametrize("weight", ["kl", "dmd"])
def test_it_rests_where_the_distributions_are_equal(weight):
    method = PhasedDMD(guidance=1.0, weight=weight)
    m = ready(method, grid(3, schedule=FLOW), fake=grid(3, schedule=FLOW))
    m.fake.module.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
    update = list(method.step(m, batch(), method.plan(FLOW)[0]))[1]
    gradients = torch.autograd.grad(update.loss, [p for p in m.student.parameters() if p.requires_grad])
    assert all(not g.any() for g in gradients)


def test_times_of_the_paper():
    wan = PhasedDMD(shift=5.0).plan(FLOW)
    assert wan[1].times == pytest.approx((1.0, 0.9375, 0.8333, 0.625), abs=1e-4)
    assert (wan[0].times, wan[0].end) == (wan[1].times[:2], wan[1].times[2])
    assert (wan[1].first, wan[1].end) == (2, 0.0)
    assert PhasedDMD(shift=3.0).plan(FLOW)[1].times == pytest.approx((1.0, 0.9, 0.75, 0.5), abs=1e-6)
    margin = PhasedDMD().margin
    assert [p.judged for p in wan] == [(0.5 + margin, 1.0), (margin, 1.0)]
    assert [p.judged for p in PhasedDMD(nested=False).plan(FLOW)] == [(0.5 + margin, 1.0), (margin, 0.5)]


def test_noise_is_added_above_the_end_of_the_phase():
    method = PhasedDMD(shift=3.0)
    m, many = ready(method), Batch(x=torch.zeros(2000, 2), id=torch.arange(2000))
    phase = method.plan(FLOW)[0]
    _, t, _ = method.renoise(FLOW, Draws(m, many), many.x, phase, "fake")
    assert phase.end < t.min() < 0.78
    assert 0.99 < t.max() <= 1


def test_one_phase_of_one_step_is_distribution_matching_of_one_step():
    method = PhasedDMD(steps=1, phases=1, guidance=1.0)
    student, b = network(), batch()
    m = ready(method, student=student)
    x, clean = method.generate(m, Draws(m, b), b, method.plan(FLOW)[0], "student")
    assert x.equal(student(b.x))
    assert clean.equal(x)
    fake = next(iter(method.step(m, b, method.plan(FLOW)[0])))
    draws = Draws(m, b)
    z = method.generate(m, draws, b, method.plan(FLOW)[0], "fake")[0].detach()
    x_t, t, noise = method.renoise(FLOW, draws, z, method.plan(FLOW)[0], "fake")
    u = FLOW.convert(m.fake(x_t, t=t), x_t, t, "sample", "flow_prediction")
    weight = (1 / t**2).clamp(max=10)[:, None] * t[:, None] ** 2
    torch.testing.assert_close(fake.loss, (weight * (u - (noise - z)).square()).mean())


@pytest.mark.parametrize("weight", ["kl", "dmd"])
def test_elements_are_a_factor_of_both_losses(weight):
    b, losses = batch(), {}
    for how in ("sum", "mean"):
        method = PhasedDMD(guidance=1.0, fake_steps=1, weight=weight, elements=how)
        m = ready(method)
        losses[how] = [update.loss for update in method.step(m, b, method.plan(FLOW)[0])]
    assert len(losses["sum"]) == 2
    for added, averaged in zip(losses["sum"], losses["mean"], strict=True):
        torch.testing.assert_close(added, 2 * averaged)


def test_a_phase_ends_where_the_next_begins_and_steps_are_eulers():
    method, b = PhasedDMD(steps=2, phases=2), batch()
    m = ready(method)
    first, second = method.plan(FLOW)
    x, x_0 = method.generate(m, Draws(m, b), b, first, "student")
    torch.testing.assert_close(x, b.x - 0.5 * (b.x - x_0))
    whole = method.generate(m, Draws(m, b), b, second, "student")[0]
    torch.testing.assert_close(whole, m.student(b.x))
    torch.testing.assert_close(whole, flow(m.student, b.x, FLOW, 2))


def test_only_the_last_step_has_a_graph_and_only_its_expert_a_gradient():
    method, b = PhasedDMD(), batch()
    m = ready(method, expert=1)
    calls, seen = [], set()
    m.student.module.denoiser.register_forward_hook(
        lambda _, __, kw, out: calls.append((kw["expert"], out)), with_kwargs=True
    )
    for m.step in range(12):
        calls.clear()
        x, _ = method.generate(m, Draws(m, b), b, method.plan(FLOW)[1], "student")
        assert [k for k, _ in calls] == [0, 0, 1, 1][: len(calls)]
        assert [out.requires_grad for _, out in calls] == [False] * (len(calls) - 1) + [True]
        seen.add(len(calls))
        part = method.generate(m, Draws(m, b[4:8]), b[4:8], method.plan(FLOW)[1], "student")[0]
        torch.testing.assert_close(part, x[4:])
    assert seen == {3, 4}
    x.sum().backward()
    first, second = m.student.module.denoiser.experts
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters())


def test_where_the_first_step_of_a_phase_is_the_last_it_goes_on_to_the_end():
    method, b = PhasedDMD(), batch()
    m, phase = ready(method), method.plan(FLOW)[0]
    found = set()
    for m.step in range(12):
        x, _ = method.generate(m, Draws(m, b), b, phase, "student")
        one = m.student(b.x, t=torch.ones(8), expert=0)
        found.add(bool(torch.allclose(x, 0.5 * (b.x + one), atol=1e-5)))
    assert found == {True, False}


def test_what_follows_comes_first_and_the_student_every_fifth_time():
    method, b = PhasedDMD(guidance=1.0), batch()
    m = ready(method)
    order = []
    for m.step in range(11):
        order += [update.role for update in method.step(m, b, method.plan(FLOW)[0])]
    assert order == ["fake", "student", *["fake"] * 5, "student", *["fake"] * 5, "student"]
    loss = next(iter(method.step(m, b, method.plan(FLOW)[0]))).loss
    grads = torch.autograd.grad(loss, [p for p in m.student.parameters() if p.requires_grad], allow_unused=True)
    assert all(g is None for g in grads)


def test_phases_begin_with_what_follows_as_it_was_and_leave_other_experts_alone():
    method = PhasedDMD(guidance=1.0, fake_steps=1)
    m, seen = Roles(teacher=network(0), student=network(0)), []
    data = Data(train=Noise((2,), 64))
    program = method.stages(m, data)
    optim = {"student": Optim("sgd", lr=1.0), "fake": Optim("sgd", lr=1.0)}
    for stage in program:
        if isinstance(stage, Train):
            seen.append([{k: v.clone() for k, v in m[n].module.state_dict().items()} for n in ("fake", "student")])
            seen[-1].append(next(p.requires_grad for p in m.student.module.denoiser.experts[0].parameters()))
            for name in ("student", "fake"):
                for p in m[name].parameters():
                    p.data += 0.1 * p.requires_grad  # as an update would
        else:
            m.convert(stage.role, stage.how, stage.of)
    (fake, first, one), (again, second, two) = seen
    assert (one, two) == (True, False)
    assert all(fake[k].equal(again[k]) for k in fake)
    assert all((first[k].equal(second[k])) == ("experts.1" in k or "waves" in k) for k in first)
    result = execute(
        method, Roles(teacher=network(0), student=network(0)), data, Engine(steps=2, device="cpu"), optim=optim
    )
    assert isinstance(result.roles.student.module, Sampler)


def test_a_given_follower_is_taken_up_anew_too():
    method, known = PhasedDMD(guidance=1.0, steps=2), grid(3, schedule=FLOW)
    m, given = Roles(teacher=known, student=network(0), fake=network(5)), network(5)
    for stage in method.stages(m, Data(train=Noise((2,), 64))):
        if isinstance(stage, Train):
            assert all(a.equal(b) for a, b in zip(m.fake.parameters(), given.parameters(), strict=True))
            for p in m.fake.parameters():
                p.data += 1
        else:
            m.convert(stage.role, stage.how, stage.of)


def test_adapters_learn_alone_and_are_merged():
    pytest.importorskip("peft")
    method = PhasedDMD(guidance=1.0, rank=2, fake_steps=1)
    data, z = Data(train=Noise((2,), 64)), batch().x
    m = Roles(teacher=network(0), student=network(0))
    before = m.teacher(z, t=torch.full((8,), 0.7))
    trained = []
    for stage in method.stages(m, data):
        if isinstance(stage, Train):
            trained.append({n.split(".")[2] for n, p in m.student.module.named_parameters() if p.requires_grad})
            assert all("lora" in n for n, p in m.student.module.named_parameters() if p.requires_grad)
        else:
            m.convert(stage.role, stage.how, stage.of)
    assert trained == [{"0"}, {"1"}]
    assert not any("lora" in name for name, _ in m.student.module.named_parameters())
    torch.testing.assert_close(m.student(z, t=torch.full((8,), 0.7)), before)


def test_one_expert_in_focus():
    experts, record = Focus(1)(ToExperts((0.5,))(network())[0])
    assert [p.requires_grad for p in experts.parameters()] == [False] * 6 + [True] * 6
    back, _ = Focus(0)(experts)
    assert [p.requires_grad for p in back.parameters()] == [True] * 6 + [False] * 6
    assert record == {"kind": "limbeck.convert.steps:focus", "expert": 1}
    with pytest.raises(UsageError, match="no such expert"):
        Focus(2)(experts)
    with pytest.raises(UsageError, match="no experts"):
        Focus(0)(network())
    x, t = torch.randn(4, 2), torch.full((4,), 0.7)
    assert Experts([network(), network(1)], (0.5,))(x, t, expert=1).equal(network(1)(x, t))


def test_a_student_comes_near():
    known = grid(2, 2.0, 0.3, FLOW)
    method = PhasedDMD(guidance=1.0, steps=2, fake_steps=2, weight="dmd")
    start = network(0, hidden=32)
    optimizer = torch.optim.Adam(start.parameters(), lr=5e-3)
    for i in range(150):
        m = Roles(student=start)
        m.step = i
        clean = Batch(x=known.sample(128, torch.Generator().manual_seed(i)), id=torch.arange(128))
        denoising_loss(m, "student", Draws(m, clean), clean.x, weight=lambda a, s: a**0).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = start.state_dict()
    fake = network(0, hidden=32)
    fake.load_state_dict(state)
    m = Roles(teacher=known, student=start, fake=fake)
    optim = {"student": Optim("adam", lr=2e-3), "fake": Optim("adam", lr=5e-3)}
    z, true = (
        torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)),
        known.sample(1000, torch.Generator().manual_seed(8)),
    )
    with torch.no_grad():
        first = energy_distance(flow(start, z, FLOW, 2), true)
    engine = Engine(steps=200, batch_size=64, device="cpu")
    result = execute(method, m, Data(train=Noise((2,), 4096)), engine, optim=optim)
    with torch.no_grad():
        assert energy_distance(result.roles.student.module.eval()(z), true) < 0.5 * first


def test_what_does_not_fit():
    with pytest.raises(UsageError, match="cannot learn"):
        PhasedDMD().check(Roles(teacher=grid(3, schedule=FLOW), student=network()), batch())
    other = Denoiser(lambda x, t: x[:, :1], FLOW, "sample")
    with pytest.raises(UsageError, match="other samples"):
        PhasedDMD().check(Roles(teacher=network(), student=other), batch())
    cosine = Denoiser(TimeMLP(2, 8), Cosine(), "flow_prediction")
    with pytest.raises(UsageError, match="different noise schedules"):
        PhasedDMD().check(Roles(teacher=network(), student=cosine), batch())
    for fields in (
        {"steps": 5}, {"steps": 0}, {"phases": 0}, {"shift": 0.0}, {"fake_steps": 0}, {"weight": "x"}, {"target": "x"},
        {"clamp": 0.0}, {"margin": 0.0}, {"margin": 0.6}, {"rank": -1}, {"lora_alpha": 0.0},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="out of range"):
            PhasedDMD(**fields)
