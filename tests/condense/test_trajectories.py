"""Experts trained side by side: the same as one after another, flat where asked, and the same bits after a kill."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Roles
from limbeck.core.errors import UsageError
from limbeck.data import TensorSource
from limbeck.data.condensed import Condensed
from limbeck.data.coresets import herding, medoids, mosaics
from limbeck.nn.convnet import ConvNet
from limbeck.nn.mlp import mlp
from limbeck.optim.unroll import call_flat, flatten
from limbeck.teachers import trajectories
from limbeck.teachers.following import Following, check_following
from limbeck.teachers.trajectories import (
    ExpertTraining,
    Segments,
    Trajectories,
    _batches,
    _sharpness_aware,
    check_buffer,
    smoothed,
    train_experts,
)  # fmt: skip

SMALL = ExpertTraining(count=3, epochs=3, lr=0.1, batch_size=8, operations=("shift",))


def source(n=24, size=4):
    g = torch.Generator().manual_seed(0)
    return TensorSource(torch.rand(n, 1, size, size, generator=g), torch.arange(n) % 3)


def network():
    torch.manual_seed(0)
    return ConvNet(3, 1, 4, 4, 1)


def test_side_by_side_is_one_after_another(tmp_path):
    net, data, training = network(), source(), SMALL
    train_experts(net, data, tmp_path, training)
    experts = Trajectories(tmp_path, net, training)
    for k in range(training.count):
        w = experts(k, 0)
        for epoch in range(training.epochs):
            for _, seen, y in _batches(data, training, epoch):
                at = w.requires_grad_()
                (g,) = torch.autograd.grad(F.cross_entropy(call_flat(net, at, seen[k]), y[k]), at)
                w = (w - training.lr * g).detach()
            torch.testing.assert_close(w, experts(k, epoch + 1), rtol=1e-4, atol=1e-5)


def test_snapshots_are_all_different(tmp_path):
    train_experts(network(), source(), tmp_path, SMALL)
    experts = Trajectories(tmp_path, network(), SMALL)
    all_of_them = torch.stack([experts(k, e) for k in range(3) for e in range(4)])
    distances = torch.cdist(all_of_them, all_of_them) + torch.eye(12) * 1e9
    assert distances.min() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_killed_after_an_epoch_it_ends_in_the_same_bits(momentum, tmp_path, monkeypatch):
    training = ExpertTraining(count=2, epochs=4, lr=0.05, momentum=momentum, batch_size=8, drop=0.5)
    train_experts(network(), source(), tmp_path / "whole", training)
    write, calls = trajectories._write, []

    def dies(folder, epoch, *rest):
        write(folder, epoch, *rest)
        calls.append(epoch)
        if epoch == 2 and len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trajectories, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        train_experts(network(), source(), tmp_path / "killed", training)
    train_experts(network(), source(), tmp_path / "killed", training)
    assert calls == [0, 1, 2, 3, 4]
    for name in sorted(p.name for p in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_direction_of_sharpness_aware_descent(adaptive):
    torch.manual_seed(0)
    weights, target = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    seen = []

    def gradient(w):
        seen.append(w)
        return (w - target) * torch.arange(1.0, 6.0, dtype=torch.float64)

    plain, sam_only = gradient(weights), ExpertTraining(radius=0.1, adaptive=adaptive)
    sam = _sharpness_aware(gradient, weights, plain, sam_only)
    moved = seen[-1] - weights
    sizes = (moved / weights.abs() if adaptive else moved).norm(dim=1)
    torch.testing.assert_close(sizes, torch.full((2,), 0.1, dtype=torch.float64))  # each expert by itself
    assert sam.equal(gradient(weights + moved))
    gsam = _sharpness_aware(gradient, weights, plain, replace(sam_only, gsam_alpha=0.7))
    orthogonal = (sam - gsam) / 0.7
    assert (orthogonal * sam).sum(1).abs().max().item() < 1e-12
    along = plain - orthogonal
    sign = (along * sam).sum(1, keepdim=True).sign()
    torch.testing.assert_close(F.normalize(along), F.normalize(sam) * sign)


def test_without_a_radius_descent_is_plain(tmp_path):
    trainings = {"a": SMALL, "b": replace(SMALL, gsam_alpha=0.9)}
    for name, training in trainings.items():
        train_experts(network(), source(), tmp_path / name, training)
    a, b = (Trajectories(tmp_path / name, network(), training)(0, 3) for name, training in trainings.items())
    assert a.equal(b)


def test_the_penalty_of_a_linear_network_is_known(tmp_path):
    """Of f(x) = Ax, d sum(logits) / dx = A^T 1 wherever it is taken."""
    net = nn.Linear(4, 3)
    data = TensorSource(torch.randn(6, 4), torch.arange(6) % 3)
    training = ExpertTraining(count=1, epochs=1, lr=1.0, batch_size=6, penalty=2.0, norm="sample")
    train_experts(net, data, tmp_path, training)
    experts = Trajectories(tmp_path, net, training)
    w = experts(0, 0).requires_grad_()
    x, _, y = next(iter(_batches(data, training, 0)))
    norm = w[:12].view(3, 4).sum(0).norm()
    loss = F.cross_entropy(call_flat(net, w, x[0]), y[0]) + 2 * (norm - 1).square()
    torch.testing.assert_close(experts(0, 1), w - torch.autograd.grad(loss, w)[0], rtol=1e-4, atol=1e-5)


def test_the_ramp_damps_the_first_epochs(tmp_path):
    plain, ramped = (ExpertTraining(count=1, epochs=1, lr=0.1, batch_size=24, ramp=r) for r in (False, True))
    for name, training in (("a", plain), ("b", ramped)):
        train_experts(network(), source(), tmp_path / name, training)
    a, b = (Trajectories(tmp_path / n, network(), t) for n, t in (("a", plain), ("b", ramped)))
    torch.testing.assert_close(b(0, 1) - b(0, 0), 0.5 * (a(0, 1) - a(0, 0)))
    assert smoothed(plain).ramp


@pytest.mark.parametrize("drop_after", [0, 1])
def test_the_rate_drops_once_and_the_momentum_starts_anew(drop_after, tmp_path):
    """The code of AST drops it after epoch `epochs // 2 + 1`, so that the next one is the first with the lower rate."""
    data = source(8)
    training = ExpertTraining(1, 6, 0.1, momentum=0.9, batch_size=8, drop=0.5, drop_after=drop_after)
    train_experts(network(), data, tmp_path, training)
    experts = Trajectories(tmp_path, network(), training)
    w, speed = experts(0, 0), torch.zeros(())
    for epoch in range(6):
        ((_, seen, y),) = _batches(data, training, epoch)
        at = w.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(call_flat(network(), at, seen[0]), y[0]), at)
        first = 4 + drop_after
        speed = g if epoch in (0, first) else 0.9 * speed + g
        w = (w - (0.05 if epoch >= first else 0.1) * speed).detach()
        torch.testing.assert_close(w, experts(0, epoch + 1), rtol=1e-4, atol=1e-5)


def test_experts_that_are_there_are_taken_where_they_fit(tmp_path, monkeypatch):
    train_experts(network(), source(), tmp_path / "a", SMALL)
    monkeypatch.setattr(trajectories, "_write", None)  # nothing is trained
    assert train_experts(network(), source(), tmp_path / "a", replace(SMALL, count=2, seed=7))["reused"]
    fewer = Trajectories(tmp_path / "a", network(), replace(SMALL, count=2))
    assert fewer(1, 2).equal(Trajectories(tmp_path / "a", network(), SMALL)(1, 2))
    with pytest.raises(UsageError, match="no such expert"):
        fewer(3, 0)
    with pytest.raises(UsageError, match="too few experts"):
        check_buffer(tmp_path / "a", network(), replace(SMALL, count=4))
    curved = network()
    for name, part in curved.named_modules():
        if isinstance(part, nn.ReLU):
            curved.set_submodule(name, nn.Tanh())
    assert {n: p.shape for n, p in curved.named_parameters()} == {n: p.shape for n, p in network().named_parameters()}
    with pytest.raises(UsageError, match="another structure"):
        check_buffer(tmp_path / "a", curved, SMALL)


def test_other_experts_in_the_same_place_are_not_taken_for_the_first(tmp_path):
    found = []
    for seed in range(2):
        training = replace(SMALL, epochs=1, seed=seed)
        shutil.rmtree(tmp_path / "experts", ignore_errors=True)
        train_experts(network(), source(), tmp_path / "experts", training)
        found.append(Trajectories(tmp_path / "experts", network(), training)(0, 1))
    assert not found[0].equal(found[1])


def test_segments_are_experts_and_starts():
    batch = Segments(2, 3).batch(torch.tensor([0, 2, 4]), 0)
    assert batch.expert.tolist() == [0, 0, 1]
    assert batch.start.tolist() == [0, 2, 1]


def replaying(operations=()):
    """A student whose samples and steps are the expert's own."""
    data = source(8)
    training = ExpertTraining(count=1, epochs=2, lr=0.1, batch_size=8)
    small = Condensed(data.x, data.labels, step_size=0.1)
    return data, training, Roles(teacher=network(), student=small)


