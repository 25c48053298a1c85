"""The contract of a step: order, accumulation, direction, routing, modes, errors."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from programs import Gan, Mimic, accuracy, gan_data, gan_roles, net, pair, table
from torch import nn
from torch.nn import functional as F

from limbeck import Batch, Ema, Engine, LimbeckError, Method, Optim, Roles, Train, Update
from limbeck.core.errors import RunError, UsageError
from limbeck.core.method import updates
from limbeck.engine.run import execute
from limbeck.engine.train import digest

SGD = Optim("sgd", lr=0.1)


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_alternating_roles_see_each_others_new_weights():
    m, plain = gan_roles(), gan_roles()
    execute(Gan(), m, SimpleNamespace(train=gan_data), Engine(steps=7), optim={"critic": SGD, "generator": SGD})
    critic, generator = plain.critic.module, plain.generator.module
    c, g = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (critic, generator))
    draws = Roles().rng("data")
    for step in range(7):
        batch = gan_data(step, draws)
        x = generator(batch.noise)
        for _ in range(2):
            c.zero_grad()
            (F.softplus(critic(x.detach())).mean() + F.softplus(-critic(batch.x)).mean()).backward()
            c.step()
        g.zero_grad()
        F.softplus(-critic(x)).mean().backward()
        g.step()
    same(m.critic.module, critic, 1e-6)
    same(m.generator.module, generator, 1e-6)


def test_own_loop_equals_engine():
    data, m, own = table(), pair(), pair()
    execute(Mimic(), m, data, Engine(steps=5, batch_size=96), optim={"student": SGD})
    own.freeze("teacher")
    optimizer = torch.optim.SGD(own.student.parameters(), lr=0.1)
    for epoch in range(5):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
        for u in updates(Mimic().step, own, data.train.batch(order, 0)):
            u.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same(m.student.module, own.student.module, 1e-6)


@dataclass(frozen=True)
class Sharpness(Method):
    """Sharpness-aware minimisation: a first gradient finds the worst neighbour, the second is taken there."""

    radius: float = 0.05
    frozen = ()

    def step(self, m, batch):
        yield Update("student", F.cross_entropy(m.student(batch), batch.y), apply=False)
        params = list(m.student.parameters())
        if m.lead:
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in params]).norm()
                moves = [self.radius * p.grad / norm for p in params]
                torch._foreach_add_(params, moves)
            m.student.zero_grad()
        yield Update("student", F.cross_entropy(m.student(batch), batch.y), apply=False)
        if m.lead:
            with torch.no_grad():
                torch._foreach_sub_(params, moves)
        yield Update("student")


@pytest.mark.parametrize("micro", [1, 3])
def test_sharpness_aware_double_pass_equals_hand_written(micro):
    data, m, plain = table(), Roles(student=net(8, 6, 4)), net(8, 6, 4)
    execute(Sharpness(), m, data, Engine(steps=4, batch_size=96, micro_batches=micro), optim={"student": SGD})
    for epoch in range(4):
        b = data.train.batch(torch.randperm(96, generator=torch.Generator().manual_seed(epoch)), 0)
        worst = copy.deepcopy(plain)
        gradient = torch.autograd.grad(F.cross_entropy(plain(b.x), b.y), list(plain.parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        with torch.no_grad():
            for p, g in zip(worst.parameters(), gradient, strict=True):
                p += 0.05 * g / norm
        gradient = torch.autograd.grad(F.cross_entropy(worst(b.x), b.y), list(worst.parameters()))
        with torch.no_grad():
            for p, g in zip(plain.parameters(), gradient, strict=True):
                p -= 0.1 * g
    same(m.student.module, plain, 1e-6)


class Sandwich(Method):
    """Three sub-networks accumulate into one update; the active width is an argument of the call."""

    frozen = ()

    def step(self, m, batch):
        for width in (2, 4):
            yield Update("student", F.cross_entropy(m.student(batch, width=width), batch.y), apply=False)
        yield Update("student", F.cross_entropy(m.student(batch, width=6), batch.y))


class Elastic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x, width):
        return F.linear(
            F.relu(F.linear(x, self.a.weight[:width], self.a.bias[:width])), self.b.weight[:, :width], self.b.bias
        )


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulating_updates_add_up(micro):
    data, m, plain = table(), Roles(student=Elastic()), Elastic()
    execute(Sandwich(), m, data, Engine(steps=1, batch_size=96, micro_batches=micro), optim={"student": SGD})
    b = data.train.batch(torch.arange(96), 0)
    sum(F.cross_entropy(plain(b.x, width=w), b.y) for w in (2, 4, 6)).backward()
    with torch.no_grad():
        for p in plain.parameters():
            p.sub_(0.1 * p.grad)
    same(m.student.module, plain, 1e-6)


def test_ascent():
    class Up(Method):
        frozen = ()

        def step(self, m, batch):
            return -(m.student.weight - 3).square().sum()

    m = Roles(student=nn.Linear(1, 1, bias=False))
    execute(
        Up(), m, SimpleNamespace(train=None), Engine(steps=50), optim={"student": Optim("sgd", lr=0.1, maximize=True)}
    )
    assert m.student.weight.item() == pytest.approx(3, abs=1e-3)


def test_round_robin_over_n_roles():
    class Turn(Method):
        trains = ("a", "b", "c")
        frozen = ()

        def step(self, m, batch):
            role = self.trains[m.step % 3]
            yield Update(role, m[role].weight.sum())

    m = Roles(**{n: nn.Linear(1, 1, bias=False) for n in "abc"})
    before = {n: m[n].weight.item() for n in "abc"}
    execute(Turn(), m, SimpleNamespace(train=None), Engine(steps=7), optim=dict.fromkeys("abc", Optim("sgd", lr=1.0)))
    assert [round(before[n] - m[n].weight.item(), 4) for n in "abc"] == [3, 2, 2]


@pytest.mark.parametrize("micro", [2, 5])
def test_micro_batches_equal_one_batch(micro):
    data = table(n=90)
    results = []
    for k in (1, micro):
        m = pair()
        r = execute(
            Mimic(), m, data, Engine(epochs=2, batch_size=37, micro_batches=k, log_every=1), optim={"student": SGD}
        )
        results.append((m, [row["train/loss/student"] for row in r.history if "train/loss/student" in row]))
    same(results[0][0].student.module, results[1][0].student.module, 1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def test_micro_batches_of_an_alternating_program():
    one, many = gan_roles(), gan_roles()
    for m, k in ((one, 1), (many, 3)):
        optim = {"critic": SGD, "generator": SGD}
        execute(Gan(), m, SimpleNamespace(train=gan_data), Engine(steps=5, micro_batches=k), optim=optim)
    same(one.critic.module, many.critic.module, 1e-6)
    same(one.generator.module, many.generator.module, 1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_token_losses_use_the_global_count(as_tensor):
    class Tokens(Method):
        frozen = ()

        def step(self, m, batch):
            mask = batch.y > 0  # very uneven over micro-batches
            loss = (m.student(batch).logsumexp(1) * mask).sum() / mask.sum()
            yield Update("student", loss, count=mask.sum() if as_tensor else int(mask.sum()), apply=False)
            yield Update("student", m.student(batch).square().mean())

    data = table()
    order = data.train.labels.argsort()
    data.train = type(data.train)(data.train.x[order], data.train.y[order])
    nets = []
    for k in (1, 4):
        m = Roles(student=net(8, 6, 4, seed=2))
        execute(Tokens(), m, data, Engine(steps=3, batch_size=96, micro_batches=k), optim={"student": SGD})
        nets.append(m.student.module)
    same(*nets, tolerance=1e-6)


def test_gradient_reaches_the_named_role_only():
    class Leaky(Method):
        trains = ("student", "other")
        frozen = ()

        def step(self, m, batch):
            yield Update("student", (m.student(batch) + m.other(batch)).square().mean())
            assert all(p.grad is None for p in m.other.parameters())
            yield Update("other", m.other(batch).square().mean())

    m = Roles(student=net(8, 4, 4), other=net(8, 4, 4, seed=5))
    execute(Leaky(), m, table(), Engine(steps=2))


def test_gradient_passes_through_a_frozen_role():
    class Through(Method):
        def step(self, m, batch):
            return m.teacher(m.student(batch)).square().mean()

    m = Roles(student=nn.Linear(8, 8), teacher=net(8, 16, 4))
    before = copy.deepcopy(m.student.module)
    execute(Through(), m, table(), Engine(steps=1), optim={"student": SGD})
    assert not torch.equal(before.weight, m.student.weight)


def test_frozen_roles_stay_in_eval_mode_and_unchanged():
    class Meddler(Mimic):
        def step(self, m, batch):
            m.teacher.module.train()
            m.teacher.module[1].train()
            assert not any(part.training for part in m.teacher.module.modules())
            yield from super().step(m, batch)

    m = Roles(teacher=net(8, 16, 4, norm=True), student=net(8, 6, 4))
    before = copy.deepcopy(m.teacher.module.state_dict())
    execute(Meddler(), m, table(), Engine(steps=3, batch_size=16))
    for key, value in m.teacher.module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex128]
)
def test_the_digest_sees_equal_numbers_change_together(dtype):
    module = nn.Module()
    module.register_buffer("same", torch.zeros(4, 2).to(dtype))
    before = digest(module)
    module.same.fill_(1)
    assert digest(module) != before
    module.same.fill_(0)
    assert digest(module) == before


def test_a_frozen_module_of_one_number_is_watched():
    class Meddler(Mimic):
        def step(self, m, batch):
            m.teacher.module.scale.mul_(2)
            yield from super().step(m, batch)

    def roles():
        teacher = net(8, 16, 4)
        teacher.register_buffer("scale", torch.ones(1) / torch.ones(()))
        teacher.scale = teacher.scale.as_strided((1,), (0,))  # how one number may lie in memory
        return Roles(teacher=teacher, student=net(8, 6, 4))

    execute(Mimic(), roles(), table(), Engine(steps=1, batch_size=16))
    with pytest.raises(RunError, match="frozen"):
        execute(Meddler(), roles(), table(), Engine(steps=1, batch_size=16))


def test_a_student_that_holds_the_teacher_does_not_wake_it():
    student = net(8, 6, 4)
    m = Roles(teacher=nn.Dropout(0.5), student=student)
    student.guide = m.teacher.module
    m.freeze("teacher")
    student.train()
    assert student.training
    assert not m.teacher.module.training


def step_error(step, roles=None, **engine):
    class Bad(Method):
        frozen = ("teacher",) if roles is None else ()

    Bad.step = lambda self, m, batch: step(m, batch)
    with pytest.raises(LimbeckError) as error:
        execute(Bad(), roles or pair(), table(), Engine(steps=2, **engine))
    return error.value


def in_no_grad(m, batch):
    loss = m.student(batch).mean()
    with torch.no_grad():
        yield Update("student", loss)


def in_autocast(m, batch):
    with torch.autocast("cpu", torch.bfloat16):
        yield Update("student", m.student(batch).float().mean())


def unknown(m, batch):
    yield Update("studnet", m.student(batch).mean())


def detached(m, batch):
    yield Update("student", m.student(batch).detach().mean())


def vector(m, batch):
    yield Update("student", m.student(batch).mean(1))


def elsewhere(m, batch):
    w = torch.ones((), requires_grad=True)
    yield Update("student", w * m.teacher(batch).mean())


def absent(m, batch):
    yield Update("student", m.professor(batch).mean())


def wakes_teacher(m, batch):
    m.teacher.module.training = True
    yield Update("student", m.student(batch).mean())


def thaws_teacher(m, batch):
    for p in m.teacher.parameters():
        p.requires_grad_(True)
    yield Update("student", (m.student(batch) + m.teacher(batch)).mean())


def edits_teacher(m, batch):
    with torch.no_grad():
        m.teacher.module[0].weight.mul_(1.01)
    yield Update("student", m.student(batch).mean())


def never(m, batch):
    yield from ()


def disagree(m, batch):
    yield Update("student", m.student(batch).mean(), apply=False)
    if m.lead:
        yield Update("student", m.student(batch).mean())


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (in_no_grad, "inside torch.no_grad"),
        (in_autocast, "inside torch.autocast"),
        (unknown, "does not learn in this stage"),
        (detached, "cannot be differentiated"),
        (vector, "cannot be differentiated"),
        (elsewhere, "received no gradient"),
        (absent, "the role 'professor'"),
        (wakes_teacher, "in train mode"),
        (thaws_teacher, "a gradient reached a frozen role"),
        (edits_teacher, "a frozen role has changed"),
        (never, "was never updated"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_mistakes_have_names(step, words):
    error = step_error(step)
    assert words in str(error)
    assert torch.is_grad_enabled()
    if step in (in_no_grad, in_autocast, unknown, detached, vector):
        assert "test_updates.py:" in str(error)


def test_micro_batches_that_disagree():
    assert "disagree" in str(step_error(disagree, batch_size=8, micro_batches=4))


@pytest.mark.parametrize("micro", [1, 2])
def test_divergence_stops_with_step_and_role(tmp_path, micro):
    class Explode(Mimic):
        def step(self, m, batch):
            for u in super().step(m, batch):
                yield Update(u.role, u.loss * (float("nan") if m.step == 13 else 1.0))

    with pytest.raises(RunError) as error:
        execute(
            Explode(), pair(), table(), Engine(steps=40, checkpoint_every=5, micro_batches=micro), out=tmp_path / "run"
        )
    text = str(error.value)
    assert "step 14" in text
    assert "loss/student" in text
    assert "00-train-00000010" in text


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_train(precision):
    m = pair()
    result = execute(
        Mimic(), m, table(), Engine(epochs=30, precision=precision), optim={"student": Optim("sgd", lr=0.1, clip=1.0)}
    )
    losses = [r["train/loss/student"] for r in result.history if "train/loss/student" in r]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in m.student.parameters())


def test_autocast_is_on_inside_the_step_only():
    seen = []

    class Look(Method):
        frozen = ()

        def step(self, m, batch):
            out = m.student(batch)
            seen.append(out.dtype)
            yield Update("student", out.float().mean())

    execute(Look(), Roles(student=net(8, 4, 4)), table(), Engine(steps=1, precision="bf16"))
    assert seen == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


def test_clipping_and_schedule():
    rows = execute(
        Mimic(),
        pair(),
        table(),
        Engine(steps=20, log_every=1),
        optim={"student": Optim("sgd", lr=0.1, clip=0.01, schedule="cosine", warmup=4)},
    ).history
    rates = [r["train/lr/student"] for r in rows if "train/loss/student" in r]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == pytest.approx(0.1)
    assert rates[-1] < 0.002
    assert all(r["train/grad_norm/student"] > 0.01 for r in rows if "train/grad_norm/student" in r)


@pytest.mark.parametrize("schedule", ["linear", "step", "constant"])
def test_schedules(schedule):
    o = Optim(lr=1.0, schedule=schedule, milestones=(0.5,), gamma=0.1, final=0.2)
    expected = {"linear": [1.0, 0.6, 0.2], "step": [1.0, 0.1, 0.1], "constant": [1.0] * 3}[schedule]
    assert [o.factor(s, 100) for s in (0, 50, 100)] == pytest.approx(expected)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_ema_role(buffers):
    class Averaged(Method):
        frozen = ()

        def stages(self, m, data):
            ema = {"slow": Ema("student", 0.9, buffers=buffers), "by_epoch": Ema("student", 0.5, every="epoch")}
            yield Train(self.step, roles={"student": SGD}, data=data.train, ema=ema)

        def step(self, m, batch):
            trail.append(copy.deepcopy(m.student.module))
            return F.cross_entropy(m.student(batch), batch.y)

    trail = []
    m = Roles(student=net(8, 6, 4, norm=True))
    execute(Averaged(), m, table(), Engine(epochs=2, batch_size=48))
    trail.append(m.student.module)
    slow = {k: v.clone() for k, v in trail[0].state_dict().items()}
    for state in (after.state_dict() for after in trail[1:]):
        for k, v in state.items():
            average = v.is_floating_point() and (buffers == "average" or "running" not in k)
            slow[k] = torch.lerp(slow[k], v, 0.1) if average else v
    for k, v in m.slow.module.state_dict().items():
        torch.testing.assert_close(v, slow[k])
    by_epoch = torch.lerp(torch.lerp(trail[0][0].weight, trail[2][0].weight, 0.5), trail[4][0].weight, 0.5)
    torch.testing.assert_close(m.by_epoch.module[0].weight, by_epoch)


def test_hooks_are_called_in_order():
    calls = []

    class Hooked(Mimic):
        def after_update(self, m, role):
            calls.append(f"update {role}")
            with torch.no_grad():
                m.student.module[0].weight.clamp_(-0.1, 0.1)

        def after_epoch(self, m, epoch):
            calls.append(f"epoch {epoch}")

        def before_evaluate(self, m):
            calls.append("before evaluate")

        def after_stage(self, m, stage):
            calls.append(f"stage {stage.name}")

    m = pair()
    execute(Hooked(), m, table(), Engine(epochs=1, batch_size=96), evaluate=accuracy)
    assert calls == ["update student", "epoch 1", "before evaluate", "stage train"]
    assert m.student.module[0].weight.abs().max() <= 0.1


def test_surgery_in_a_hook_changes_the_optimizer():
    from programs import Narrow

    class Shrink(Mimic):
        def after_epoch(self, m, epoch):
            if epoch == 2:
                m.convert("student", Narrow(3))

    m = pair()
    execute(Shrink(), m, table(), Engine(epochs=4), optim={"student": Optim(lr=0.01)})
    assert m.student.module[0].out_features == 3
    assert len(m.lineage["student"]["records"]) == 1


def test_data_are_selected_again_each_epoch():
    seen = []

    class Half(Mimic):
        def select(self, m, epoch):
            ids = table().train.ids.sort().values
            return ids[:48] if epoch == 0 else ids[48:]

        def step(self, m, batch):
            seen.append((m.epoch, batch.id))
            yield from super().step(m, batch)

    execute(Half(), pair(), table(), Engine(epochs=2, batch_size=16))
    ids = table().train.ids.sort().values
    for epoch, part in ((0, ids[:48]), (1, ids[48:])):
        assert torch.equal(torch.cat([i for e, i in seen if e == epoch]).sort().values, part)


@pytest.mark.parametrize(("settings", "steps"), [({"steps": 14, "epochs": 1}, 14), ({"epochs": 3}, 9)])
def test_a_selection_that_makes_epochs_shorter_does_not_end_a_run_of_steps(settings, steps):
    class Half(Mimic):
        def select(self, m, epoch):
            return table().train.ids.sort().values[:48]

    history = execute(Half(), pair(), table(), Engine(batch_size=16, log_every=1, **settings)).history
    assert max(row["step"] for row in history) == steps


def test_sample_weights_by_stable_id():
    """Weights live in a role's buffer and are looked up by id, wherever shuffling puts the sample."""
    data = table()
    order = data.train.ids.argsort()
    weights = nn.Module()
    weights.register_buffer("value", torch.rand(96))

    class Weighted(Method):
        frozen = ("weights",)

        def step(self, m, batch):
            w = m.weights.value[order[torch.searchsorted(data.train.ids[order], batch.id)]]
            torch.testing.assert_close(w, weights.value[(data.train.ids[None] == batch.id[:, None]).int().argmax(1)])
            return (w * F.cross_entropy(m.student(batch), batch.y, reduction="none")).mean()

    execute(Weighted(), Roles(student=net(8, 4, 4), weights=weights), data, Engine(steps=4, batch_size=24))


