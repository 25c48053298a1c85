"""MCM: the consistency of latent models, what of a clip is motion, and a discriminator of single frames."""

import pytest
import torch
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.fresh import Fresh
from limbeck.convert.record import rebuild
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.diffusion import Cosine, Denoiser, Draws, GaussianMixture, RectifiedFlow, Table
from limbeck.diffusion.consistency import (
    boundary,
    consistency_pair,
    consistent,
    pure_noise,
    sampling_times,
    solver_times,
)
from limbeck.engine.run import execute
from limbeck.losses.adversarial import discriminator_loss, generator_loss
from limbeck.losses.huber import pseudo_huber
from limbeck.methods.mcm.method import MCM
from limbeck.nn.discriminator import FeatureDiscriminator
from limbeck.nn.motion import SpatialHead, butterworth, frames_at, motion_of
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import seeded

TABLE = Table.scaled_linear()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def network(seed=0, schedule=None, classes=0):
    net = lambda: TimeMLP(12, 8, 2, classes=classes)  # noqa: E731
    return seeded(seed, lambda: Denoiser(net(), schedule or Cosine(), "v_prediction", null=classes or None))


def batch(n=6, **more):
    return Batch(x=drawn(n, 4, 3, seed=1), id=torch.arange(n), **more)


def roles(motion="diff", adversarial=False):
    m = Roles(teacher=network(), student=network(1), student_average=network(2))
    if motion == "learn":
        m.head, m.head_average = SpatialHead(3, 1), SpatialHead(3, 1)
    if adversarial:
        m.discriminator = seeded(3, lambda: FeatureDiscriminator([3], 8))
    return m


def plain(**options):
    return MCM(**{"frames": 1, "lora": 0, "motion": "raw", "adversarial_weight": 0.0, "mixed": 0.0, **options})


# Consistency.


def test_the_boundary():
    skip, out = boundary(torch.tensor([0.0, 19 / 999, 1.0]), 4.0)
    assert (skip[0], out[0]) == (1, 0)
    assert skip[1].item() == pytest.approx(0.25 / (76**2 + 0.25), rel=1e-4)  # 4e-5: hard
    assert out[1].item() == pytest.approx(76 / (76**2 + 0.25) ** 0.5)
    x = drawn(2, 4, 3)
    assert consistent(network(), x, torch.zeros(2)).equal(x)
    f = consistent(network(), x, torch.full((2,), 0.5), scaling=4.0)
    torch.testing.assert_close(f, network()(x, torch.full((2,), 0.5)), atol=1e-5, rtol=1e-4)


def test_the_times():
    times = solver_times(TABLE)
    assert (999 * times).round().tolist() == [0, *range(19, 1000, 20)]
    assert (999 * sampling_times(TABLE, 8)).round().tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    assert (999 * sampling_times(TABLE, 1)).round().tolist() == [999]
    assert set(sampling_times(TABLE, 4).tolist()) <= set(times.tolist())
    assert TABLE.alpha(times[:1]).square().item() == pytest.approx(TABLE.alphas_cumprod[0])  # not 1: abar_0
    assert solver_times(RectifiedFlow(), 4)[0] == 0
    shifted = RectifiedFlow(shift=3.0)
    torch.testing.assert_close(sampling_times(shifted, 4), shifted.step_at(sampling_times(RectifiedFlow(), 4)))
    with pytest.raises(UsageError, match="no such steps"):
        solver_times(TABLE, 1000)
    with pytest.raises(UsageError, match="no such steps"):
        sampling_times(TABLE, 60)


class Known(nn.Module):
    """A teacher that knows the clean sample."""

    def __init__(self, x_0, schedule):
        super().__init__()
        self.x_0, self.schedule = x_0, schedule

    def forward(self, x_t, t=None, condition=None):
        return self.x_0


def seen_by(schedule, teacher, x_0, noise, index, **options):
    """What student and target are called with."""
    calls = []

    def student(x_t, t, condition):
        calls.append((x_t, t))
        return torch.zeros_like(x_t)

    m = Roles(teacher=teacher)
    consistency_pair(m.teacher, student, student, x_0, noise, index, **options)
    (x_s, s), (x_t, t) = calls  # the target first
    return x_t, t, x_s, s


