"""MDT-dist: the average velocity and its derivative, both losses where everything is known, and what is detached."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.diffusion import Cosine, Denoiser, Draws, GaussianMixture, RectifiedFlow, few_step, flow, guided, ring
from limbeck.diffusion.derivative import bounded, total_derivative
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.mdt_dist.method import MDTDist, velocity
from limbeck.nn.time_mlp import TimeMLP

FLOW = RectifiedFlow()
MEAN, STD = 0.7, 0.5


def network(seed=0, classes=0, hidden=8):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, hidden, 2, classes=classes), FLOW, "flow_prediction", null=classes or None)


def batch(n=8, classes=0):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    return Batch(x=x, id=torch.arange(n), **({"y": torch.arange(n) % classes} if classes else {}))


class Exact(nn.Module):
    """The average velocity of one Gaussian, from the flow's own map: `x_0 = m + s (x_t - (1 - t) m) / sqrt(variance of x_t)`."""

    schedule, null = FLOW, None

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t=None, condition=None):
        x_t, t = FLOW.from_noise(x_t, t)
        t = t.view(-1, *(1,) * (x_t.ndim - 1))
        spread = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        return MEAN + STD * (x_t - (1 - t) * MEAN) / spread + t * self.offset


def exact_roles():
    known = GaussianMixture(torch.full((1, 2), MEAN, dtype=torch.float64), STD, FLOW)
    return Roles(teacher=known, student=Exact())


def noisy(m, b, method):
    t = method.times(Draws(m, b)).double()
    noise = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(5)).double()
    return t, noise, FLOW.add_noise(b.x.double(), noise, t)


def test_the_exact_average_velocity_says_the_exact_velocity():
    """`phi + t dphi/dt = v`: exactly by forward-mode differentiation, to the order of dt by differences."""
    m, b = exact_roles(), batch(64)
    t, noise, x_t = noisy(m, b, MDTDist())
    v = velocity(m.teacher, x_t, t)
    gaps = {}
    for name, options in {"jvp": {"how": "jvp"}, "0.01": {"dt": 0.01}, "0.001": {"dt": 0.001}}.items():
        slope = total_derivative(lambda x, t: velocity(m.student, x, t), x_t, t, v, **options)
        gaps[name] = float((velocity(m.student, x_t, t) + t[:, None] * slope - v).abs().max().detach())
    assert gaps["jvp"] < 1e-12
    assert gaps["0.001"] < 0.2 * gaps["0.01"] < 0.02
    exact = MDTDist(derivative="jvp")
    loss = exact.match(m, b.x.double(), noise, t, None)
    assert loss.item() < 1e-20
    taught, own = exact.velocities(m, b.x.double(), noise, t, None)
    assert (own - taught).abs().max() < 1e-12
    loss.backward()
    assert m.student.module.offset.grad.abs() < 1e-9


def test_differences_are_those_of_the_path():
    """`phi + (t - dt) (phi - phi') / dt = v` where one step of Euler's method leads to the same x_0, and the other way round."""
    x, t, v, dt = torch.randn(4, 2).double(), torch.full((4,), 0.6).double(), torch.randn(4, 2).double(), 0.01
    before = torch.randn(4, 2).double()  # phi at (x - v dt, t - dt)
    x_0 = (x - dt * v) - (t - dt)[:, None] * before
    phi = (x - x_0) / t[:, None]
    torch.testing.assert_close(phi + (t - dt)[:, None] * (phi - before) / dt, v)
    calls = []

    def f(at, time):
        calls.append((at, time))
        return before

    slope = total_derivative(f, x, t, v, dt=dt, value=phi)
    torch.testing.assert_close(slope, (phi - before) / dt)
    assert len(calls) == 1
    torch.testing.assert_close(calls[0][0], x - dt * v)
    torch.testing.assert_close(calls[0][1], t - dt)