@pytest.mark.parametrize("form", ["full", "constant", "tesla"])
def test_a_student_with_the_experts_samples_arrives(form, tmp_path):
    data, training, m = replaying()
    train_experts(network(), data, tmp_path, training)
    experts = Trajectories(tmp_path, network(), training)
    batch = Segments(1, 1).batch(torch.tensor([0]), 0)
    arrived = Following(student_steps=2, expert_epochs=2, form=form).loss(m, experts, batch)
    assert arrived.item() < 1e-8
    m.student.module.step_size.data.zero_()
    assert Following(2, 2, form=form).loss(m, experts, batch).item() == pytest.approx(1.0)


def test_parts_of_a_batch_of_segments_are_its_mean(tmp_path):
    train_experts(network(), source(), tmp_path, SMALL)
    experts = Trajectories(tmp_path, network(), SMALL)
    m = Roles(teacher=network(), student=Condensed(source(6).x, torch.arange(6) % 3, step_size=0.1))
    following = Following(3, 1, batch_size=4, operations=("shift",))
    batch = Segments(3, 2).batch(torch.tensor([0, 3, 4, 5]), 0)
    whole = following.loss(m, experts, batch)
    torch.testing.assert_close(whole, torch.stack([following.loss(m, experts, b) for b in batch.split(2)]).mean())
    m.step = 5
    assert following.loss(m, experts, batch) != whole


