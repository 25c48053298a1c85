"""VSD: its gradient in closed form, what it has in common with SDS, and who learns from whom."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Batch, Roles
from limbeck.core.errors import UsageError
from limbeck.diffusion import Cosine, Denoiser, Draws, GaussianMixture, RectifiedFlow, ring
from limbeck.diffusion.schedule import PREDICTIONS
from limbeck.diffusion.scores import denoising_loss, noisy
from limbeck.methods.vsd.method import VSD
from limbeck.methods.vsd.proof import Kernel, Particles
from limbeck.nn.time_mlp import TimeMLP

PLAIN = VSD(guidance=1.0, dropout=0.0, anneal=1.0)


def rows(n=6):
    return Batch(x=torch.arange(n), y=torch.arange(n) % 2, id=torch.arange(n))


def points(n=6, seed=0):
    return Particles(torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)))


def network(schedule=None, classes=2):
    torch.manual_seed(0)
    return Denoiser(TimeMLP(2, 8, 2, classes), schedule or Cosine(), "sample", null=classes)


def gradient(method, m, batch):
    """On the student's parameters, of its own update."""
    update = next(iter(method.step(m, batch)))
    return torch.autograd.grad(update.loss, list(m.student.module.parameters()))


def test_of_one_point_the_exact_score_is_the_noise_that_was_drawn():
    particles = points(1)
    m = Roles(teacher=ring(5), student=particles, fake=Kernel(particles))
    learned, drawn = (gradient(VSD(guidance=1.0, score=s), m, rows(1))[0] for s in ("learned", "noise"))
    torch.testing.assert_close(learned, drawn, rtol=1e-3, atol=1e-5)
    assert drawn.abs().max() > 1e-3


@pytest.mark.parametrize("late", [0.1, 0.9])
def test_where_the_distributions_are_equal_nothing_moves(late):
    m = Roles(teacher=ring(5), student=points(), fake=ring(5))
    (found,) = gradient(VSD(guidance=1.0, late=late, anneal=0.0), m, rows())
    assert found.abs().max() == 0


def test_a_copy_of_the_teacher_leaves_the_guidance_alone():
    teacher = network()
    m = Roles(teacher=teacher, student=points(), fake=copy.deepcopy(teacher))
    assert gradient(PLAIN, m, rows())[0].abs().max() == 0
    (found,) = gradient(VSD(guidance=4.0, anneal=1.0), m, rows())
    batch, draws = rows(), Draws(m, rows())
    x = m.student.module.points.detach()
    x_t, t = noisy(Cosine(), draws, "student", x, 0.02, 0.98)
    _, sigma = Cosine().factors(t, x)
    null = torch.full((6,), 2)
    with torch.no_grad():
        e_cond, e_null = (Cosine().convert(teacher(x_t, t, c), x_t, t, "sample", "epsilon") for c in (batch.y, null))
    torch.testing.assert_close(found, sigma**2 * 3 * (e_cond - e_null) / 6, rtol=1e-3, atol=1e-6)


def test_the_mean_gradient_between_gaussians_is_known():
    schedule = RectifiedFlow()
    p, q = (GaussianMixture(torch.tensor([[m, 0.0]]), s, schedule) for m, s in ((1.0, 0.5), (-0.5, 0.8)))
    x = q.sample(200_000, torch.Generator().manual_seed(0))
    m = Roles(teacher=p, student=Particles(x), fake=q)
    batch = Batch(x=torch.arange(len(x)), id=torch.arange(len(x)))
    (found,) = gradient(VSD(guidance=1.0, times=(0.4, 0.4000001), anneal=1.0), m, batch)
    alpha, sigma = 0.6, 0.4
    # E_q[e_p - e_q] = sigma alpha (m_q - m_p) / (alpha^2 s_p^2 + sigma^2), times w = sigma^2, over the batch
    expected = sigma**2 * sigma * alpha * (-1.5) / (alpha**2 * 0.25 + sigma**2)
    assert float(found.sum(0)[0]) == pytest.approx(expected, abs=0.003)
    assert float(found.sum(0)[1]) == pytest.approx(0.0, abs=0.003)