def test_both_derivatives_agree_on_a_network_and_carry_no_gradient():
    m = Roles(student=network().double())
    x, t, v = torch.randn(6, 2).double(), torch.linspace(0.2, 0.9, 6).double(), torch.randn(6, 2).double()

    def phi(at, time):
        return velocity(m.student, at, time)

    exact = total_derivative(phi, x, t, v, how="jvp")
    near = total_derivative(phi, x, t, v, dt=1e-6)
    torch.testing.assert_close(near, exact, rtol=1e-3, atol=1e-3)
    assert not exact.requires_grad
    assert not near.requires_grad
    assert not total_derivative(phi, x, t, v, value=phi(x, t)).requires_grad


def test_half_precision_is_subtracted_in_full():
    def f(x, t):
        return (100 + t[:, None] * x).half()

    x, t = torch.ones(1, 1), torch.tensor([0.5])
    assert total_derivative(f, x, t, torch.zeros(1, 1)).dtype == torch.float32


def test_differences_are_not_of_numbers_in_half_precision():
    net = torch.nn.Linear(3, 2)
    x, t, v = torch.randn(4, 3), torch.full((4,), 0.6), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        slope = total_derivative(lambda x, t: net(x), x, t, v, value=net(x))
        slope_ = total_derivative(lambda x, t: net(x), x.bfloat16(), t, v.bfloat16())
    exact = (v @ net.weight.T).detach()
    torch.testing.assert_close(slope, exact, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(slope_, exact, rtol=2e-2, atol=1e-2)


def test_bounded_derivatives_keep_their_direction_and_are_shorter_than_one():
    d = torch.randn(5, 2, 3) * torch.tensor([0.0, 0.01, 1.0, 10.0, 1e4]).view(-1, 1, 1)
    found = bounded(d)
    assert (found.flatten(1).norm(dim=1) < 1 + 1e-6).all()
    torch.testing.assert_close(torch.cosine_similarity(found.flatten(1), d.flatten(1))[1:], torch.ones(4))
    assert not found[0].any()


def test_at_small_times_the_target_is_the_velocity():
    """`t dphi/dt` goes with t: near 0 the loss is the flow's own, at other times it is not."""
    m, b = Roles(teacher=ring(8, schedule=FLOW), student=network()), batch()
    method, noise = MDTDist(derivative="jvp"), torch.randn(8, 2, generator=torch.Generator().manual_seed(4))

    def apart(time):
        t = torch.full((8,), time)
        x_t = FLOW.add_noise(b.x, noise, t)
        plain = (velocity(m.student, x_t, t) - velocity(m.teacher, x_t, t)).square().mean()
        return float((method.match(m, b.x, noise, t, None) / plain - 1).abs().detach())

    assert apart(1e-4) < 0.01
    assert apart(0.5) > 0.1


def test_velocity_matching_has_its_gradient_through_phi_alone():
    m, b, method = Roles(teacher=ring(8, schedule=FLOW), student=network()), batch(), MDTDist()
    t, noise = method.times(Draws(m, b)), torch.randn(8, 2)
    parameters = list(m.student.parameters())
    found = torch.autograd.grad(method.match(m, b.x, noise, t, None), parameters)
    x_t = FLOW.add_noise(b.x, noise, t)
    v = velocity(m.teacher, x_t, t)
    phi = velocity(m.student, x_t, t)
    target = v - t[:, None] * method.slope(m, x_t, t, v, None, phi)
    expected = torch.autograd.grad((phi - target.detach()).square().mean(1).mean(), parameters)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("variant", "elements"), [("paper", "mean"), ("paper", "sum"), ("code", "mean")])
