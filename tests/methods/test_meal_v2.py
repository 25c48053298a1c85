"""MEAL V2: the mean of probabilities, the discriminator in both senses, a whole run, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.methods.meal_v2.method import MEALV2, teachers_of
from limbeck.nn.discriminator import LogitDiscriminator, discrimination
from limbeck.nn.mlp import mlp
from limbeck.prove import seeded
from limbeck.teachers import Cached, Ensemble, collect

C = 5
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % C
BATCH = Batch(x=X, y=Y)


class Fixed(nn.Module):
    """The same logits whatever the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits


def net(seed, width=16):
    return seeded(seed, lambda: mlp(6, width, C))


def roles(*seeds, last_relu=True):
    m = Roles(teacher=Ensemble([net(s) for s in seeds or (0, 1)]), student=net(9, 8))
    m.discriminator = LogitDiscriminator(C, last_relu)
    m.freeze("teacher")
    return m


def student_gradient(method, m, batch=BATCH):
    next(iter(method.step(m, batch))).backward(m)
    return torch.cat([p.grad.flatten() for p in m.student.parameters()])


# The similarity loss


def logits(seed, rows=8):
    return 2 * torch.randn(rows, C, generator=torch.Generator().manual_seed(seed))


def fixed(student, *teachers):
    m = Roles(teacher=Ensemble([Fixed(t) for t in teachers]), student=Fixed(student))
    m.freeze("teacher")
    return m


def mean_of(*teachers):
    return torch.stack([t.softmax(-1) for t in teachers]).mean(0)


def test_the_gradient_is_the_difference_of_probabilities():
    s, a, b = logits(0), logits(1), logits(2)
    expected = (s.softmax(-1) - mean_of(a, b)) / len(s)
    torch.testing.assert_close(student_gradient(MEALV2(), fixed(s, a, b)), expected.flatten())


def test_equal_teachers_are_one_and_neither_order_nor_shifts_matter():
    s, a, b = logits(0), logits(1), logits(2)
    one = student_gradient(MEALV2(), fixed(s, a))
    torch.testing.assert_close(student_gradient(MEALV2(), fixed(s, a, a, a)), one)
    both = student_gradient(MEALV2(), fixed(s, a, b))
    torch.testing.assert_close(student_gradient(MEALV2(), fixed(s, b, a - 3)), both)
    assert not torch.allclose(one, both)


def test_probabilities_are_averaged_and_not_logits():
    a, b = logits(1), logits(2)
    mean, mean_logits = teachers_of(fixed(logits(0), a, b).teacher, BATCH)
    torch.testing.assert_close(mean.exp().sum(-1), torch.ones(8))
    torch.testing.assert_close(mean.exp(), mean_of(a, b))
    torch.testing.assert_close(mean_logits, (a + b) / 2)
    assert not torch.allclose(mean.exp(), mean_logits.softmax(-1), atol=1e-2)
    mean, mean_logits = teachers_of(fixed(logits(0), a, a + 2).teacher, BATCH)
    torch.testing.assert_close(mean.exp(), mean_logits.softmax(-1))


def test_a_class_map_holds_for_the_mean_logits_too():
    a, order = logits(1), [4, 3, 2, 1, 0]
    role = Roles(teacher=Ensemble([Fixed(a), Fixed(a[:, order])], class_maps=[None, order])).teacher
    torch.testing.assert_close(teachers_of(role, BATCH)[1], a)


def test_a_sure_teacher_is_a_label():
    s = logits(0)
    sure = 1e4 * F.one_hot(Y, C).float()
    loss = next(iter(MEALV2().step(fixed(s, sure), BATCH))).loss
    torch.testing.assert_close(loss, F.cross_entropy(s, Y))


def test_at_the_mean_the_gradient_is_zero_and_the_loss_is_the_entropy():
    a, b = logits(1), logits(2)
    mean = mean_of(a, b)
    m = fixed(mean.log(), a, b)
    loss = next(iter(MEALV2().step(m, BATCH))).loss
    torch.testing.assert_close(loss, torch.special.entr(mean).sum(-1).mean())
    assert student_gradient(MEALV2(), m).abs().max() < 1e-7


def test_labels_have_the_share_that_they_are_given():
    s, a, b = logits(0), logits(1), logits(2)
    soft, hard, both = (next(iter(MEALV2(label_weight=w).step(fixed(s, a, b), BATCH))).loss for w in (0, 1, 0.3))
    torch.testing.assert_close(hard, F.cross_entropy(s, Y))
    torch.testing.assert_close(both, 0.7 * soft + 0.3 * hard)