def test_a_step_of_a_teacher_that_knows_stays_on_the_path():
    x_0, noise, index = drawn(3, 4, 3), drawn(3, 4, 3, seed=1), torch.tensor([0, 10, 48])
    x_t, t, x_s, s = seen_by(TABLE, Known(x_0, TABLE), x_0, noise, index)
    assert (999 * t).round().tolist() == [19, 219, 979]
    assert (999 * s).round().tolist() == [0, 199, 959]
    torch.testing.assert_close(x_t, TABLE.add_noise(x_0, noise, t))
    torch.testing.assert_close(x_s, TABLE.add_noise(x_0, noise, s), atol=2e-4, rtol=1e-3)


def test_a_step_under_one_gaussian_scales():
    schedule = Cosine()
    teacher = GaussianMixture(torch.zeros(1, 12), 0.7, schedule)
    x_0, noise, index = drawn(2, 4, 3), drawn(2, 4, 3, seed=1), torch.tensor([20, 30])
    x_t, t, x_s, s = seen_by(schedule, teacher, x_0, noise, index)
    (a, b), (c, d) = schedule.factors(t, x_t), schedule.factors(s, x_t)
    mean = a * 0.49 * x_t / (a**2 * 0.49 + b**2)
    torch.testing.assert_close(x_s, c * mean + d * (x_t - a * mean) / b, atol=1e-5, rtol=1e-4)


def test_the_last_step_begins_at_noise():
    noise, index = drawn(2, 4, 3, seed=1), torch.tensor([49, 48])
    found = [seen_by(TABLE, Known(x, TABLE), x, noise, index)[0] for x in (drawn(2, 4, 3), drawn(2, 4, 3, seed=5))]
    torch.testing.assert_close(found[0][0], noise[0])
    assert found[0][0].equal(found[1][0])
    assert not found[0][1].equal(found[1][1])
    torch.testing.assert_close(pure_noise(Cosine(), noise)[0], noise)


def test_guidance_is_that_of_lcm():
    """D^w = D_c + w (D_c - D_null): its scale is 1 + w; the noise is guided by the same rule."""
    teacher = network(0, TABLE, classes=3)
    m, x_0, noise = Roles(teacher=teacher), drawn(2, 4, 3), drawn(2, 4, 3, seed=1)
    y, index, w = torch.tensor([0, 2]), torch.tensor([5, 30]), torch.tensor([5.0, 12.0])
    calls = []

    def student(x_t, t, condition):
        calls.append((x_t, t))
        return x_t

    consistency_pair(m.teacher, student, student, x_0, noise, index, y, scale=1 + w)
    (x_s, s), (x_t, t) = calls
    with_it, without = teacher(x_t, t, y), teacher(x_t, t, teacher.null_like(y))
    factor = w.view(2, 1, 1)

    def noise_of(x):
        return TABLE.convert(x, x_t, t, "sample", "epsilon")

    d = with_it + factor * (with_it - without)
    e = noise_of(with_it) + factor * (noise_of(with_it) - noise_of(without))
    torch.testing.assert_close(x_s, TABLE.add_noise(d, e, s), atol=1e-3, rtol=1e-3)


def test_each_sample_has_its_own_w_in_the_range(monkeypatch):
    seen = {}
    monkeypatch.setattr("limbeck.methods.mcm.method.consistency_pair", lambda *a, **kw: seen.update(kw, index=a[5]))
    b = Batch(x=drawn(3000, 4, 3), id=torch.arange(3000))
    m = roles()
    plain(guidance=(5.0, 15.0)).pair(m, Draws(m, b), b.x, None)
    assert 6 <= seen["scale"].min() < 6.1
    assert 15.9 < seen["scale"].max() <= 16
    assert seen["index"].unique().tolist() == list(range(50))


