"""DisBack: the marks of the way, the order of the aims, what gradient they give, and what it is without a way."""

import copy

import pytest
import torch

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import EDM, Denoiser, Draws, GaussianMixture, RectifiedFlow, dmd_gradient, ring, surrogate
from limbeck.diffusion.matching import follower_weight
from limbeck.diffusion.scores import denoising_loss, matching_gradient, noisy, predicted
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.disback.method import DisBack
from limbeck.nn.time_mlp import TimeMLP

FLOW = RectifiedFlow()
SGD = Optim("sgd", lr=0.05)


def network(seed=0, hidden=8, classes=0):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, hidden, 2, classes=classes), FLOW, "flow_prediction", null=classes or None)


def batch(n=8):
    return Batch(x=torch.randn(n, 2, generator=torch.Generator().manual_seed(3)), id=torch.arange(n))


def run(method, m, steps, optim=SGD, size=16):
    optim = dict.fromkeys(("student", "fake"), optim)
    return execute(
        method, m, Data(train=Noise((2,), 64)), Engine(steps=steps, batch_size=size, device="cpu"), optim=optim
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_without_marks_it_is_distribution_matching():
    teacher, b = network(), batch()
    m = Roles(teacher=teacher, student=network(1), fake=network(2))
    draws, z = Draws(m, b), b.x
    first, second = DisBack(nodes=()).step(m, b)
    x = m.student(z)
    x_t, t = noisy(FLOW, draws, "matching", x.detach(), 0.02, 0.98)
    gap = dmd_gradient(x, predicted(m.teacher, x_t, t, None), predicted(m.fake, x_t, t, None))
    torch.testing.assert_close(first.loss, surrogate(x, gap))
    expected = denoising_loss(m, "fake", draws, x, times=(0.001, 1.0), weight=follower_weight(FLOW))
    torch.testing.assert_close(second.loss, expected)
    assert [update.role for update in (first, second)] == ["student", "fake"]


def test_a_whole_run_without_marks_is_a_loop_of_its_steps():
    method, m = DisBack(nodes=()), Roles(teacher=network(), student=network(1))
    run(method, m, 3, size=64)
    own = Roles(teacher=network(), student=network(1), fake=network())
    optimizers = {n: torch.optim.SGD(own[n].parameters(), lr=0.05) for n in ("student", "fake")}
    order = lambda epoch: torch.randperm(64, generator=torch.Generator().manual_seed(epoch))  # noqa: E731
    for own.step in range(3):
        for update in method.step(own, Noise((2,), 64).batch(order(own.step), own.step)):
            update.backward(own)
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
    assert same(m.student.module, own.student.module)
    assert same(m.fake.module, own.fake.module)


def test_marks_are_what_follows_at_these_steps_and_the_student_stays():
    student = network(1)
    found = {}
    for nodes in ((2, 5, 9), (2,), (5,), (9,)):
        m = Roles(teacher=network(), student=copy.deepcopy(student))
        program = DisBack(nodes=nodes, switch=1).stages(m, Data(train=Noise((2,), 64)))
        run(_Only(list(_until(program, "record"))), m, 99)
        found[nodes] = m
        assert same(m.student.module, student)
        assert same(m.teacher.module, network())
    whole = found[2, 5, 9]
    assert same(whole.target_0.module, found[2,].fake.module)
    assert same(whole.target_1.module, found[5,].fake.module)
    assert same(whole.fake.module, found[9,].fake.module)
    assert not same(whole.target_0.module, network())
    assert "target_2" not in whole


def _until(program, name):
    for stage in program:
        yield stage
        if stage.name == name:
            return


class _Only(DisBack):
    """Some stages of a program."""

    def __init__(self, given):
        super().__init__()
        object.__setattr__(self, "given", given)

    def stages(self, m, data):
        yield from (stage for stage in self.given)


def test_each_aim_has_its_steps_and_the_teacher_the_rest():
    method = DisBack(nodes=(1, 2, 3, 4), switch=2)
    assert method.aims == ("target_2", "target_1", "target_0", "teacher")
    assert DisBack(nodes=(7,)).aims == DisBack(nodes=()).aims == ("teacher",)
    m, heard = Roles(teacher=network(), student=network(1)), []

    class Heard(DisBack):
        def step(self, m, batch):
            hooks = [m[n].module.register_forward_hook(lambda *_, n=n: heard.append(n)) for n in self.aims]
            yield from super().step(m, batch)
            for hook in hooks:
                hook.remove()

    run(Heard(nodes=(1, 2, 3, 4), switch=2), m, 10)
    assert heard == [name for name in method.aims for _ in range(2)] + ["teacher"] * 2
    assert heard.index("target_1") == 2


def test_the_released_program_aims_at_the_teacher_from_the_beginning():
    student, marks = network(1), (1, 2, 3, 4)
    code, control = (Roles(teacher=network(), student=copy.deepcopy(student)) for _ in range(2))
    run(DisBack(nodes=marks, switch=2, variant="code"), code, 10)
    run(DisBack(nodes=marks[-1:], switch=2), control, 10)  # the control of the paper: what follows has learned before
    assert same(code.student.module, control.student.module)
    assert not any(name.startswith("target") for name in code)
    paper = Roles(teacher=network(), student=copy.deepcopy(student))
    run(DisBack(nodes=marks, switch=2), paper, 10)
    assert not same(code.student.module, paper.student.module)


def test_elements_are_a_factor_of_both_losses():
    b, losses = batch(), {}
    for how in ("sum", "mean"):
        m = Roles(teacher=network(), student=network(1), fake=network(2))
        method = DisBack(nodes=(), elements=how)
        losses[how] = [*(update.loss for update in method.step(m, b)), method.record(m, b).loss]
    for added, averaged in zip(losses["sum"], losses["mean"], strict=True):
        torch.testing.assert_close(added, 2 * averaged)


def test_the_last_copy_would_give_no_gradient():
    """What follows is that copy: so the first aim is the one before it."""
    m = Roles(teacher=network(), student=network(1), fake=network(2), target_4=network(2), target_3=network(3))
    x = m.student(batch().x)
    for gradient in ("dmd", "vsd"):
        how = {"teacher": "target_4", "gradient": gradient}
        assert not matching_gradient(m, Draws(m, batch()), x, **how).any()
        assert matching_gradient(m, Draws(m, batch()), x, **(how | {"teacher": "target_3"})).any()


@pytest.mark.parametrize("gradient", ["dmd", "vsd"])
def test_of_gaussians_the_gradient_is_the_distance_of_the_means(gradient):
    """Unit Gaussians at m: `D = m + alpha (x_t - alpha m) / (alpha^2 + sigma^2)`, so the gap is `sigma^2 (m_q - m_i) / (...)`."""
    ends = {f"target_{i}": GaussianMixture(torch.full((1, 1), v), 1.0, FLOW) for i, v in enumerate((1.0, 4.0, -2.0))}
    m = Roles(teacher=ends["target_0"], fake=GaussianMixture(torch.zeros(1, 1), 1.0, FLOW), **ends)
    b = Batch(id=torch.arange(500))
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    x_t, t = noisy(FLOW, Draws(m, b), "matching", x, 0.02, 0.98)
    alpha, sigma = FLOW.factors(t, x)
    for name, mean in (("target_0", 1.0), ("target_1", 4.0), ("target_2", -2.0)):
        found = matching_gradient(m, Draws(m, b), x, teacher=name, gradient=gradient)
        gap = -mean * sigma**2 / (alpha**2 + sigma**2)
        scale = 1 / (x - ends[name](x_t, t)).abs() if gradient == "dmd" else alpha * sigma
        torch.testing.assert_close(found, gap * scale, rtol=2e-3, atol=1e-4)
        assert (found.sign() == -torch.tensor(mean).sign()).all()  # x moves against it, towards the mean


def test_vsd_is_the_gap_of_noise_predictions():
    m, b = Roles(teacher=network(), fake=network(1)), batch()
    x_t, t = noisy(FLOW, Draws(m, b), "matching", b.x, 0.02, 0.98)
    real, fake = (FLOW.convert(predicted(m[n], x_t, t, None), x_t, t, "sample", "epsilon") for n in ("teacher", "fake"))
    expected = FLOW.factors(t, b.x)[1] ** 2 * (real - fake)
    torch.testing.assert_close(matching_gradient(m, Draws(m, b), b.x, gradient="vsd"), expected, rtol=1e-4, atol=1e-6)


class Affine(torch.nn.Module):
    """A network without bends."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)
        torch.nn.init.eye_(self.net.weight)
        torch.nn.init.zeros_(self.net.bias)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


def test_the_way_of_an_affine_network_leads_to_its_least_squares():
    """On the first student's samples the loss falls along the way, fast at first."""
    affine, student = (Denoiser(Affine(), FLOW, "sample") for _ in range(2))
    student.net.net.bias.data -= 3
    m = Roles(teacher=affine, student=copy.deepcopy(student))
    method = DisBack(nodes=(5, 15, 40, 200), switch=1, fake_times=(0.3, 1.0))
    run(method, m, 4, size=64)
    b = Noise((2,), 2000, seed=5).batch(torch.arange(2000), 0)
    x = student(b.x).detach()
    losses = []
    for name in ("teacher", "target_0", "target_1", "target_2", "fake"):
        m[name].freeze()
        how = {"times": method.fake_times, "weight": follower_weight(FLOW)}
        losses.append(float(denoising_loss(m, name, Draws(m, Batch(id=b.id)), x, **how)))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[1] > losses[1] - losses[4]


def test_steps_of_the_student_are_one_in_so_many():
    m = Roles(teacher=network(), student=network(1), fake=network(2))
    seen = []
    for m.step in range(6):
        before = torch.is_grad_enabled()
        seen.append([update.role for update in DisBack(nodes=(), fake_steps=3).step(m, batch())])
        assert torch.is_grad_enabled() is before
    assert seen == [["student", "fake"], ["fake"], ["fake"]] * 2


def test_under_edm_what_follows_learns_by_its_own_weight():
    weight = follower_weight(EDM(data=2.0))
    torch.testing.assert_close(weight(torch.ones(2), torch.tensor([0.5, 80.0])), torch.tensor([4.25, 0.25 + 80.0**-2]))
    assert follower_weight(FLOW)(torch.tensor([1.0, 0.6]), torch.tensor([1e-6, 0.3])).tolist() == [
        1e4,
        pytest.approx(4),
    ]


def test_a_student_far_off_comes_near():
    known = ring(8, 2.0, 0.2, FLOW)
    m = Roles(teacher=known, student=network(0, 32), fake=network(0, 32))
    m.student.module.net.last[1].bias.data += 1.5
    z, true = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)), known.sample(1000)

    def distance():
        with torch.no_grad():
            return energy_distance(m.student(z), true)

    first = distance()
    run(DisBack(nodes=(5, 20), switch=20, ema=0.9), m, 300, Optim("adam", lr=3e-3), 64)
    assert distance() < 0.4 * first
    assert {"student_average", "target_0"} <= set(m)


@pytest.mark.parametrize("fields", [
    {"nodes": (3, 3)}, {"nodes": (0, 4)}, {"nodes": (5, 4)}, {"switch": 0}, {"gradient": "x"}, {"fake_steps": 0},
    {"times": (0.5, 0.4)}, {"fake_times": (0.0, 1.0)}, {"dropout": 1.0}, {"ema": -0.1},
])  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        DisBack(**fields)


def test_models_and_runs_that_do_not_fit():
    with pytest.raises(UsageError, match="cannot learn"):
        DisBack().check(Roles(teacher=ring(8, schedule=FLOW), student=network()), batch())
    other = Denoiser(lambda x, t: x[:, :1], FLOW, "sample")
    with pytest.raises(UsageError, match="other samples"):
        DisBack().check(Roles(teacher=network(), student=other), batch())
    with pytest.raises(UsageError, match="ends before"):
        run(DisBack(nodes=(1, 2, 3), switch=4), Roles(teacher=network(), student=network(1)), 8)
