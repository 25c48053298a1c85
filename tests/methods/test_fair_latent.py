"""Fair latents: the losses of both stages, what stays as it was, and runs that leave a table or images."""

import pytest
import torch
from fair_worlds import SIZES, eye, images, net, rows, source
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from limbeck import Engine, Optim, Roles
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.categorical import Columns
from limbeck.data.synthetic import SyntheticImages, SyntheticTable
from limbeck.engine.run import execute
from limbeck.evaluate.fairness import synthesise
from limbeck.losses.independence import group_distance
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import ImageVAE, TableVAE

ENGINE = Engine(steps=4, batch_size=20, device="cpu", evaluate_every=0)
ADAM = Optim("adam", lr=0.01)


WORLDS = {"table": (net, source), "images": (eye, images)}


@pytest.mark.parametrize("kind", WORLDS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind):
    model, real = WORLDS[kind]
    m = Roles(teacher=model(), student=model())
    batch = real().batch(torch.arange(20), 0)
    update = FairLatent().step(m, batch)
    assert update.loss.item() == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(update.loss, list(m.student.module.encoder.parameters()))
    assert all(g.abs().max() < 1e-6 for g in gradients)


def test_without_the_penalty_it_is_a_conditional_autoencoder():
    m = Roles(teacher=net(), student=net(4))
    batch = source().batch(torch.arange(20), 0)
    plain, fair = (FairLatent(fairness=f).teach(m, batch) for f in (0.0, 10.0))
    mean, logvar = m.teacher.module.encode(batch.x, batch.y)
    penalty = group_distance(mean, logvar, batch.y, 2)
    torch.testing.assert_close(fair.loss - plain.loss, 10 * penalty, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fair.logs["group_distance"], penalty)
    authors = FairLatent(fairness=1e3, normalise=False).teach(m, batch)
    raw = group_distance(mean, logvar, batch.y, 2, normalise=False)
    torch.testing.assert_close(authors.loss - plain.loss, 1e3 * raw, rtol=1e-3, atol=1e-4)


def test_the_student_learns_distance_and_divergence():
    m = Roles(teacher=net(16), student=net(4, seed=1))
    batch = source().batch(torch.arange(20), 0)
    (mean, logvar), (own, own_logvar) = (m[r].module.encode(batch.x, batch.y) for r in ("teacher", "student"))
    square = (own - mean).square().sum(1).mean()
    torch.testing.assert_close(FairLatent(utility=0.0).step(m, batch).loss, square)
    p, q = (torch.distributions.Normal(u, (0.5 * v).exp()) for u, v in ((mean, logvar), (own, own_logvar)))
    forward = torch.distributions.kl_divergence(p, q).sum(1).mean()  # from the teacher to the student
    torch.testing.assert_close(FairLatent(utility=2.0).step(m, batch).loss, square + 2 * forward)


@pytest.mark.parametrize("kind", WORLDS)
def test_no_step_waits_for_the_device(kind):
    model, real = WORLDS[kind]
    batch = real().batch(torch.arange(8), 0)
    with FakeTensorMode() as fake:  # where reading a number from a tensor raises
        m = Roles(teacher=model(16), student=model(4))
        batch = Batch(**tree_map_only(torch.Tensor, fake.from_tensor, batch.fields()))
        for update in (FairLatent().teach(m, batch), FairLatent().step(m, batch)):
            update.loss.backward()


@pytest.mark.parametrize("kind", WORLDS)
def test_a_run_leaves_teacher_and_decoder_and_writes_samples(kind, tmp_path):
    model, real = WORLDS[kind]
    m = Roles(teacher=model(16), student=model(4, seed=1))
    method = FairLatent(teach_steps=4, samples=70)
    execute(method, m, Data(train=real()), ENGINE, optim=dict.fromkeys(("teacher", "student"), ADAM), out=tmp_path)
    teacher, student = m.teacher.module, m.student.module
    for a, b in zip(teacher.decoder.parameters(), student.decoder.parameters(), strict=True):
        assert a.equal(b)
        assert not b.requires_grad
    encoders = [sum(p.numel() for p in n.encoder.parameters()) for n in (student, teacher)]
    assert encoders[0] < encoders[1]
    if kind == "table":
        made = SyntheticTable.load(tmp_path)
        assert made.columns == Columns.numbered(SIZES, 2)
    else:
        made = SyntheticImages.load(tmp_path)
        student.check({"image": made.images, "target": made.targets})
    assert (len(made), made.info["from_samples"]) == (70, 60)


@pytest.mark.parametrize("kind", WORLDS)
def test_a_teacher_that_is_given_stays_as_it_is(kind):
    model, real = WORLDS[kind]
    given = model(16)
    before = [p.clone() for p in given.parameters()]
    m = Roles(teacher=given, student=model(4, seed=1))
    execute(FairLatent(teach_steps=0), m, Data(train=real()), ENGINE, optim={"student": ADAM})
    assert all(a.equal(b) for a, b in zip(before, given.parameters(), strict=True))


