"""DWA and recovery from batch statistics: what is matched, how far weights go, and that nothing but the images changes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.data import Data, TensorSource
from limbeck.data.augment import Views, augment
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.slots import slots_of
from limbeck.engine.run import execute
from limbeck.losses.statistics import moments, statistics_distance
from limbeck.methods.dwa.method import DWA, Adjusted
from limbeck.nn.convnet import ConvNet
from limbeck.teachers.relabel import collect_labels, epoch_labels, label_table, mean_logits, static_labels
from limbeck.teachers.statistics import Recovery, ascended, batch_norms, batch_statistics, input_statistics

ADAM = {"student": Optim("adam", lr=0.05, betas=(0.5, 0.9))}


def network(seed=0, classes=3):
    """A network that remembers the statistics of darker images than there are here."""
    torch.manual_seed(seed)
    net = ConvNet(classes, channels=1, size=8, width=6, depth=2, norm="batch")
    for layer in batch_norms(net):
        layer.momentum = None
    net.train()(torch.rand(200, 1, 8, 8) ** 3)
    return net.eval()


def images(n=30, classes=3):
    g = torch.Generator().manual_seed(1)
    return TensorSource(torch.rand(n, 1, 8, 8, generator=g), torch.arange(n) % classes)


def roles(each=2, **teachers):
    return Roles(**(teachers or {"teacher": network()}), student=from_source(images(), each))


def recovered(method, m, steps=4, **engine):
    settings = Engine(**{"steps": steps, "device": "cpu", "evaluate_every": 0, **engine})
    return execute(method, m, Data(train=images()), settings, optim=ADAM).roles.student.module


def distance(a, b):
    return torch.stack([(a[n] - b[n]).square().sum() for n in a]).sum().sqrt().item()


# Statistics


def test_statistics_that_are_remembered_cost_nothing_and_the_order_of_a_batch_does_not_count():
    net, x = network(), torch.rand(7, 1, 8, 8)
    with input_statistics(net) as found:
        net(x)
        before = {i: (m.clone(), v.clone()) for i, (m, v) in found.items()}
        net(x.flip(0))
    assert len(found) == 2
    for i, pair in before.items():
        torch.testing.assert_close(found[i], pair)
    # Layer by layer, as the second input depends on what the first layer remembers.
    for i, layer in enumerate(batch_norms(net)):
        with input_statistics(net) as found:
            net(x)
        layer.running_mean, layer.running_var = (t.detach() for t in found[i])
    loss = Recovery().parts(Role("teacher", net), x, torch.zeros(7, dtype=torch.int64))[1]
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_statistics_are_those_of_the_input_biased_and_over_all_but_channels():
    x = torch.randn(5, 3, 4, 4)
    mean, variance = moments(x)
    torch.testing.assert_close(mean, x.transpose(0, 1).flatten(1).mean(1))
    torch.testing.assert_close(variance, x.transpose(0, 1).flatten(1).var(1, unbiased=False))
    layer = nn.BatchNorm2d(3, momentum=None).train()
    layer(x)  # what torch itself remembers is the unbiased one
    torch.testing.assert_close(layer.running_var, variance * 80 / 79)


def test_the_weight_of_the_variance_and_of_the_first_layer():
    m, x, y = roles(), images().batch(torch.arange(6), 0).x, torch.arange(6) % 3
    with input_statistics(m.teacher.module) as found:
        m.teacher(x)
    gaps = [
        10.0 ** (i == 0) * torch.linalg.vector_norm(found[i][1] - layer.running_var)
        for i, layer in enumerate(batch_norms(m.teacher.module))
    ]
    more = Recovery(0.3, 5.0)(m.teacher, x, y) - Recovery(0.3, 1.0)(m.teacher, x, y)
    torch.testing.assert_close(more, 0.3 * 4.0 * sum(gaps))
    plain, (loss, gap) = Recovery(0.3, 1.0)(m.teacher, x, y), Recovery(0.3, 1.0).parts(m.teacher, x, y)
    torch.testing.assert_close(plain, loss + 0.3 * gap)
    torch.testing.assert_close(loss, F.cross_entropy(m.teacher(x), y))


def test_the_norm_is_not_squared_and_has_a_gradient_where_it_is_zero():
    mean = torch.zeros(2, requires_grad=True)
    loss = statistics_distance([(mean, torch.ones(2))], [(torch.zeros(2), torch.ones(2))])
    assert torch.autograd.grad(loss, mean)[0].tolist() == [0, 0]
    double = statistics_distance([(torch.full((2,), 2.0), torch.ones(2))], [(torch.zeros(2), torch.ones(2))], first=1.0)
    assert double.item() == pytest.approx(math.sqrt(8))
    with pytest.raises(UsageError, match="no statistic for each layer"):
        statistics_distance([], [])


def test_hooks_go_also_when_the_network_fails():
    net = network()
    for _ in range(2):
        with pytest.raises(RuntimeError), input_statistics(net):
            net(torch.zeros(1, 5, 8, 8))
    assert not any(layer._forward_pre_hooks for layer in batch_norms(net))


def test_the_statistics_of_the_batch_change_no_buffer_and_no_dropout():
    net = nn.Sequential(network(), nn.Dropout(0.9))
    m = Roles(teacher=net)
    m.freeze("teacher")
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(8, 1, 8, 8)
    with batch_statistics(net):
        a, b = net(x), net(x)
    assert a.equal(b)  # nothing was dropped
    assert not a.allclose(net(x))
    assert not any(part.training for part in net.modules())
    assert all(t.equal(before[name]) for name, t in net.state_dict().items())


# The adjustment


@pytest.mark.parametrize(("steps", "exact"), [(1, True), (5, False)])
def test_weights_go_as_far_as_rho(steps, exact):
    role, source = Role("teacher", network()), images().batch(torch.arange(6), 0)
    own = dict(role.module.named_parameters())
    there = ascended(role, source.x, source.y, 0.3, steps, own)
    assert distance(there, own) == pytest.approx(0.3, rel=1e-4) if exact else 0.05 < distance(there, own) < 0.3
    assert distance(ascended(role, source.x, source.y, 0.0, steps, own), own) == 0


def test_of_a_linear_network_the_first_step_is_in_closed_form():
    net = nn.Linear(4, 3, bias=False)
    x, y = torch.randn(1, 4), torch.tensor([1])
    g = (net(x).softmax(1) - F.one_hot(y, 3)).T @ x
    there = ascended(Role("teacher", net), x, y, 0.1, 1, dict(net.named_parameters()))
    torch.testing.assert_close(there["weight"], (net.weight + 0.1 * g / g.norm()).detach())
    small = ascended(Role("teacher", net), x, y, 1e-3, 1, dict(net.named_parameters()))
    gain = F.cross_entropy(x @ small["weight"].T, y) - F.cross_entropy(net(x), y)
    assert gain.item() == pytest.approx(1e-3 * g.norm().item(), rel=0.05)


def test_a_network_forgets_its_slot_and_is_itself_not_changed():
    m = roles()
    m.freeze("teacher")
    before = copy.deepcopy(m.teacher.module.state_dict())
    small = recovered(DWA(rho=0.5, label_epochs=2, label_batch_size=4, label_statistics="batch"), m)
    assert all(t.equal(before[name]) for name, t in m.teacher.module.state_dict().items())
    assert small.soft.shape == (2, 6, 3)


def test_slots_have_networks_of_their_own_or_go_on_from_the_one_before(tmp_path):
    m = roles()
    slots = slots_of(m.student.module, 2)  # two images of classes 0 and 1, and of class 2
    own = dict(m.teacher.module.named_parameters())
    found = {}
    for variant in ("paper", "code"):
        (tmp_path / variant).mkdir()
        told = DWA(rho=0.3, adjustment_steps=1, variant=variant).adjust(slots, m, tmp_path / variant)
        assert all(b > a for a, b in zip(told["before"], told["after"], strict=True))
        found[variant] = [Adjusted(tmp_path / variant, m.teacher)(k) for k in range(4)]
    for k in (0, 2):  # where an image number begins
        assert distance(found["paper"][k], found["code"][k]) == 0
        assert distance(found["code"][k], own) == pytest.approx(0.3, rel=1e-3)
    for k in (1, 3):
        assert distance(found["paper"][k], own) == pytest.approx(0.3, rel=1e-3)
        assert distance(found["code"][k], found["code"][k - 1]) == pytest.approx(0.3, rel=1e-3)
        assert distance(found["code"][k], own) > 0.31


def test_without_rho_it_is_its_base_and_slots_that_go_together_are_as_slots_one_after_another():
    base = recovered(DWA(rho=0.0, variance_weight=1.0, label_epochs=0), roles())
    m = roles()
    slots, x = slots_of(m.student.module), m.student.module.x
    optimizer = ADAM["student"].build(m.student.module)
    from limbeck.diffusion.draws import Draws

    for step in range(4):
        m.step = step
        keys = Draws(m, Batch(id=torch.arange(2))).keys("view")
        losses = [
            Recovery()(m.teacher, augment(x[rows], keys[j : j + 1], ("roll",)), m.student.module.y[rows])
            for j, rows in enumerate(slots.rows)
        ]
        optimizer.zero_grad()
        (2 * torch.stack(losses).mean()).backward()
        optimizer.step()
        x.data.clamp_(0, 1)
    torch.testing.assert_close(base.x, x, atol=1e-6, rtol=0)


# Slots


def test_groups_have_statistics_of_their_own():
    m, x, y = roles(), torch.rand(6, 1, 8, 8, requires_grad=True), torch.tensor([0, 1, 2] * 2)
    together = Recovery(0.3, 2.0)(m.teacher, x, y, groups=2)
    alone = torch.stack([Recovery(0.3, 2.0)(m.teacher, x[r : r + 3], y[r : r + 3]) for r in (0, 3)])
    torch.testing.assert_close(together, alone)
    assert not torch.isclose(alone.mean(), Recovery(0.3, 2.0)(m.teacher, x, y))
    both = [torch.autograd.grad((losses * torch.tensor([1.0, 2.0])).sum(), x)[0] for losses in (together, alone)]
    torch.testing.assert_close(*both)


def test_slots_of_one_network_take_one_call():
    m, calls = roles(4), []
    m.teacher.module.register_forward_hook(lambda *_: calls.append(1))
    slots = slots_of(m.student.module)
    DWA(rho=0.0).step(slots, Adjusted(None, m.teacher), m, slots(0, m.rng()))
    assert (len(slots), len(calls)) == (4, 1)


def test_a_slot_does_not_depend_on_the_others():
    two = recovered(DWA(rho=0.2, label_epochs=0), roles())
    m = roles()
    rows = slots_of(m.student.module).rows[0]
    alone = Roles(teacher=network(), student=Condensed(m.student.module.x[rows], m.student.module.y[rows]))
    torch.testing.assert_close(recovered(DWA(rho=0.2, label_epochs=0), alone).x, two.x[rows], atol=1e-6, rtol=0)


def test_micro_batches_and_the_size_of_batches_change_nothing():
    whole = recovered(DWA(label_epochs=0), roles(4))
    for engine in ({"micro_batches": 4}, {"batch_size": 1}, {"micro_batches": 5}):
        torch.testing.assert_close(recovered(DWA(label_epochs=0), roles(4), **engine).x, whole.x, atol=1e-6, rtol=0)


def test_slots_are_one_image_of_each_class_or_of_some():
    small = Condensed(torch.zeros(8, 1), torch.tensor([0, 1, 0, 1, 2, 2, 3, 3]))
    assert [r.tolist() for r in slots_of(small).rows] == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert [r.tolist() for r in slots_of(small, 3).rows] == [[0, 1, 4], [6], [2, 3, 5], [7]]
    with pytest.raises(UsageError, match="different numbers of samples"):
        slots_of(Condensed(torch.zeros(3, 1), torch.tensor([0, 0, 1])))


def test_a_roll_loses_no_pixel_and_is_one_for_the_slot():
    x = torch.rand(3, 1, 8, 8)
    x[1] = x[0]
    seen = augment(x, torch.tensor([5]), ("roll",))
    assert not seen.equal(x)
    assert seen[0].equal(seen[1])
    assert seen.flatten(1).sort().values.equal(x.flatten(1).sort().values)


# Labels and the whole


def test_images_stay_within_bounds_and_come_nearer_to_what_is_remembered():
    m = roles()
    small, rows = m.student.module, slots_of(m.student.module).rows[0]
    before = Recovery(0.05, 2.0)(m.teacher, small.x[rows], small.y[rows])
    method = DWA(rho=0.0, bn_weight=0.05, variance_weight=2.0, operations=(), label_epochs=0)
    small = recovered(method, m, steps=60)
    assert 0 <= float(small.x.min()) < float(small.x.max()) <= 1
    assert Recovery(0.05, 2.0)(m.teacher, small.x[rows], small.y[rows]) < 0.8 * before
    assert small.info["clip"] == [0.0, 1.0]
    torch.testing.assert_close(small.soft, m.teacher(small.x))


def test_labels_are_of_the_views_that_a_training_sees_after_mixing():
    m, views = roles(), Views(4, ("flip",), "cutmix", seed=3)
    small = m.student.module
    table = epoch_labels(small, mean_logits([m.teacher]), views, 2)
    for epoch in range(2):
        for rows, see in views.epoch(epoch, len(small)):
            seen, mixing = see(small.x[rows])
            assert table[epoch, rows].equal(m.teacher(seen).half())
            assert mixing.share < 1 or seen.equal(augment(small.x[rows], see.keys, ("flip",)))
    assert static_labels(small, mean_logits([m.teacher])).shape == (6, 3)


@pytest.mark.parametrize("by_batch", [False, True])
def test_stored_labels_are_the_same_and_are_not_made_again(tmp_path, by_batch):
    m, views, calls = roles(), Views(4, ("flip",), "cutmix", seed=3), []
    small, teachers = m.student.module, [m.teacher]
    m.teacher.module.register_forward_hook(lambda *_: calls.append(1))
    expected = epoch_labels(small, mean_logits(teachers), views, 3, teachers if by_batch else ())
    calls.clear()
    store = collect_labels(small, teachers, tmp_path / "views", views, 2, by_batch=by_batch)
    assert (len(store), len(calls)) == (2 * 6, 2 * 2)
    store = collect_labels(small, teachers, tmp_path / "views", views, 3, by_batch=by_batch)  # one epoch more
    assert (len(store), len(calls)) == (3 * 6, 3 * 2)
    assert label_table(store, 6, 3).equal(expected)
    plain = collect_labels(small, teachers, tmp_path / "plain", None)
    assert label_table(plain, 6, 0).equal(static_labels(small, mean_logits(teachers)))
    for other in ({"views": replace(views, seed=4)}, {"by_batch": not by_batch}, {"weights": torch.ones(1)}):
        with pytest.raises(UsageError, match="does not fit"):
            collect_labels(small, teachers, tmp_path / "views", **{"views": views, "by_batch": by_batch} | other)


def test_a_network_that_says_what_the_labels_say_has_nothing_to_learn():
    m, views = roles(), Views(3, ("flip",), "mixup")
    small = m.student.module
    net = copy.deepcopy(m.teacher.module)
    table = epoch_labels(small, mean_logits([m.teacher]), views, 1)
    for rows, see in views.epoch(0, len(small)):
        s = net(see(small.x[rows])[0])
        loss = F.kl_div((s / 10).log_softmax(1), (table[0, rows].float() / 10).softmax(1), reduction="batchmean")
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(loss, net.classifier.weight)[0].abs().max() < 1e-4


def test_a_network_is_trained_on_the_images_with_their_labels():
    small = recovered(DWA(label_epochs=3, label_batch_size=4), roles())
    trained = small.train(network(2).train(), steps=12)
    assert trained(small.x).shape == (6, 3)


# What cannot work


def test_bad_fields_are_refused():
    for bad, where in [
        ({"rho": -1}, "rho"), ({"adjustment_steps": 0}, "adjustment_steps"), ({"variance_weight": -1}, "variance_weight"),
        ({"variant": "both"}, "variant"), ({"bn_weight": -1}, "bn_weight"), ({"clip": (1, 0)}, "clip"),
        ({"label_statistics": "all"}, "label_statistics"), ({"temperature": 0}, "temperature"), ({"mixing": "x"}, "mixing"),
        ({"label_epochs": 0, "label_statistics": "batch"}, "label_epochs"), ({"classes_at_once": 1}, "classes_at_once"),
        ({"label_batch_size": 1}, "label_batch_size"), ({"alpha": 0}, "alpha"), ({"label_epochs": -1}, "label_epochs"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=f"{where} is out of range"):
            DWA(**bad)


def test_networks_without_batch_statistics_and_samples_out_of_bounds_are_refused():
    plain = ConvNet(3, channels=1, size=8, width=4, depth=1)
    batch = images().batch(torch.arange(2), 0)
    with pytest.raises(UsageError, match="remembers no batch statistics"):
        DWA().check(roles(teacher=plain), batch)
    with pytest.raises(UsageError, match="no condensed set"):
        DWA().check(Roles(teacher=network(), student=nn.Linear(1, 1)), batch)
    m = roles()
    with torch.no_grad():
        m.student.module.x[0] = 1.5
    with pytest.raises(UsageError, match="outside of the bounds"):
        DWA().check(m, batch)
    DWA(clip=None).check(m, batch)
    with pytest.raises(UsageError, match="needs a trained network"):
        DWA().check(Roles(student=m.student.module), batch)


def test_samples_that_are_no_numbers_and_classes_that_are_too_small_are_refused():
    x = torch.rand(6, 1, 8, 8)
    x[2, 0, 0, 0] = math.nan
    with pytest.raises(UsageError, match="NaN or infinite"):
        from_source(TensorSource(x, torch.arange(6) % 3), 2)
    with pytest.raises(UsageError, match="too few samples"):
        from_source(images(), 11)