def test_each_role_has_its_own_preprocessing():
    m = pair()
    m.teacher.preprocess = lambda x: (x - 1) / 2
    batch = Batch(x=torch.randn(3, 8))
    torch.testing.assert_close(m.teacher(batch), m.teacher.module((batch.x - 1) / 2))
    torch.testing.assert_close(m.student(batch), m.student.module(batch.x))


def test_early_stop_best_and_restore(tmp_path):
    values = iter([0.5, 0.7, 0.6, 0.65, 0.9, 0.1])
    weights = []

    def evaluate(m):
        weights.append(m.student.module[0].weight.clone())
        return {"score": next(values)}

    m = pair()
    r = execute(
        Mimic(),
        m,
        table(),
        Engine(epochs=6, patience=2, restore="best", keep=1),
        evaluate=evaluate,
        out=tmp_path / "run",
    )
    assert len([row for row in r.history if "val/score" in row]) == 4
    assert torch.equal(m.student.module[0].weight, weights[1])


def test_unknown_monitor():
    with pytest.raises(UsageError, match="metric to monitor"):
        execute(Mimic(), pair(), table(), Engine(epochs=1, monitor="f1"), evaluate=accuracy)


def test_endless_data_need_steps():
    with pytest.raises(UsageError, match="needs a number of steps"):
        execute(Gan(), gan_roles(), SimpleNamespace(train=gan_data))