@pytest.mark.parametrize("kind", WORLDS)
def test_without_the_penalty_parts_of_a_batch_are_the_batch(kind):
    """All draws follow from ids; what is left that looks at a whole batch is the penalty."""
    model, real = WORLDS[kind]
    ends = []
    for parts in (1, 4):
        m = Roles(teacher=model(16), student=model(4, seed=1))
        engine = Engine(steps=3, batch_size=20, micro_batches=parts, device="cpu", evaluate_every=0)
        optim = dict.fromkeys(("teacher", "student"), Optim("sgd", lr=0.01))
        execute(FairLatent(fairness=0.0, teach_steps=3), m, Data(train=real()), engine, optim=optim)
        ends.append([*m.teacher.module.parameters(), *m.student.module.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_recoloured_images_show_the_group_that_was_drawn():
    """The teacher learns shade into the latent and channel from the group, so that samples are of the drawn groups."""
    real = images(400)
    m = Roles(teacher=eye(32), student=eye(4, seed=1))
    engine = Engine(steps=250, batch_size=100, device="cpu", evaluate_every=0)
    optim = dict.fromkeys(("teacher", "student"), ADAM)
    execute(FairLatent(teach_steps=250, kl_weight=0.1), m, Data(train=real), engine, optim=optim)
    made, groups = synthesise(m.student.module, real)
    light = made["image"].mean((2, 3))
    assert (light.argmax(1) == groups).double().mean() > 0.95
    shade = made["image"][:, :, :2].amax((1, 2, 3)) > 0.25
    assert (shade == made["target"]).double().mean() > 0.8


def test_some_rows_of_a_sorted_file_are_of_all_groups(tmp_path):
    codes, _ = rows(400)
    ordered = TensorSource(net().one_hot(codes), torch.arange(400) // 200, torch.arange(400))
    FairLatent(samples=40)._synthetic(ordered, Roles(teacher=net(), student=net()), tmp_path)
    assert 8 <= int(SyntheticTable.load(tmp_path).groups.sum()) <= 32


@pytest.mark.parametrize(
    "fields", [{"fairness": -1.0}, {"kl_weight": -1.0}, {"label_decode": "x"}, {"teach_steps": -1}]
)
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        FairLatent(**fields)


def test_what_does_not_fit():
    batch = source().batch(torch.arange(4), 0)
    with pytest.raises(UsageError, match="no autoencoder"):
        FairLatent().check(Roles(teacher=net(), student=torch.nn.Linear(2, 2)), batch)
    with pytest.raises(UsageError, match="does not fit the student"):
        FairLatent().check(Roles(teacher=net(), student=TableVAE(SIZES, 2, latent=5)), batch)
    with pytest.raises(UsageError, match="rows do not fit"):
        FairLatent().check(Roles(teacher=net(), student=net(4)), Batch(x=torch.zeros(2, 3), y=torch.zeros(2)))
    with pytest.raises(UsageError, match="not one-hot"):
        FairLatent().check(Roles(teacher=net(), student=net(4)), Batch(x=torch.rand(2, 7), y=torch.zeros(2)))
    for y in (torch.zeros(3, dtype=torch.int64), torch.tensor([0.0, 1.0, 0.5]), None):
        with pytest.raises(UsageError, match="no groups"):
            FairLatent().check_data(Data(train=TensorSource(torch.zeros(3, 7), y)))
    three = Data(train=TensorSource(net().one_hot(rows(3)[0]), torch.arange(3), torch.arange(3)))
    with pytest.raises(UsageError, match="more groups"):
        next(FairLatent().stages(Roles(teacher=net(), student=net(4)), three))
    given = images()
    batch = given.batch(torch.arange(4), 0)
    both = Roles(teacher=eye(), student=eye(4))
    for x, what in (
        (batch.x["image"], "images do not fit"),
        (batch.x | {"image": batch.x["image"][:, :1]}, "images do not fit"),
        (batch.x | {"image": 2 + batch.x["image"]}, "out of range"),
        (batch.x | {"target": 2 + batch.x["target"]}, "out of range"),
    ):
        with pytest.raises(UsageError, match=what):
            FairLatent().check(both, Batch(x=x, y=batch.y))
    with pytest.raises(UsageError, match="does not fit the student"):
        FairLatent().check(Roles(teacher=eye(), student=net()), batch)
    with pytest.raises(UsageError, match="halved so often"):
        ImageVAE((3, 12, 12), channels=(4, 4, 4))
    with pytest.raises(UsageError, match="no groups"):
        FairLatent().check_data(Data(train=TensorSource(given.x, torch.ones(60, dtype=torch.int64))))
    made, record = TakeDecoder(net(16))(net(4))
    assert record["kind"].endswith(":take_decoder")
    assert not made.decoder[0].weight.requires_grad