def test_the_prediction_from_noise_and_from_velocity_agree():
    x_t, t = drawn(2, 4, 3), torch.tensor([0.3, 0.8])
    v = drawn(2, 4, 3, seed=2)
    eps = TABLE.convert(v, x_t, t, "v_prediction", "epsilon")
    torch.testing.assert_close(
        TABLE.convert(eps, x_t, t, "epsilon", "sample"), TABLE.convert(v, x_t, t, "v_prediction", "sample"),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


# The loss and its representations.


def test_huber():
    a = drawn(3, 4).requires_grad_()
    assert pseudo_huber(a, a.detach()) == 0
    gap = torch.tensor([[5.0, -7.0]])
    torch.testing.assert_close(pseudo_huber(gap, torch.zeros(1, 2), 1e-3), torch.tensor(6 - 1e-3))
    (slope,) = torch.autograd.grad(pseudo_huber(a, torch.zeros(3, 4)), a)
    assert slope.abs().max() <= 1 / 12 + 1e-7
    torch.testing.assert_close(pseudo_huber(gap, gap * 0, reduction="sum"), pseudo_huber(gap, gap * 0))
    with pytest.raises(UsageError, match="positive"):
        pseudo_huber(gap, gap, 0.0)


def test_plain_consistency_is_the_raw_motion():
    m, b, method = roles(), batch(), plain()
    (update,) = method.step(m, b)
    made, target = method.pair(m, Draws(m, b), b.x, None)
    torch.testing.assert_close(update.loss, pseudo_huber(made, target, 1e-3))
    assert not target.requires_grad
    assert made.requires_grad


def test_a_head_is_the_identity_at_first_bit_by_bit():
    for head, x in ((SpatialHead(4), drawn(2, 4, 5, 3, 3)), (SpatialHead(3, 1), drawn(2, 4, 3)),
                    (SpatialHead(4, layers=5, kernel=3), drawn(2, 4, 5, 3, 3))):  # fmt: skip
        assert head(x).equal(x)
    m, learn = roles("learn"), plain(motion="learn")
    first, second = next(iter(learn.step(m, batch()))), next(iter(plain().step(m, batch())))
    assert first.loss.equal(second.loss)


def test_a_head_sees_each_frame_alone():
    head = seeded(0, lambda: SpatialHead(4))
    nn.init.normal_(head.net[-1].weight, generator=rng())
    x = drawn(2, 4, 5, 3, 3)
    alone = torch.stack([head(x[:, :, k : k + 1])[:, :, 0] for k in range(5)], 2)
    torch.testing.assert_close(head(x), alone)


def test_differences_do_not_see_what_is_constant():
    x, constant = drawn(2, 4, 5, 3, 3), drawn(2, 4, 1, 3, 3, seed=1)
    torch.testing.assert_close(motion_of(x + constant, "diff"), motion_of(x, "diff"))
    assert not torch.allclose(motion_of(x + constant, "raw"), motion_of(x, "raw"))
    assert motion_of(x, "diff").shape == (2, 4, 4, 3, 3)
    assert motion_of(x, "learn") is x


@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 8), (2, 7, 3)])
def test_frequencies_add_up(shape):
    x, frames = drawn(*shape), 2 if len(shape) == 5 else 1
    low, high = motion_of(x, "freql", frames), motion_of(x, "freqh", frames)
    torch.testing.assert_close(low + high, x, atol=1e-5, rtol=1e-5)
    still = x.mean(dim=[frames, *range(3, x.ndim)], keepdim=True).expand_as(x)
    torch.testing.assert_close(butterworth(still, frames), still, atol=1e-5, rtol=1e-5)
    fast = torch.ones(1, 8, 1) * torch.tensor([1.0, -1.0]).repeat(4)[:, None]  # the highest frequency there is
    torch.testing.assert_close(butterworth(fast, 1), fast / (1 + 4.0**8), atol=1e-5, rtol=1e-4)