def test_data_loader_with_workers_of_its_own():
    from torch.utils.data import DataLoader, TensorDataset

    data = table()
    loader = DataLoader(TensorDataset(data.train.x, data.train.y), batch_size=32, shuffle=True)
    a, b = pair(), pair()
    for m in (a, b):
        execute(Mimic(), m, SimpleNamespace(train=loader), Engine(epochs=2), optim={"student": SGD})
    same(a.student.module, b.student.module)


def test_compile_and_channels_last():
    m = Roles(student=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)))
    seen = []

    class Images(Method):
        frozen = ()

        def step(self, m, batch):
            seen.append(batch.x.is_contiguous(memory_format=torch.channels_last))
            return m.student(batch).square().mean()

    def images(step, generator):
        return Batch(x=torch.randn(4, 3, 8, 8, generator=generator))

    execute(Images(), m, SimpleNamespace(train=images), Engine(steps=2, channels_last=True))
    assert all(seen)
    assert m.student.module[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_compiled_role_keeps_its_keys():
    m, plain = pair(), pair()
    keys = list(m.student.module.state_dict())
    torch.compiler.reset()
    execute(Mimic(), m, table(), Engine(steps=2, batch_size=32, compile=("student",)), optim={"student": SGD})
    execute(Mimic(), plain, table(), Engine(steps=2, batch_size=32), optim={"student": SGD})
    assert list(m.student.module.state_dict()) == keys
    assert m.student.forward is not m.student.module
    same(m.student.module, plain.student.module, 1e-5)
