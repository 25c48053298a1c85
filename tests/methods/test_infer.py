"""INFER: what a budget buys, what reaches a compensator, how images and labels are composed."""

import pytest
import torch
from torch import nn

from limbeck import Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.data import Data, TensorSource
from limbeck.data.augment import Mixing, Views
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.slots import Slots
from limbeck.engine.run import execute
from limbeck.evaluate.condensation import Training, lessons
from limbeck.methods.infer.method import INFER, kept
from limbeck.nn.convnet import ConvNet
from limbeck.teachers.relabel import mean_logits, static_labels
from limbeck.teachers.statistics import Recovery, batch_norms


def network(seed=0):
    """A network that remembers the statistics of darker images than there are here."""
    torch.manual_seed(seed)
    net = ConvNet(3, channels=1, size=8, width=6, depth=2, norm="batch")
    for layer in batch_norms(net):
        layer.momentum = None
    net.train()(torch.rand(200, 1, 8, 8) ** 3)
    return net.eval()


def images(classes=3):
    g = torch.Generator().manual_seed(1)
    return TensorSource(torch.rand(60, 1, 8, 8, generator=g), torch.arange(60) % classes)


def world(teachers=2, each=4):
    nets = {f"teacher_{i}": network(i) for i in range(teachers)}
    m = Roles(**nets, student=from_source(images(), each))
    m.freeze(*nets)
    return m


def made(method, m, steps=4, **engine):
    optim = {"student": Optim("adam", lr=0.05, betas=(0.5, 0.9))}
    settings = Engine(steps=steps, device="cpu", evaluate_every=0, **engine)
    return execute(method, m, Data(train=images()), settings, optim=optim).roles.student.module


def slots_and_set(method, m):
    small = method.compensated(m.student.module, len(m.teachers))
    m.student = small
    return Slots(torch.arange(len(small.x)).split(3), units=len(m.teachers)), small


# The budget


def test_a_budget_is_kept_and_used():
    for budget in range(1, 60):
        for classes in (2, 3, 10, 100, 1000):
            for teachers in range(6):
                k = kept(budget, classes, teachers)
                assert k * classes + k * teachers <= budget * classes
                assert (k + 1) * (classes + teachers) > budget * classes
    assert kept(7, 10, 0) == 7
    # CIFAR-10, CIFAR-100 and ImageNet at 10 images of each class, with as many to train on as the paper says.
    assert [kept(10, c, m) * (m + 1) for c, m in ((10, 4), (100, 4), (1000, 3))] == [35, 45, 36]


def test_what_is_stored():
    small = made(INFER(), world())  # 4 of 3 classes, 2 teachers: 2 are kept
    assert small.x.shape == (6, 1, 8, 8)
    assert small.compensators.shape == (4, 1, 8, 8)
    sizes = small.bytes()
    assert (sizes["x"], sizes["compensators"]) == (6 * 256, 4 * 256)
    assert sizes["x"] + sizes["compensators"] <= 12 * 256
    assert len(small) == 18
    assert sizes["soft"] == 18 * 3 * 4  # one table: N x C floats
    assert small.y.bincount().tolist() == [6, 6, 6]


# The compensators


def test_at_first_every_image_is_a_real_one_and_copies_have_one_label():
    m = world()
    real = m.student.module
    small = INFER().compensated(real, 2)
    x = small()
    assert x[:6].equal(small.x)
    assert x[6:12].equal(x[:6])
    assert x[12:].equal(x[:6])
    assert all(any(image.equal(other) for other in real.x) for image in small.x)
    z = static_labels(small, mean_logits(list(m.teachers.values())))
    assert z[:6].equal(z[6:12])
    torch.testing.assert_close(z[:6], (m.teacher_0(x[:6]) + m.teacher_1(x[:6])) / 2)


def test_the_gradient_of_a_compensator_is_the_sum_of_those_of_its_images():
    m, method = world(), INFER(bn_weight=1.0, operations=())
    slots, small = slots_and_set(method, m)
    found = torch.autograd.grad(method.step(slots, m, slots(0, m.rng())).loss, small.compensators)[0]
    for unit in range(4):
        slot, k = divmod(unit, 2)
        x = small.x[slots.rows[slot]].detach().requires_grad_(True)
        loss = Recovery(1.0)(m[f"teacher_{k}"], x, small.y[slots.rows[slot]])
        torch.testing.assert_close(found[unit], torch.autograd.grad(loss, x)[0].sum(0), atol=1e-5, rtol=1e-4)