# The discriminator


def test_the_discriminators_loss_has_a_floor_where_it_ends_in_a_relu():
    far = torch.tensor([[1e3, 0.0], [0.0, 1e3]])
    assert discrimination(far, 1).item() == pytest.approx(0.5 * math.log(2))
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        net = LogitDiscriminator(C, last_relu=True, generator=g)
        for p in net.parameters():
            p.data *= 30
        assert discrimination(net(10 * torch.randn(12, C, generator=g)), 6) >= 0.5 * math.log(2) - 1e-6
    assert LogitDiscriminator(1000).net[0].out_features == 125
    assert LogitDiscriminator(5).net[0].out_features == 2  # 5 / 8 would be none


def test_code_lowers_what_the_discriminator_lowers_and_paper_raises_it():
    m = roles()
    without = student_gradient(MEALV2(), roles())
    given = torch.cat([m.student(X), m.teacher.raw(X, apart=True).mean(0)])
    discrimination(m.discriminator.raw(given), 8).backward()
    own = torch.cat([p.grad.flatten() for p in m.student.parameters()])
    assert own.abs().max() > 1e-6
    for variant, sign in (("code", 1), ("paper", -1)):
        found = student_gradient(MEALV2(variant=variant, discriminator_weight=0.5), roles())
        torch.testing.assert_close(found, without + sign * 0.5 * own)


def test_the_discriminator_learns_from_detached_logits():
    m = roles()
    first, second = MEALV2(variant="code").step(m, BATCH)
    assert (first.role, second.role) == ("student", "discriminator")
    second.loss.backward()
    assert all(p.grad is None for p in m.student.parameters())
    assert any(p.grad.abs().sum() > 0 for p in m.discriminator.parameters())


def test_a_discriminator_whose_last_layer_is_zero_adds_nothing():
    m = roles()
    for p in m.discriminator.net[4].parameters():
        p.data.zero_()
    found = student_gradient(MEALV2(variant="code"), m)
    torch.testing.assert_close(found, student_gradient(MEALV2(), roles()))


# A run


def data():
    g = torch.Generator().manual_seed(3)
    y = torch.arange(60) % C
    return Data(train=TensorSource(2 * torch.randn(C, 6, generator=g)[y] + 0.3 * torch.randn(60, 6, generator=g), y))


@pytest.mark.parametrize("variant", ["off", "code", "paper"])
def test_a_run_trains_student_and_discriminator_and_leaves_the_teachers_alone(variant):
    m = Roles(teacher=Ensemble([net(0), net(1)]), student=net(9, 8))
    before = {k: v.clone() for k, v in m.teacher.state_dict().items()}
    engine = Engine(epochs=10, batch_size=12, device="cpu", evaluate_every=0, log_every=1)
    optim = {"student": Optim("adam", lr=0.01), "discriminator": Optim("adam", lr=1e-3)}
    history = execute(MEALV2(variant=variant), m, data(), engine, optim=optim).history
    losses = [row["train/soft"] for row in history if "train/soft" in row]
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in m.teacher.state_dict().items())
    assert ("discriminator" in m) == (variant != "off")
    if variant == "paper":  # that of the code is dead from the start, with as few classes as these
        first = LogitDiscriminator(C, generator=roles().rng("discriminator"))
        assert not torch.equal(m.discriminator.net[4].bias, first.net[4].bias)


def test_bad_input_is_refused(tmp_path):
    for field in ({"variant": "gan"}, {"discriminator_weight": 0}, {"label_weight": 2}):
        with pytest.raises(UsageError, match=next(iter(field))):
            MEALV2(**field)
    stored = Cached(collect(net(0), data().train, tmp_path / "store"))
    m = Roles(teacher=stored, student=net(9, 8))
    engine = Engine(steps=1, batch_size=12, device="cpu")
    with pytest.raises(UsageError, match="stored outputs"):
        execute(MEALV2(variant="code"), m, data(), engine)
    execute(MEALV2(), m, data(), engine)
    with pytest.raises(UsageError, match="labels"):
        MEALV2(label_weight=0.5).check(roles(), Batch(x=X))
    with pytest.raises(UsageError, match="same classes"):
        MEALV2().check(Roles(teacher=net(0), student=mlp(6, 3)), BATCH)