def test_frames_are_one_of_each_part():
    method, draws = plain(images=2), Draws(Roles(), Batch(id=torch.arange(500)))
    places = method.places(draws, torch.zeros(500, 8, 3))
    assert places[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert places[:, 1].unique().tolist() == [4, 5, 6, 7]
    x = torch.arange(24.0).view(2, 3, 4)  # [B, C, T]
    assert frames_at(x, torch.tensor([[3], [0]])).tolist() == [[3, 7, 11], [12, 16, 20]]


# The game.


def test_the_game_is_the_hinge_but_for_constants():
    real, fake = drawn(20), drawn(20, seed=1)
    difference = discriminator_loss(real, fake, "hinge") - discriminator_loss(real, fake, "wgan")
    torch.testing.assert_close(difference, torch.tensor(2.0))
    torch.testing.assert_close(generator_loss(fake, "wgan"), -fake.mean())


def test_updates_in_their_order_and_where_gradients_go():
    m, method = roles("learn", adversarial=True), plain(motion="learn", adversarial_weight=1.0, penalty=0.1)
    b = batch(unlabelled={"x": drawn(6, 3, seed=9)})
    found = list(method.step(m, b))
    assert [u.role for u in found] == ["student", "head", "discriminator"]
    for update, learns in zip(found, ("student", "head", "discriminator"), strict=True):
        for name in ("teacher", "student_average", "head_average"):
            slopes = torch.autograd.grad(update.loss, list(m[name].parameters()), retain_graph=True, allow_unused=True)
            assert all(s is None for s in slopes)
        assert any(
            s is not None and s.any()
            for s in torch.autograd.grad(
                update.loss, list(m[learns].parameters()), retain_graph=True, allow_unused=True
            )
        )
    slopes = torch.autograd.grad(found[2].loss, list(m.student.parameters()), allow_unused=True)
    assert all(s is None for s in slopes)  # frames are detached for the discriminator


def test_real_frames_are_images_or_else_those_of_the_clips():
    method, draws = plain(adversarial_weight=1.0), Draws(Roles(), batch())
    images = drawn(6, 3, seed=9)
    assert method.real(draws, batch(unlabelled={"x": images})) is images
    frames = method.real(draws, batch())
    assert frames.equal(frames_at(batch().x, method.places(draws, batch().x), 1))


def test_features_of_a_role_or_of_the_teacher():
    class Two(nn.Module):
        def forward(self, x):
            return [x, x.square()]

    m, x = roles(), drawn(2, 3)
    method = plain()
    assert [f.shape for f in method.seen(m, x)] == [(2, 3)]
    m.features = Two()
    assert [f.shape for f in method.seen(m, x)] == [(2, 3), (2, 3)]
    m = roles()
    m.teacher.module.features = nn.Linear(3, 5)
    assert [f.shape for f in method.seen(m, x)] == [(2, 5)]
    found = method.seen(m, x.requires_grad_())[0]
    assert torch.autograd.grad(found.sum(), x)[0].any()  # the way back to the frames


def test_a_share_of_batches_starts_from_the_students_clips():
    m, b = roles(), batch()
    assert plain().clean(m, Draws(m, b), b) is b.x
    method = plain(mixed=0.5)
    drawn_steps = []
    for step in range(200):
        m.step = step
        x = method.clean(m, Draws(m, b), b)
        drawn_steps.append(x is not b.x)
        assert not x.requires_grad
    assert sum(drawn_steps) / 200 == pytest.approx(0.5, abs=0.12)
    m.step = drawn_steps.index(True)
    z = Draws(m, b).normal("mixed noise", b.x)
    torch.testing.assert_close(method.clean(m, Draws(m, b), b), m.student(z, t=torch.ones(6)).detach())
    parts = torch.cat([method.clean(m, Draws(m, part), part) for part in b.split(3)])
    torch.testing.assert_close(parts, method.clean(m, Draws(m, b), b))


def test_with_adapters_the_target_is_the_student_itself():
    m, b = Roles(teacher=network(), student=network(1)), batch()
    made, target = plain().pair(m, Draws(m, b), b.x, None)
    average = Roles(teacher=network(), student=network(1), student_average=network(1))
    torch.testing.assert_close(plain().pair(average, Draws(average, b), b.x, None)[1], target)
    assert not torch.equal(made, target)


# Whole runs.


def source(n=48):
    return Data(train=TensorSource(drawn(n, 4, 3)), unlabelled=TensorSource(2 + drawn(30, 3, seed=4)))


@pytest.mark.parametrize("options", [{}, {"lora": 2}, {"motion": "freqh", "mixed": 1.0}, {"adversarial_weight": 0.0}])
def test_a_whole_run(options):
    m = Roles(teacher=network(), student=network())
    method = MCM(**{"frames": 1, "lora": 0, "steps": 2, **options})
    result = execute(
        method, m, source(), Engine(steps=4, batch_size=8, device="cpu"), optim={"student": Optim(lr=1e-3)}
    )
    student = result.roles.student.module
    assert student.steps == 2
    assert student(drawn(3, 4, 3)).shape == (3, 4, 3)
    assert ("student_average" in m) == (not options.get("lora"))
    assert ("head" in m) == ("motion" not in options)
    assert ("discriminator" in m) == ("adversarial_weight" not in options)
    assert not any("lora" in name for name, _ in student.named_parameters())


def test_the_average_of_the_head_moves_by_a_twentieth():
    m = Roles(teacher=network(), student=network())
    seen = []

    class Watched(MCM):
        def step(self, m, b):
            seen.append({k: v.clone() for k, v in m.head_average.module.state_dict().items()})
            yield from super().step(m, b)

    method = Watched(frames=1, lora=0, adversarial_weight=0.0)
    execute(method, m, source(), Engine(steps=1, batch_size=8, device="cpu"), optim={"head": Optim("sgd", lr=1.0)})
    for name, value in m.head_average.module.state_dict().items():
        torch.testing.assert_close(value, 0.95 * seen[0][name] + 0.05 * m.head.module.state_dict()[name])


def test_a_discriminator_pulls_the_looks_and_differences_keep_the_motion():
    """Clips around 0 and images around 2: with differences the frames move there, and the motion stays."""
    teacher = GaussianMixture(torch.zeros(2, 12), 0.3, Cosine())
    data = Data(train=TensorSource(0.3 * drawn(512, 4, 3)), unlabelled=TensorSource(2 + 0.3 * drawn(512, 3, seed=4)))
    net = seeded(0, lambda: Denoiser(TimeMLP(12, 32, 2), Cosine(), "v_prediction"))
    m = Roles(teacher=teacher, student=net)
    method = MCM(motion="diff", frames=1, lora=0, steps=1)
    optim = {"student": Optim("adam", lr=3e-3), "discriminator": Optim("adam", lr=1e-3)}
    execute(method, m, data, Engine(steps=150, batch_size=64, device="cpu"), optim=optim)
    with torch.no_grad():
        x = m.student(drawn(500, 4, 3, seed=7))
    assert x.mean() > 0.7
    assert 0.2 < x.diff(dim=1).std() < 0.6  # 0.42 in the clips


# Parts.


def test_a_fresh_module_is_rebuilt_from_its_record():
    head, record = Fresh("limbeck.nn.motion:SpatialHead", {"channels": 4, "hidden": 8}, seed=3)(nn.Linear(2, 2))
    again = rebuild(nn.Linear(2, 2), [record])
    again.load_state_dict(head.state_dict())
    same, _ = Fresh("limbeck.nn.motion:SpatialHead", {"channels": 4, "hidden": 8}, seed=3)(nn.Linear(2, 2))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), same.parameters(), strict=True))
    with pytest.raises(UsageError, match="only modules"):
        Fresh("os:system")(nn.Identity())


