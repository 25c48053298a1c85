"""CV-DD: how votes weigh, who sits in a slot, what labels depend on, and that one member's vote is its own loss."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.augment import Views, augment
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.coresets import mosaics
from limbeck.data.slots import slots_of
from limbeck.diffusion.draws import Draws
from limbeck.engine.run import execute
from limbeck.methods.cv_dd.method import CVDD
from limbeck.methods.dwa.method import DWA
from limbeck.nn.convnet import ConvNet
from limbeck.teachers.committee import seats, votes
from limbeck.teachers.relabel import epoch_labels, mean_logits
from limbeck.teachers.statistics import Recovery, batch_norms, batch_statistics


def network(seed=0, width=6):
    """A network that remembers the statistics of darker images than there are here."""
    torch.manual_seed(seed)
    net = ConvNet(3, channels=1, size=8, width=width, depth=2, norm="batch")
    for layer in batch_norms(net):
        layer.momentum = None
    net.train()(torch.rand(200, 1, 8, 8) ** 3)
    return net.eval()


def images():
    g = torch.Generator().manual_seed(1)
    return TensorSource(torch.rand(30, 1, 8, 8, generator=g), torch.arange(30) % 3)


def committee(*seeds, each=2):
    m = Roles(**{f"teacher_{i}": network(s, 4 + s) for i, s in enumerate(seeds)}, student=from_source(images(), each))
    m.freeze(*m.teachers)
    return m


def recovered(method, m, steps=3, **engine):
    optim = {"student": Optim("adam", lr=0.05)}
    settings = Engine(steps=steps, device="cpu", evaluate_every=0, **engine)
    return execute(method, m, Data(train=images()), settings, optim=optim).roles.student.module


def gradient(method, m):
    """The sum of a step's losses, and what reaches the images."""
    slots, x = slots_of(m.student.module), m.student.module.x
    found = list(method.step(slots, m, slots(0, m.rng())))
    assert [u.apply for u in found] == [False] * (len(found) - 1) + [True]
    loss = sum(u.loss for u in found)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# Votes


def test_published_votes():
    torch.testing.assert_close(votes([63, 65.3], 5), torch.tensor([0.3869, 0.6131]), atol=1e-4, rtol=0)
    five = torch.tensor([0.1403, 0.1766, 0.2431, 0.2222, 0.2178])
    torch.testing.assert_close(votes([63, 65.3, 68.5, 67.6, 67.4], 10), five, atol=6e-5, rtol=0)
    assert votes([56.4, 42.3], 5).tolist() == pytest.approx([0.944, 0.056], abs=5e-4)


def test_votes_sum_to_one_and_only_differences_count():
    a = [63.0, 65.3, 50.0]
    assert votes(a, 5).sum().item() == pytest.approx(1)
    torch.testing.assert_close(votes(a, 5), votes([v + 20 for v in a], 5))
    torch.testing.assert_close(votes(a, 1e9), torch.full((3,), 1 / 3))
    torch.testing.assert_close(votes(a, 1e-3), torch.tensor([0.0, 1.0, 0.0]))
    shares = votes([v / 100 for v in a], 5)
    assert shares.max() - shares.min() < 0.02  # why priors are in per cent
    for bad in ([], [math.nan], [math.inf, 1.0]):
        with pytest.raises(UsageError, match="make no votes"):
            votes(bad, 5)
    with pytest.raises(UsageError, match="temperature"):
        votes(a, 0)


def test_seats():
    a = [63.0, 65.3, 68.5, 67.6, 67.4]
    pairs = [seats(j, 5, 2, "all", a) for j in range(20)]
    assert len(set(pairs[:10])) == 10
    assert pairs[:10] == pairs[10:]
    assert seats(7, 5, 2, "best", a) == (2, 3)
    drawn = [seats(j, 5, 2, "random", a, seed=4) for j in range(500)]
    assert drawn == [seats(j, 5, 2, "random", a, seed=4) for j in range(500)]
    assert len(set(drawn)) == 10
    assert max(map(drawn.count, set(drawn))) < 90
    with pytest.raises(UsageError, match="more teachers than there are"):
        seats(0, 2, 3, "all", a)


def test_every_class_meets_every_pair_where_classes_come_in_parts(monkeypatch):
    m, met = committee(0, 1, 2), []
    x, y = torch.rand(9, 1, 8, 8), torch.arange(3).repeat_interleave(3)
    m.student = Condensed(x, y, info={"images_per_class": 3})
    slots = slots_of(m.student.module, 2)
    monkeypatch.setattr("limbeck.methods.cv_dd.method.seats", lambda j, *rest: met.append(j) or seats(j, *rest))
    next(iter(CVDD(members=2, classes_at_once=2, operations=()).step(slots, m, slots(0, m.rng()))))
    found = {(int(c), number) for number, rows in zip(met, slots.rows, strict=True) for c in y[rows]}
    assert found == {(c, j) for c in range(3) for j in range(3)}