def test_a_compensator_does_not_depend_on_other_slots_and_members():
    whole = made(INFER(operations=()), world())
    first = made(INFER(operations=()), world(teachers=1, each=3))  # 2 are kept as well
    torch.testing.assert_close(first.compensators, whole.compensators[::2], atol=1e-6, rtol=0)
    parts = made(INFER(), world(), micro_batches=4)
    torch.testing.assert_close(parts.compensators, made(INFER(), world()).compensators, atol=1e-6, rtol=0)


def test_real_images_stay_and_a_compensator_is_free_but_not_what_it_makes():
    m = world()
    before = INFER().compensated(m.student.module, 2).x.clone()
    small = made(INFER(), m, steps=60)
    assert small.x.equal(before)
    assert small.compensators.min() < 0
    assert small.x[0].add(small.compensators[0]).aminmax() != small()[6].aminmax()  # it was clipped
    assert 0 <= float(small().min()) <= float(small().max()) <= 1
    torch.testing.assert_close(small()[6:9], (small.x[:3] + small.compensators[0]).clamp(0, 1))
    torch.testing.assert_close(small()[12:15], (small.x[:3] + small.compensators[1]).clamp(0, 1))
    torch.testing.assert_close(small()[9:12], (small.x[3:6] + small.compensators[2]).clamp(0, 1))


def test_a_compensator_lowers_the_loss_of_its_network():
    m = world()
    small = made(INFER(operations=()), m, steps=60)
    for unit in range(4):
        slot, k = divmod(unit, 2)
        rows = torch.arange(3) + 3 * slot
        x, y, role = small.x[rows], small.y[rows], m[f"teacher_{k}"]
        assert Recovery(1.0)(role, x + small.compensators[unit], y) < Recovery(1.0)(role, x, y)


def test_it_comes_back_from_disk_as_it_was(tmp_path):
    small = made(INFER(), world())
    small.save(tmp_path)
    again = Condensed.load(tmp_path)
    assert again().equal(small())
    assert again.soft.equal(small.soft)


# Labels


def test_the_mean_of_logits():
    nets = [network(0), network(1)]
    x = torch.rand(4, 1, 8, 8)
    one, two = (Role("teacher", net) for net in nets)
    torch.testing.assert_close(mean_logits([one, one, one])(x), one(x))
    assert mean_logits([one])(x).equal(one(x))
    torch.testing.assert_close(mean_logits([one, two])(x), (one(x) + two(x)) / 2)


def test_mixed_labels_are_linear():
    z, partner = torch.randn(4, 3), torch.tensor([2, 3, 0, 1])
    mixed = [Mixing(partner, lam).targets(z) for lam in (1.0, 0.3, 0.7)]
    assert mixed[0].equal(z)
    torch.testing.assert_close(mixed[1] + mixed[2], z + z[partner])
    torch.testing.assert_close(Mixing(torch.arange(4), 0.3).targets(z), z)


def test_tables_of_epochs_are_the_dynamic_labels():
    small = made(INFER(label_epochs=2, label_batch_size=6), world())
    assert small.soft.shape == (2, 18, 3)
    told = {"batch_size": 6, "operations": ["shift", "flip"], "mixing": "mixup", "alpha": 0.8, "seed": 0, "least": 2}
    assert small.info["views"] == told
    trained = small.train(network(5).train(), steps=5)
    assert trained(small()).shape == (18, 3)
    static = made(INFER(), world())
    static.train(network(5).train(), steps=5, views=Views(6, ("flip",), "mixup"))


# What cannot work


def test_budgets_that_are_too_small_and_sets_that_have_compensators_are_refused():
    batch = images().batch(torch.arange(2), 0)
    with pytest.raises(UsageError, match="leaves no real image") as error:
        INFER().check(world(teachers=4, each=1), batch)
    assert "condensed:3 or more" in str(error.value)
    INFER().check(world(teachers=4, each=3), batch)
    m = world()
    m.student = INFER().compensated(m.student.module, 2)
    with pytest.raises(UsageError, match="has compensators"):
        INFER().check(m, batch)
    m = world()
    m.teacher_1 = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UsageError, match="remembers no batch statistics"):
        INFER().check(m, batch)


def test_a_set_with_one_table_says_how_its_samples_are_mixed():
    """As the authors train on it: logits of pairs are mixed as the images are, before the softmax."""
    small = made(INFER(label_operations=(), label_batch_size=5), world())
    how = Training.own(small).resolved(small)
    assert (how.labels, how.views) == ("soft", Views(5, (), "mixup", 0.8))
    seen, ((rows, see), *_) = lessons(small, how)(0), how.views.epoch(0, len(small))
    x, mixing = see(small().detach()[rows])
    torch.testing.assert_close(seen.x, x)
    soft = small.soft[rows]
    torch.testing.assert_close(seen.target, mixing.share * soft + (1 - mixing.share) * soft[mixing.partner])
    assert "training" not in made(INFER(label_epochs=2), world()).info