# What cannot work.


def test_models_and_data_that_do_not_fit():
    ready = Roles(teacher=network(), student=network(1))
    with pytest.raises(UsageError, match="no clips"):
        plain().check(ready, Batch(x=drawn(2, 12), id=torch.arange(2)))
    with pytest.raises(UsageError, match="no clips"):
        plain().check(ready, Batch(x=drawn(2, 1, 12), id=torch.arange(2)))
    cut = Denoiser(lambda x, t: x[:, :2], Cosine(), "sample")
    with pytest.raises(UsageError, match="other clips"):
        plain().check(Roles(teacher=network(), student=cut), batch())
    with pytest.raises(UsageError, match="different noise schedules"):
        plain().check(Roles(teacher=network(), student=network(1, RectifiedFlow())), batch())
    wrong = Data(train=TensorSource(drawn(8, 4, 3)), unlabelled=TensorSource(drawn(8, 2)))
    with pytest.raises(UsageError, match="not like frames"):
        plain(adversarial_weight=1.0).check_data(wrong)
    plain().check_data(wrong)
    with pytest.raises(UsageError, match="no such motion"):
        motion_of(drawn(2, 4, 3), "flow", 1)


@pytest.mark.parametrize(
    "fields",
    [{"motion": "flow"}, {"guidance": (9.0, 5.0)}, {"steps": 0}, {"steps": 51}, {"solver_steps": 1000}, {"frames": 0},
     {"images": 0}, {"scaling": 0.0}, {"huber": 0.0}, {"mixed": 1.1}, {"adversarial_weight": -1.0}, {"penalty": -1.0},
     {"lora": -1}, {"ema": 1.0}, {"head_ema": -0.1}],
)  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        MCM(**fields)