# The loss


def test_one_member_is_the_base():
    m = committee(0)
    one, method = Roles(teacher=m.teacher_0.module, student=m.student.module), CVDD(members=1, operations=("roll",))
    slots = slots_of(m.student.module)
    base = DWA(rho=0.0, variance_weight=1.0).step(slots, lambda slot: None, one, slots(0, m.rng())).loss
    assert gradient(method, m)[0].equal(base.detach())


def test_two_copies_are_one_whatever_the_votes():
    one, two = committee(0), committee(0, 0)
    for method in (CVDD(), CVDD(priors=(70.0, 40.0))):
        for a, b in zip(gradient(CVDD(), one), gradient(method, two), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_gradient_is_the_weighted_sum_of_the_members_on_one_view():
    m, priors = committee(0, 1, 2), (60.0, 64.0, 55.0)
    slots, x, y = slots_of(m.student.module), m.student.module.x, m.student.module.y
    keys = Draws(m, Batch(id=torch.arange(2))).keys("view")
    expected = torch.zeros_like(x)
    for j, (rows, pair) in enumerate(zip(slots.rows, [(0, 1), (0, 2)], strict=True)):
        w = votes([priors[k] for k in pair], 5.0)
        for k, weight in zip(pair, w, strict=True):
            seen = augment(x[rows], keys[j : j + 1], ("crop", "flip", "roll"))
            expected += torch.autograd.grad(weight * Recovery()(m[f"teacher_{k}"], seen, y[rows]), x)[0]
    torch.testing.assert_close(gradient(CVDD(priors=priors), m)[1], expected, atol=1e-6, rtol=1e-4)


def test_slots_with_other_members_in_any_micro_batch():
    method = CVDD(init="real", label_epochs=1)
    whole = recovered(method, committee(0, 1, 2, each=4))
    parts = recovered(method, committee(0, 1, 2, each=4), micro_batches=4)
    torch.testing.assert_close(parts.x, whole.x, atol=1e-6, rtol=0)


def test_members_are_as_they_were():
    m = committee(0, 1)
    before = {n: copy.deepcopy(r.module.state_dict()) for n, r in m.teachers.items()}
    small = recovered(CVDD(priors=(60.0, 50.0), label_epochs=2), m)
    for name, role in m.teachers.items():
        assert all(t.equal(before[name][key]) for key, t in role.module.state_dict().items())
        assert not any(part.training for part in role.module.modules())
    assert small.info["views"]["batch_size"] == 16
    assert small.soft.shape == (2, 6, 3)


# Labels


def test_labels_by_the_batch_are_those_of_running_statistics_that_are_the_batchs():
    net, x = network(), torch.rand(8, 1, 8, 8)
    with batch_statistics(net):
        found = net(x)
    assert not found.allclose(net(x))
    same = copy.deepcopy(net)
    for layer in batch_norms(same):
        layer.momentum = 1.0
    same.train()(x)
    for layer, side in zip(batch_norms(same), (8, 4), strict=True):
        n = len(x) * side * side
        layer.running_var.mul_((n - 1) / n)
    torch.testing.assert_close(same.eval()(x), found, atol=1e-5, rtol=1e-4)


def test_labels_by_the_batch_follow_its_order_and_its_company():
    net, x = network(), torch.rand(8, 1, 8, 8)
    order = torch.randperm(8)
    with batch_statistics(net):
        a, b, c = net(x), net(x[order]), net(x[:4])
    torch.testing.assert_close(a[order], b)
    assert not a[:4].allclose(c, atol=1e-3)
    torch.testing.assert_close(net(x)[:4], net(x[:4]))


def test_labels_are_of_the_whole_committee_on_the_batches_that_will_be_seen():
    m, priors = committee(0, 1, 2), (60.0, 64.0, 55.0)
    small = m.student.module
    method = CVDD(priors=priors, label_batch_size=4, label_epochs=2)
    roles, views = list(m.teachers.values()), Views(4, ("crop", "flip"), "cutmix", seed=0)
    assert method.views(0) == views
    answer = mean_logits(roles, method.weights(m))
    table = epoch_labels(small, answer, views, 2, roles)
    for rows, see in views.epoch(1, len(small)):
        seen = see(small.x[rows])[0]
        assert seen.equal(next(s for r, s in views.epoch(1, len(small)) if r.equal(rows))(small.x[rows])[0])  # again
        z = torch.zeros(len(rows), 3)
        for weight, role in zip(votes(priors, 10.0), roles, strict=True):
            with batch_statistics(role.module):
                z += weight * role(seen)
        torch.testing.assert_close(table[1, rows].float(), z, atol=2e-3, rtol=2e-3)
    halves = epoch_labels(small, answer, views, 1, roles, parts=2)
    assert not halves[0].allclose(table[0], atol=1e-3)


def test_halves_of_a_batch_have_statistics_of_their_own_in_a_run():
    method = CVDD(operations=(), label_batch_size=6, label_epochs=1)
    whole, halves = (recovered(replace(method, variant=v), committee(0, 1)) for v in ("paper", "code"))
    assert whole.x.equal(halves.x)
    assert not whole.soft.allclose(halves.soft, atol=1e-3)
    assert ("label_parts" in whole.info, halves.info["label_parts"]) == (False, 2)


def test_no_part_of_a_last_batch_is_a_single_sample():
    small = recovered(CVDD(operations=(), label_batch_size=4, label_epochs=2, variant="code"), committee(0, 1))
    assert len(small) % 4 == 2  # two samples over, of which each part would have one
    assert small.soft.isfinite().all()
    assert small.info["views"]["least"] == 4
    assert [len(rows) for rows, _ in Views(4, least=4).epoch(0, 6)] == [6]


def test_the_stretched_cosine():
    plain, stretched = (Optim(lr=1.0, schedule="cosine", stretch=s) for s in (1.0, 2.0))
    assert plain.factor(100, 100) == pytest.approx(0)
    assert stretched.factor(100, 100) == pytest.approx(0.5)
    assert stretched.factor(50, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    with pytest.raises(UsageError, match="stretch is out of range"):
        Optim(stretch=0.5)


def test_images_begin_as_mosaics_of_patches_of_medium_difficulty():
    m, source = committee(0, 1), images()
    answer = mean_logits(list(m.teachers.values()))
    expected = mosaics(source, answer, 2, difficulty="medium", seed=m.seed)
    method = CVDD(operations=())
    assert method.mosaics(source, m, None).equal(expected)
    mixed = torch.tensor([2, 0, 5, 1, 4, 3])
    m.student = Condensed(m.student.module.x[mixed], m.student.module.y[mixed], info=m.student.module.info)
    assert method.mosaics(source, m, None).equal(expected[torch.tensor([2, 0, 4, 1, 5, 3])])


# What cannot work


def test_bad_fields_and_committees_are_refused():
    for bad, where in [
        ({"init": "noise"}, "init"), ({"members": 0}, "members"),
        ({"choice": "some"}, "choice"), ({"vote_temperature": 0}, "vote_temperature"),
        ({"label_vote_temperature": -1}, "label_vote_temperature"), ({"variant": "both"}, "variant"),
        ({"label_batch_size": 3, "variant": "code"}, "label_batch_size"),
        ({"classes_at_once": 1}, "classes_at_once"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=f"{where} is out of range"):
            CVDD(**bad)
    batch = images().batch(torch.arange(2), 0)
    with pytest.raises(UsageError, match="differ in number"):
        CVDD(priors=(50.0,)).check(committee(0, 1), batch)
    m = committee(0)
    m.teacher_1 = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UsageError, match="remembers no batch statistics"):
        CVDD().check(m, batch)
    with pytest.raises(UsageError, match="mosaics are made of images"):
        CVDD().check(committee(0, 1), Batch(x=torch.rand(2, 4), y=torch.zeros(2)))


def test_mosaics_need_four_images_each_before_any_work(monkeypatch):
    """There are 10 images of each class: enough for two mosaics, not for three."""
    touched = []
    monkeypatch.setattr("limbeck.methods.cv_dd.method.mosaics", lambda *given, **how: touched.append(given))
    with pytest.raises(UsageError, match="too few images for mosaics") as error:
        recovered(CVDD(), committee(0, 1, each=3))
    assert ">= 12" in str(error.value)
    assert not touched
    monkeypatch.undo()
    recovered(CVDD(label_epochs=1), committee(0, 1, each=2), steps=1)


def test_one_teacher_will_do():
    m = Roles(teacher=network(), student=Condensed(torch.rand(6, 1, 8, 8), torch.arange(6) // 2))
    assert recovered(CVDD(label_epochs=1), m).soft.shape == (1, 6, 3)