def test_a_batch_of_as_many_segments_as_samples_is_told(tmp_path):
    train_experts(network(), source(), tmp_path, SMALL)
    m = Roles(teacher=network(), student=Condensed(source(6).x, torch.arange(6) % 3, step_size=0.1))
    experts, segments = Trajectories(tmp_path, network(), SMALL), Segments(3, 1)
    with pytest.warns(UserWarning, match="32 segments in a batch are as many trainings of 1 steps"):
        Following(1, 1).loss(m, experts, segments.batch(torch.arange(32) % 3, 0))


def test_all_samples_are_seen_before_one_is_again():
    rows = Following(student_steps=5, batch_size=4)._rows(8, key=3)
    assert [len(r) for r in rows] == [4] * 5
    assert sorted(torch.cat(rows[:2]).tolist()) == list(range(8))
    assert sorted(torch.cat(rows[2:4]).tolist()) == list(range(8))


def test_medoids_and_herding():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    every = medoids(x, y, 10)
    assert sorted(every.tolist()) == list(range(20))
    assert y[medoids(x, y, 3, 2)].tolist() == [0] * 6 + [1] * 6
    assert len(set(medoids(x, y, 3, 2).tolist())) == 12
    assert y[herding(x, y, 4)].tolist() == [0] * 4 + [1] * 4
    for choose in (lambda: medoids(x, y, 11), lambda: herding(x, y, 11)):
        with pytest.raises(UsageError, match="too few samples"):
            choose()