def test_what_the_teacher_predicts_makes_no_difference():
    exact, found = ring(5), []
    for prediction in PREDICTIONS:

        def net(x, t, prediction=prediction):
            return exact.schedule.convert(exact(x, t), x, t, "sample", prediction)

        m = Roles(teacher=Denoiser(net, exact.schedule, prediction), student=points(), fake=ring(4))
        found.append(gradient(PLAIN, m, Batch(x=torch.arange(6), id=torch.arange(6)))[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-5)


def test_a_renderer_gets_the_gradient_through_its_jacobian():
    torch.manual_seed(1)
    renderer = nn.Linear(3, 2)
    batch = Batch(x=torch.randn(6, 3), id=torch.arange(6))
    m = Roles(teacher=ring(5), student=renderer, fake=ring(4))
    weight, bias = gradient(PLAIN, m, batch)
    held = Roles(teacher=ring(5), student=Particles(renderer(batch.x).detach()), fake=ring(4))
    (on_x,) = gradient(PLAIN, held, Batch(x=torch.arange(6), id=torch.arange(6)))
    torch.testing.assert_close(weight, on_x.T @ batch.x)
    torch.testing.assert_close(bias, on_x.sum(0))


def test_each_learns_from_its_own_update_alone():
    m = Roles(teacher=network(), student=points(), fake=network())
    m.freeze("teacher")
    first, second = VSD(guidance=2.0).step(m, rows())
    assert [first.role, second.role] == ["student", "fake"]
    assert torch.autograd.grad(first.loss, list(m.fake.parameters()), allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(second.loss, list(m.student.parameters()), allow_unused=True)[0] is None
    assert first.logs["gap"] > 0
    assert not first.logs["gap"].requires_grad


def test_a_follower_that_loses_the_samples_is_named():
    m = Roles(teacher=network(), student=points(), fake=network())
    for p in m.fake.parameters():
        p.data.mul_(20)
    logs = next(iter(PLAIN.step(m, rows()))).logs
    assert logs["error/fake"] > 10 * logs["error/teacher"]
    assert [limit.log for limit in PLAIN.limits] == ["error/fake", "size"]
    assert logs["size"] == pytest.approx(float(m.student.module.points.detach().square().mean(1).sqrt().mean()))


def test_times_end_early_once_it_is_annealed():
    m = Roles(teacher=ring(5), student=points(200), fake=ring(4))
    m.total = 10
    seen = []
    m.teacher.module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["t"]), with_kwargs=True)
    for m.step in (1, 2):
        next(iter(VSD(guidance=1.0).step(m, Batch(x=torch.arange(200), id=torch.arange(200)))))
    assert seen[0].max() > 0.9
    assert seen[0].min() >= 0.02
    assert seen[1].max() <= 0.5


def test_the_camera_is_told_to_what_follows_and_the_prompt_to_the_teacher():
    m = Roles(teacher=network(), student=points(), fake=network(classes=3))
    heard = {}
    for name in ("teacher", "fake"):
        m[name].module.register_forward_pre_hook(
            lambda _, args, kw, name=name: heard.update({name: kw["condition"]}), with_kwargs=True
        )
    list(PLAIN.step(m, rows().replace(camera=torch.full((6,), 2))))
    assert heard["teacher"].equal(rows().y)
    assert heard["fake"].tolist() == [2] * 6


def test_the_loss_of_what_follows_is_that_of_the_noise():
    m = Roles(fake=network())
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    draws = Draws(m, rows())
    x_t, t = noisy(Cosine(), draws, "fake", x, 0.02, 0.98)
    e = Cosine().convert(m.fake(x_t, t=t, condition=rows().y), x_t, t, "sample", "epsilon")
    expected = (e - draws.normal("fake noise", x)).square().sum(1).mean()
    found = denoising_loss(m, "fake", draws, x, rows().y, times=(0.02, 0.98), elements="sum")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    half = denoising_loss(m, "fake", draws, x, rows().y, times=(0.02, 0.98))
    torch.testing.assert_close(found, 2 * half)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"times": (0.0, 0.5)}, "times"),
        ({"late": 0.01}, "late"),
        ({"anneal": 2.0}, "anneal"),
        ({"dropout": 1.0}, "dropout"),
        ({"score": "guess"}, "score"),
        ({"elements": "all"}, "elements"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(UsageError, match=f"{words} is out of range"):
        VSD(**fields)


def test_roles_that_do_not_fit():
    with pytest.raises(UsageError, match="cannot learn"):
        VSD().check(Roles(teacher=ring(5), student=points()), rows())
    with pytest.raises(UsageError, match="no denoiser"):
        VSD().check(Roles(teacher=nn.Linear(2, 2), student=points()), rows())
    with pytest.raises(UsageError, match="different noise schedules"):
        VSD().check(Roles(teacher=network(), student=points(), fake=network(RectifiedFlow())), rows())
    VSD(score="noise").check(Roles(teacher=ring(5), student=points()), rows())