def test_the_gradient_of_velocity_distillation_on_samples(variant, elements):
    """`-(1 - t) (u - v)`; the code's squares give `-2 (u - v)`."""
    method = MDTDist(variant=variant, elements=elements)
    m, b = Roles(teacher=ring(8, schedule=FLOW), student=network()), batch()
    made = []
    m.student.module.register_forward_hook(
        lambda _, args, kw, out: made.append((args[0], kw["t"], out)), with_kwargs=True
    )
    loss = sum(update.loss for update in method.step(m, b))
    x = next(out for z, t, out in made if out.requires_grad and bool((t == 1).all()))
    assert sum(out.requires_grad for _, _, out in made) == 2  # phi at real samples, and the student's samples
    (found,) = torch.autograd.grad(loss, x)
    draws = Draws(m, b)
    t, noise = method.times(draws), draws.normal("noise", b.x)  # those of velocity matching
    x_t, before = FLOW.add_noise(x.detach(), noise, t), t - method.dt
    with torch.no_grad():
        v, phi = velocity(m.teacher, x_t, t), velocity(m.student, x_t, t)
        u = phi + t[:, None] * (phi - velocity(m.student, x_t - method.dt * v, before)) / method.dt
    factor = 2.0 if variant == "code" else 1 - t[:, None]
    expected = -factor * (u - v) / 8 / (2 if elements == "mean" else 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("away", "sign"), [(2.0, 1.0), (-2.0, -1.0), (0.0, 0.0)])
def test_samples_move_towards_the_data(away, sign):
    """The student makes N(m, s^2) and knows its velocity; the data are the same, moved: its samples go where they are."""
    data = GaussianMixture(torch.full((1, 2), MEAN + away, dtype=torch.float64), STD, FLOW)
    m, method = Roles(teacher=data, student=Exact()), MDTDist(derivative="jvp")
    b = Batch(x=torch.zeros(2000, 2, dtype=torch.float64), id=torch.arange(2000))
    t = method.times(Draws(m, b)).double()
    v, u = method.velocities(m, Exact()(torch.randn_like(b.x)).detach(), torch.randn_like(b.x), t, None)
    assert float((u - v).mean().sign()) == sign or (u - v).abs().max() < 1e-9
    last = list(method.step(m, b))[1]
    before = m.student.module.offset.detach().clone()
    last.loss.backward()
    torch.optim.SGD(m.student.parameters(), lr=0.1).step()
    moved = float(m.student.module.offset.detach() - before)
    assert moved * sign > 0.01 if sign else abs(moved) < 1e-9


def test_nothing_moves_where_the_student_is_right():
    m, method = exact_roles(), MDTDist(derivative="jvp")
    b = Batch(x=batch().x.double(), id=torch.arange(8))
    for update in method.step(m, b):
        update.loss.backward()
    assert m.student.module.offset.grad.abs() < 1e-5  # times are fp32


def test_guidance_of_trellis_is_one_more():
    """`(1 + w) c - w n = n + (1 + w) (c - n)`: scale `1 + w`."""
    known = ring(8, schedule=FLOW, classes=4)
    x, t, y, w = torch.randn(6, 2), torch.full((6,), 0.6), torch.arange(6) % 4, 3.0
    c, n = known(x, t, y), known(x, t, known.null_like(y))
    torch.testing.assert_close(guided(known, x, t, y, known.null_like(y), 1 + w), (1 + w) * c - w * n)
    m = Roles(teacher=known)
    v_c, v_n = (velocity(m.teacher, x, t, label) for label in (y, known.null_like(y)))
    torch.testing.assert_close(velocity(m.teacher, x, t, y, 1 + w), (1 + w) * v_c - w * v_n, rtol=1e-4, atol=1e-4)


def test_each_loss_has_its_own_guidance():
    known, b = ring(8, schedule=FLOW, classes=4), batch(classes=4)
    m = Roles(teacher=known, student=network(classes=4))

    def losses(**fields):
        logs = {name: value for update in MDTDist(**fields).step(m, b) for name, value in update.logs.items()}
        return logs["matching"].item(), logs["gap"].item()

    same, more, other = (
        losses(guidance=2.0),
        losses(guidance=2.0, vd_guidance=4.0),
        losses(guidance=3.0, vd_guidance=4.0),
    )
    assert same[0] == more[0] != other[0]
    assert same[1] != more[1] == other[1]


