"""MSD: parts and routes, many students as as many trainings, the terms of the loss, what is detached."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.steps import ToExperts
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Draws, Experts, RectifiedFlow, dmd_gradient, ring, surrogate
from limbeck.diffusion.matching import discriminator_scores, follower_weight, fooling, matching_updates, telling
from limbeck.diffusion.scores import denoising_loss, noisy, predicted
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.msd.method import MSD
from limbeck.nn.time_mlp import TimeMLP

FLOW, C = RectifiedFlow(), 4
SGD = Optim("sgd", lr=0.05)


def network(seed=0, hidden=8):
    torch.manual_seed(seed)
    return Denoiser(TimeMLP(2, hidden, 2, classes=C), FLOW, "flow_prediction", null=C)


def experts(*seeds, owners=(0, 0, 1, 1)):
    return Experts([network(s) for s in seeds], owners=owners)


def batch(n=8):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    return Batch(x=z, y=torch.arange(n) % C, id=torch.arange(n))


def two(**more):
    return Roles(teacher=ring(8, schedule=FLOW, classes=C), student=experts(1, 2), fake=experts(3, 4), **more)


def run(method, m, data, steps, optim=SGD, size=16):
    engine = Engine(steps=steps, batch_size=size, device="cpu", log_every=1)
    return execute(method, m, Data(train=data), engine, optim=dict.fromkeys(("student", "fake"), optim))


@pytest.mark.parametrize("classes", [4, 7, 10, 1000])
@pytest.mark.parametrize("students", [1, 2, 3, 4])
def test_parts_cover_all_classes_once_and_are_of_one_size(classes, students):
    owners = MSD(students).parts(classes)
    sizes = [owners.count(k) for k in range(students)]
    assert len(owners) == classes == sum(sizes)
    assert max(sizes) - min(sizes) <= 1
    assert list(owners) == sorted(owners)
    if classes == 1000 and students == 4:
        assert all(owners[c] == c // 250 for c in range(1000))


def test_the_student_of_a_class_is_the_one_that_was_trained_on_it():
    """Of 10^4 samples each reaches its own student, in training and after."""
    m = two()
    heard = {0: [], 1: []}
    for role in (m.student, m.fake):
        for k, expert in enumerate(role.module.experts):
            expert.register_forward_pre_hook(
                lambda _, args, kw, k=k: heard[k].append(kw["condition"]), with_kwargs=True
            )
    list(MSD(2).step(m, batch(10_000)))
    owners = torch.tensor(MSD(2).parts(C))
    for k, found in heard.items():
        assert found
        assert all((owners[y] == k).all() for y in found)
    heard[0].clear()
    m.student(torch.randn(5, 2), condition=torch.full((5,), 3))
    assert not heard[0]


def test_one_student_is_distribution_matching():
    b = batch()
    m = Roles(teacher=ring(8, schedule=FLOW, classes=C), student=network(1), fake=network(2))
    first, second = MSD(1, guidance=2.0).step(m, b)
    x, draws = m.student(b.x, condition=b.y), Draws(m, b)
    x_t, t = noisy(FLOW, draws, "matching", x.detach(), 0.02, 0.98)
    gap = dmd_gradient(x, predicted(m.teacher, x_t, t, b.y, 2.0), predicted(m.fake, x_t, t, b.y))
    torch.testing.assert_close(first.loss, surrogate(x, gap))
    (gradient,) = torch.autograd.grad(surrogate(x, gap), x)
    torch.testing.assert_close(gradient, gap / x.numel())
    expected = denoising_loss(m, "fake", draws, x, b.y, times=(0.001, 1.0), weight=follower_weight(FLOW))
    torch.testing.assert_close(second.loss, expected)


def test_elements_are_a_factor_of_all_losses():
    b, losses = batch(), {}
    for how in ("sum", "mean"):
        m = Roles(teacher=ring(8, schedule=FLOW, classes=C), student=network(1), fake=network(2))
        method = MSD(1, elements=how)
        losses[how] = [*(update.loss for update in method.step(m, b)), method.match(m, b).loss]
    for added, averaged in zip(losses["sum"], losses["mean"], strict=True):
        torch.testing.assert_close(added, 2 * averaged)


@pytest.mark.parametrize("fields", [{}, {"gan_weight": 0.3, "discriminator": "net.body"}])
def test_many_students_are_as_many_trainings(fields):
    """Each student's gradient is what it would be with its own part of the batch alone."""
    b, m = batch(), two()
    together = {u.role: _gradients(u, m) for u in MSD(2, **fields).step(m, b)}
    for k in range(2):
        own = Roles(teacher=m.teacher.module, student=m.student.module.experts[k], fake=m.fake.module.experts[k])
        part = b[(b.y // 2 == k).nonzero()[:, 0]]
        for update in MSD(1, **fields).step(own, part):
            for name, g in _gradients(update, own).items():
                torch.testing.assert_close(together[update.role][f"experts.{k}.{name}"], g, rtol=1e-4, atol=1e-7)


def _gradients(update, m):
    named = dict(m[update.role].module.named_parameters())
    found = torch.autograd.grad(update.loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def test_a_training_of_two_students_is_two_trainings():
    """With Adam and equal parts, over several steps, and two updates of what follows for one of the students."""
    whole = train(MSD(2, fake_steps=2), two(), lambda b: b)
    for k in range(2):
        m = two()
        own = Roles(teacher=m.teacher.module, student=m.student.module.experts[k], fake=m.fake.module.experts[k])
        train(MSD(1, fake_steps=2), own, lambda b, k=k: b[(b.y // 2 == k).nonzero()[:, 0]])
        for name in ("student", "fake"):
            for p, q in zip(whole[name].module.experts[k].parameters(), own[name].parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def train(method, m, part):
    optimizers = {name: torch.optim.Adam(m[name].parameters(), lr=1e-2) for name in ("student", "fake")}
    source = Noise((2,), 32, C)
    for m.step in range(4):
        for update in method.step(m, part(source.batch(torch.arange(8 * m.step, 8 * m.step + 8), 0))):
            update.backward(m)
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
    return m


def test_the_gradient_knows_no_scale_and_survives_zero():
    x, real, fake = (torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    torch.testing.assert_close(dmd_gradient(5 * x, 5 * real, 5 * fake), dmd_gradient(x, real, fake))
    assert not dmd_gradient(x, real, real).any()
    assert not dmd_gradient(x, x, x).any()  # 0 / 0
    assert dmd_gradient(x, x, fake).isfinite().all()


def test_matching_is_the_teachers_prediction_and_rests_there():
    whole = network()
    m = Roles(teacher=whole, student=ToExperts(owners=(0, 0, 1, 1))(whole)[0])
    method, b = MSD(2, match_steps=5), batch()
    update = method.match(m, b)
    assert update.loss < 1e-12
    assert all(g.abs().max() < 1e-6 for g in _gradients(update, m).values())
    m.student = experts(1, 2)
    x_t, t = noisy(FLOW, Draws(m, b), "match", b.x, 0.001, 1.0)
    gap = (predicted(m.student, x_t, t, b.y) - predicted(m.teacher, x_t, t, b.y)).square()
    expected = 2 * (follower_weight(FLOW)(*FLOW.factors(t, x_t)) * gap).mean()
    torch.testing.assert_close(method.match(m, b).loss, expected)


def test_a_discriminator_that_knows_nothing():
    m, b = two(), batch()
    for expert in m.fake.module.experts:
        for p in expert.net.body[-1].parameters():
            nn.init.zeros_(p)
    draws, x = Draws(m, b), m.student(b.x, condition=b.y)
    assert fooling(m, draws, "net.body", x, b.y).item() == pytest.approx(math.log(2))
    assert telling(m, draws, "net.body", b.x, x, b.y).item() == pytest.approx(2 * math.log(2))


def test_the_adversarial_terms():
    m, b = two(), batch()
    method = MSD(2, gan_weight=0.3, discriminator_weight=0.1, discriminator="net.body")
    draws = Draws(m, b)
    first, second = method.step(m, b)
    x = m.student(draws.normal("noise", b.x), condition=b.y)
    plain = list(matching_updates(m, b, x, fake_times=method.fake_times))
    x_t, t = noisy(FLOW, draws, "discriminator", x, 0.02, 0.98)
    true, _ = noisy(FLOW, draws, "discriminator", b.x, 0.02, 0.98)
    low, high = (discriminator_scores(m.fake, "net.body", s, t, b.y) for s in (x_t, true))
    torch.testing.assert_close(first.loss / 2, plain[0].loss + 0.3 * F.softplus(-low).mean())
    torch.testing.assert_close(second.loss / 2, plain[1].loss + 0.1 * (F.softplus(low) + F.softplus(-high)).mean())
    assert any(g.any() for g in _gradients(first, m).values())
    late = list(replace(method, gan_start=0.5).step(m, b))
    assert [u.loss.item() / 2 for u in late] == pytest.approx([u.loss.item() for u in plain])
    assert not any(
        g is not None for g in torch.autograd.grad(second.loss, list(m.student.parameters()), allow_unused=True)
    )


def test_each_follower_tells_its_own_students_samples():
    m, b = two(), batch()
    t = torch.full((8,), 0.5)
    whole = discriminator_scores(m.fake, "net.body", b.x, t, b.y)
    for k, expert in enumerate(m.fake.module.experts):
        rows = (b.y // 2 == k).nonzero()[:, 0]
        alone = Roles(fake=expert).fake
        torch.testing.assert_close(whole[rows], discriminator_scores(alone, "net.body", b.x[rows], t[rows], b.y[rows]))


def test_without_its_turn_the_student_makes_samples_without_a_graph():
    m = two()
    calls = []
    m.student.module.register_forward_hook(lambda _, __, out: calls.append(out.requires_grad))
    method = MSD(2, fake_steps=3, gan_weight=0.1, discriminator="net.body")
    seen = []
    for m.step in range(4):
        seen.append([update.role for update in method.step(m, batch())])
    assert seen == [["student", "fake"], ["fake"], ["fake"], ["student", "fake"]]
    assert calls == [True, False, False, True]


def test_stages_from_a_teacher_with_weights():
    real = ring(8, schedule=FLOW, classes=C)
    source = TensorSource(real.sample(64, torch.Generator().manual_seed(0), torch.arange(64) % C), torch.arange(64) % C)
    torch.manual_seed(5)
    small = Denoiser(TimeMLP(2, 4, 1, classes=C), FLOW, "flow_prediction", null=C)
    m = Roles(teacher=network(), student=copy.deepcopy(small))
    method = MSD(2, match_steps=3, gan_weight=0.01, discriminator="net.body")
    result = run(method, m, source, 4)
    assert [len(m[n].module.experts) for n in ("student", "fake")] == [2, 2]
    rows = [row for row in result.history if "train/loss/student" in row]
    assert [row["stage"] for row in rows] == ["match the teacher"] * 3 + ["distil"] * 4
    assert m.student.module.owners.tolist() == [0, 0, 1, 1]
    moved = [next(e.parameters()) for e in m.student.module.experts]
    assert not moved[0].equal(moved[1])
    assert not moved[0].equal(next(small.parameters()))


def test_students_far_off_come_near():
    known = ring(8, 2.0, 0.2, FLOW, classes=C)
    m = Roles(teacher=known, student=network(0, 32), fake=ToExperts(owners=(0, 0, 1, 1))(network(0, 32))[0])
    m.student.module.net.last[1].bias.data += 1.5
    z, y = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9)), torch.arange(1000) % C
    true = known.sample(1000, torch.Generator().manual_seed(8), y)

    def distance():
        with torch.no_grad():
            return energy_distance(m.student(z, condition=y), true)

    first = distance()
    run(MSD(2), m, Noise((2,), 4096, C), 200, Optim("adam", lr=3e-3), 64)
    assert distance() < 0.4 * first


@pytest.mark.parametrize("fields", [
    {"students": 0}, {"fake_steps": 0}, {"match_steps": -1}, {"match_factor": 0.0}, {"gan_weight": -1.0},
    {"discriminator_weight": -1.0}, {"gan_start": 1.0}, {"times": (0.5, 0.4)}, {"fake_times": (0.0, 1.0)},
    {"students": 2, "owners": (0, 0, 0, 1)}, {"students": 2, "owners": (0, 2)}, {"students": 3, "owners": (0, 0, 1, 1)},
    {"discriminator": "net.body"}, {"guidance": -1.0},
])  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        MSD(**fields)


def test_models_and_data_that_do_not_fit():
    b = batch()
    with pytest.raises(UsageError, match="cannot learn"):
        MSD().check(Roles(teacher=ring(8, schedule=FLOW, classes=C), student=network()), b)
    with pytest.raises(UsageError, match="no classes"):
        MSD().check(Roles(teacher=network(), student=network()), Batch(x=b.x, id=b.id))
    with pytest.raises(UsageError, match="discriminator is out of range"):
        MSD(gan_weight=0.1).check(two(), b)
    with pytest.raises(UsageError, match="no such module"):
        MSD(gan_weight=0.1, discriminator="net.mid").check(two(), b)
    with pytest.raises(UsageError, match="students is out of range"):
        MSD(students=5).check_data(Data(train=Noise((2,), 8, C)))
    with pytest.raises(UsageError, match="owners is out of range"):
        MSD(students=2, owners=(0, 1)).check_data(Data(train=Noise((2,), 8, C)))