def test_mosaics_are_of_patches_sorted_by_what_a_network_knows():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(30, 1, 8, 8, generator=g), torch.arange(30) % 2
    flat = TensorSource((torch.arange(30.0) / 30).view(-1, 1, 1, 1).expand(30, 1, 8, 8).contiguous(), y)

    def bright(x):  # class 0 is dark, class 1 is bright
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)

    easy, medium, hard = (mosaics(flat, bright, 2, difficulty=d) for d in ("easy", "medium", "hard"))
    steps = [found[:2].amax((1, 2, 3)).max() for found in (easy, medium, hard)]
    assert steps == sorted(steps)
    own = flat.x[y == 0].mean((1, 2, 3))
    patches = easy[:2].unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)  # [n, factor^2] of one shade each
    torch.testing.assert_close(patches.T.flatten(), own[:8], atol=1e-5, rtol=0)  # the darkest, ranks dealt out in turn
    torch.testing.assert_close(hard[2:].max(), flat.x[15].max())  # of those that should be bright, the eight darkest
    source = TensorSource(x, y)
    assert mosaics(source, bright, 3).equal(mosaics(source, bright, 3))
    assert not mosaics(source, bright, 3).equal(mosaics(source, bright, 3, seed=1))
    assert mosaics(source, bright, 1, factor=3).shape == (2, 1, 8, 8)  # 8 is no multiple of 3
    assert 0 <= float(mosaics(source, bright, 3).min()) <= float(mosaics(source, bright, 3).max()) <= 1
    many = mosaics(source, bright, 1, factor=1, crops=20, difficulty="easy")
    one = mosaics(source, bright, 1, factor=1, crops=1, difficulty="easy")
    assert bright(many)[1, 1] > bright(one)[1, 1]  # the best of more crops is better
    with pytest.raises(UsageError, match="too few"):
        mosaics(source, bright, 4)
    with pytest.raises(UsageError, match="no such difficulty"):
        mosaics(source, bright, 1, difficulty="simple")
    with pytest.raises(UsageError, match="patches are parts of images"):
        mosaics(TensorSource(torch.rand(8, 4), torch.arange(8) % 2), bright, 1)


def test_what_does_not_fit(tmp_path):
    with pytest.raises(UsageError, match="weights alone"):
        train_experts(ConvNet(3, 1, 4, 4, 1, norm="batch"), source(), tmp_path, SMALL)
    with pytest.raises(UsageError, match="weights alone"):
        train_experts(nn.Sequential(nn.Dropout(0.1), network()), source(), tmp_path, SMALL)
    with pytest.raises(UsageError, match="no whole expert"):
        Trajectories(tmp_path, network(), SMALL)
    train_experts(network(), source(), tmp_path / "a", SMALL)
    with pytest.raises(UsageError, match="another architecture"):
        Trajectories(tmp_path / "a", mlp(4, 4, 3), SMALL)
    with pytest.raises(UsageError, match="need labels"):
        train_experts(network(), TensorSource(torch.rand(4, 1, 4, 4)), tmp_path / "b", SMALL)
    for other in (replace(SMALL, lr=0.2), replace(SMALL, epochs=4), replace(SMALL, operations=())):
        with pytest.raises(UsageError, match="another way"):
            train_experts(network(), source(), tmp_path / "a", other)
    with pytest.raises(UsageError, match="other data"):
        train_experts(network(), source(27), tmp_path / "a", SMALL)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "begun.json").write_text('{"shapes": {}}')
    with pytest.raises(UsageError, match="other experts"):
        train_experts(network(), source(), tmp_path / "half", SMALL)
    (tmp_path / "a" / "epoch-0001.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="cannot be read"):
        Trajectories(tmp_path / "a", network(), SMALL)(0, 1)
    with pytest.raises(UsageError, match="no condensed set"):
        check_following(Roles(student=nn.Linear(2, 2)), Following(), 10, 2)
    small = Roles(student=Condensed(torch.zeros(1, 2), torch.tensor([0])))
    with pytest.raises(UsageError, match="too few epochs"):
        check_following(small, Following(expert_epochs=2), 10, 10)
    assert flatten([torch.zeros(2), torch.zeros(1, 3)]).shape == (5,)