def test_without_the_second_loss_it_is_the_first_alone():
    m, b = Roles(teacher=ring(8, schedule=FLOW), student=network()), batch()
    draws, method = Draws(m, b), MDTDist(vd_weight=0.0)
    alone = method.match(m, b.x, draws.normal("noise", b.x), method.times(draws), None)
    late = MDTDist(vd_start=0.5)
    m.total = 10
    for one in (method, late):
        (update,) = one.step(m, b)
        assert update.loss.equal(alone)
        assert update.apply
    m.step = 5
    first, second = late.step(m, b)
    assert not first.apply  # its graph is gone before the second's is made
    assert second.apply
    assert "gap" in second.logs


def test_times_are_as_published():
    m, many = Roles(), Batch(x=torch.zeros(20_000, 1), id=torch.arange(20_000))
    t = MDTDist().times(Draws(m, many))
    expected = torch.sigmoid(1 + torch.randn(200_000, generator=torch.Generator().manual_seed(0))).quantile(0.3)
    assert t.quantile(0.3).item() == pytest.approx(0.01 + 0.99 * expected.item(), abs=0.01)
    even = MDTDist(time="uniform").times(Draws(m, many))
    assert even.mean().item() == pytest.approx(0.505, abs=0.01)
    for found in (t, even):
        assert found.min() > 0.01
        assert found.max() <= 1


def test_a_finished_student_takes_steps_of_average_velocities():
    x = batch().x
    net = network()
    t = torch.tensor([1.0, 0.6])
    middle = x - 0.4 * net.net(x, torch.ones(8))
    expected = middle - 0.6 * net.net(middle, torch.full((8,), 0.6))
    torch.testing.assert_close(few_step(net, x, FLOW, t, noise="ddim"), expected)
    data = Data(train=TensorSource(torch.randn(64, 2)))
    m = Roles(teacher=network(), student=network())
    result = execute(
        MDTDist(steps=2, ema=0.5), m, data, Engine(steps=2, device="cpu"), optim={"student": Optim("sgd", lr=0.01)}
    )
    student = result.roles.student.module.eval()
    assert student.times.tolist() == [1.0, 0.5]
    torch.testing.assert_close(student(x), flow(student, x, FLOW, 2))
    assert "student_average" in result.roles


def test_a_student_comes_near_in_one_step():
    known = ring(4, 2.0, 0.3, FLOW)
    data = TensorSource(known.sample(4096, torch.Generator().manual_seed(0)))
    m = Roles(teacher=known, student=network(hidden=32))
    optim = {"student": Optim("adam", lr=5e-3, schedule="cosine", final=0.05)}
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9))
    true = known.sample(1000, torch.Generator().manual_seed(8))
    at_mean = energy_distance(known(z), true)
    result = execute(
        MDTDist(vd_start=0.3), m, Data(train=data), Engine(steps=400, batch_size=128, device="cpu"), optim=optim
    )
    with torch.no_grad():
        assert energy_distance(result.roles.student.module.eval()(z), true) < 0.3 * at_mean


def test_what_does_not_fit():
    for role in ("teacher", "student"):
        m = Roles(**{**{"teacher": network(), "student": network()}, role: nn.Linear(2, 2)})
        with pytest.raises(UsageError, match="no denoiser"):
            MDTDist().check(m, batch())
    other = Denoiser(TimeMLP(2, 8), Cosine(), "flow_prediction")
    with pytest.raises(UsageError, match="rectified flows"):
        MDTDist().check(Roles(teacher=other, student=copy.deepcopy(other)), batch())
    less = Denoiser(lambda x, t: x[:, :1], FLOW, "sample")
    with pytest.raises(UsageError, match="other samples"):
        MDTDist().check(Roles(teacher=network(), student=less), batch())
    for fields in (
        {"steps": 0}, {"vd_weight": -1.0}, {"vd_start": 1.0}, {"time": "x"}, {"derivative": "x"}, {"dt": 0.0}, {"dt": 0.5},
        {"variant": "x"}, {"elements": "x"}, {"ema": 1.0},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="out of range"):
            MDTDist(**fields)
