"""WAD: the loss and its special cases, the bookkeeping of promotions, whole runs, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, DatasetSource, TensorSource
from limbeck.engine.run import execute
from limbeck.losses import nt_xent
from limbeck.methods.wad import method as module
from limbeck.methods.wad.method import WAD, Encoder
from limbeck.methods.wad.sources import Labelled, Taught, TwoViews, View
from limbeck.nn.mlp import mlp
from limbeck.prove import accuracy


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = draw(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
U, PSEUDO = draw(6, 4, seed=1), torch.tensor([2, 2, 1, 0, 0, 1])
WEIGHT = torch.linspace(0, 0.5, 6)


def student(seed=0):
    torch.manual_seed(seed)
    return mlp(4, 8, 3)


def update_of(method=None, x=U, y=PSEUDO, weight=WEIGHT):
    m = Roles(student=student())
    batch = Batch(x=X, y=Y, unlabelled={"x": x, "id": torch.arange(6), "y": y, "weight": weight})
    (update,) = (method or WAD()).step(m, batch)
    update.loss.backward()
    return update, [p.grad for p in m.student.parameters()]


def supervised():
    m = Roles(student=student())
    loss = F.cross_entropy(m.student(X), Y)
    loss.backward()
    return loss, [p.grad for p in m.student.parameters()]


# The loss


def test_the_loss_is_the_weighted_sum():
    update, _ = update_of()
    model = student()
    pseudo = -model(U).log_softmax(1)[range(6), PSEUDO]
    expected = F.cross_entropy(model(X), Y) + (WEIGHT * pseudo).sum() / 6  # not over the sum of the weights
    torch.testing.assert_close(update.loss, expected)
    assert update.logs["weight"].item() == pytest.approx(0.25)


def test_the_same_samples_with_their_labels_count_twice():
    update, gradients = update_of(x=X, y=Y, weight=torch.ones(6))
    loss, single = supervised()
    torch.testing.assert_close(update.loss, 2 * loss)
    for g, h in zip(gradients, single, strict=True):
        torch.testing.assert_close(g, 2 * h)


def test_weights_of_zero_leave_the_supervised_gradient():
    _, gradients = update_of(weight=torch.zeros(6))
    for g, h in zip(gradients, supervised()[1], strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-7)


def test_unweighted_is_a_weight_of_one():
    torch.testing.assert_close(update_of(WAD(weighted=False))[0].loss, update_of(weight=torch.ones(6))[0].loss)


def test_the_encoder_learns_by_simclr():
    m = Roles(encoder=nn.Linear(4, 5))
    expected = nt_xent(m.encoder(X), m.encoder(U), temperature=0.2)
    torch.testing.assert_close(WAD(temperature=0.2).contrast(m, Batch(x=X, other=U)), expected)


# Pseudo labels


def test_labels_are_of_the_nearest_and_weights_of_the_margin():
    m = Roles(teacher=nn.Identity())
    found = WAD().labels(m, Labelled(TensorSource(3 * X), Y), TensorSource(0.1 * U))
    cosines = F.normalize(U, dim=1) @ F.normalize(X, dim=1).T
    best = torch.stack([cosines[:, k == Y].max(1).values for k in range(3)], dim=1)
    ordered = best.sort(dim=1, descending=True)
    assert torch.equal(found["label"], ordered.indices[:, 0])
    torch.testing.assert_close(found["weight"], ordered.values[:, 0] - ordered.values[:, 1])


# Promotion


def test_sizes_of_promotions():
    assert [WAD().promoted(t, 1000) for t in range(1, 7)] == [64, 36, 16, 4, 0, 0]
    assert [WAD(promotions=0).promoted(1, 1000), WAD(base_share=1.0, promotions=2).promoted(1, 10)] == [0, 2]


def test_the_surest_agreement_is_promoted_first():
    m, order = Roles(student=student()), WAD().agreed(Roles(student=student()), TensorSource(U), PSEUDO)
    losses = F.cross_entropy(m.student(U), PSEUDO, reduction="none")
    assert (losses[order].diff() >= 0).all()


def small(noise=0.0):
    """Three classes in two of four dimensions; the other two are noise, which augmentation draws anew."""
    y = torch.arange(60) % 3
    content = 3 * torch.eye(3)[y][:, :2] + 0.3 * draw(60, 2, seed=2)
    x = torch.cat([content, draw(60, 2, seed=3)], dim=1)
    if noise:
        x[:, 2:] = 0
    unlabelled = TensorSource(x[12:])
    if noise:
        blur = torch.tensor([0.0, 0.0, noise, noise])
        unlabelled = DatasetSource(list(x[12:]), transform=lambda row: row + blur * torch.randn(4))
    return Data(train=TensorSource(x[:12], y[:12]), unlabelled=unlabelled, test=TensorSource(x, y))


SETTINGS = {"engine": Engine(epochs=2, batch_size=16), "optim": {"student": Optim(lr=0.02), "encoder": Optim(lr=0.01)}}


def rounds(monkeypatch, method):
    """The labelled and the unlabelled ids of each round."""
    seen = []

    class Spy(Taught):
        def __init__(self, labelled, unlabelled, labels, weights, seed=0):
            super().__init__(labelled, unlabelled, labels, weights, seed)
            seen.append((labelled, unlabelled.ids, labels))

    monkeypatch.setattr(module, "Taught", Spy)
    execute(method, Roles(teacher=nn.Identity(), student=student()), small(), **SETTINGS)
    return seen


def test_samples_move_from_one_side_to_the_other(monkeypatch):
    method = WAD(promotions=3, base_share=0.5)
    seen = rounds(monkeypatch, method)
    ids = small().unlabelled.ids
    assert len(seen) == 4
    sizes = [len(labelled) for labelled, _, _ in seen]
    assert sizes == [12, 12 + 10, 12 + 10 + 2, 12 + 10 + 2]  # 48 * 0.5 * 4 / 9 and 38 * 0.5 / 9
    for labelled, left, _ in seen:
        assert len(labelled) + len(left) == 60
        assert not set(labelled.ids.tolist()) & set(left.tolist())
        assert set(labelled.ids[12:].tolist()) | set(left.tolist()) == set(ids.tolist())


def test_promoted_samples_keep_the_label_they_had(monkeypatch):
    first, second = rounds(monkeypatch, WAD(promotions=2, base_share=0.5))[:2]
    given = dict(zip(first[1].tolist(), first[2].tolist(), strict=True))
    joined = second[0]
    batch = joined.batch(torch.arange(12, len(joined)), 0)
    assert batch.y.tolist() == [given[i] for i in batch.id.tolist()]


def test_a_batch_has_labels_and_weights_by_sample():
    pairs = Taught(TensorSource(X, Y), TensorSource(U), PSEUDO, WEIGHT)
    for view in range(3):
        unlabelled = Batch(**pairs.batch(torch.arange(5), view).unlabelled)
        rows = [U.tolist().index(x) for x in unlabelled.x.tolist()]
        assert torch.equal(unlabelled.y, PSEUDO[rows])
        assert torch.equal(unlabelled.weight, WEIGHT[rows])


def test_views():
    noisy = small(noise=1.0).unlabelled
    rows = torch.arange(3)
    two = TwoViews(noisy).batch(rows, 4)
    assert torch.equal(two.x, noisy.batch(rows, 8).x)
    assert torch.equal(two.other, noisy.batch(rows, 9).x)
    assert torch.equal(View(noisy, 2).batch(rows, 7).x, noisy.batch(rows, 2).x)


# Whole runs


def test_with_a_given_encoder_which_stays_as_it_was():
    torch.manual_seed(1)
    teacher = nn.Linear(4, 6)
    before = teacher.weight.clone()
    engine = Engine(epochs=20, batch_size=16)
    m = Roles(teacher=teacher, student=student())
    result = execute(WAD(promotions=1), m, small(), engine, optim=SETTINGS["optim"])
    assert torch.equal(teacher.weight, before)
    assert list(result.roles) == ["teacher", "student"]
    assert accuracy(result.roles, small().test) > 80


def test_by_name_without_a_teacher(tmp_path):
    result = limbeck.distill(
        None, student(), small(noise=1.0), WAD(promotions=1), out=tmp_path, progress="off",
        engine={"epochs": 10, "batch_size": 16}, optim={"student": {"lr": 0.02}},
    )  # fmt: skip
    assert accuracy(result.roles, small().test) > 50
    x = small().test.x
    torch.testing.assert_close(
        limbeck.load(tmp_path, student(seed=3), trust=True)(x), result.roles.student.module.eval()(x)
    )


def made(out=None, seed=0):
    engine = Engine(epochs=2, batch_size=16, seed=seed)
    data = small(noise=1.0)
    return execute(WAD(promotions=1, embed_dim=4), Roles(student=student()), data, engine,
                   optim=SETTINGS["optim"], out=out)  # fmt: skip


def test_an_encoder_is_made_where_none_is_given():
    result = made()
    assert isinstance(result.roles.encoder.module, Encoder)
    assert result.roles.encoder(X).shape == (6, 4)
    assert {row["stage"] for row in result.history} == {"encoder", "round-1", "round-2"}


@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_run_that_makes_its_encoder_goes_on_where_it_was_stopped(tmp_path, monkeypatch, call):
    calls = iter(range(1, 100))

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return predict(*args, **kwargs)

    predict = module.predict
    with monkeypatch.context() as patch:
        patch.setattr(module, "predict", failing)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    resumed, whole = made(tmp_path).roles, made().roles
    for role in ("encoder", "student"):
        for name, value in whole[role].state_dict().items():
            assert torch.equal(value, resumed[role].state_dict()[name]), (role, name)


# What it refuses


@pytest.mark.parametrize(
    "fields", [{"promotions": -1}, {"base_share": 1.5}, {"base_share": -0.1}, {"temperature": 0.0}, {"embed_dim": 0}]
)
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError) as error:
        WAD(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: Data(train=TensorSource(X, Y)), "needs data.unlabelled"),
        (lambda: Data(train=TensorSource(X), unlabelled=TensorSource(U)), "needs some labels"),
        (lambda: Data(train=TensorSource(X, 2 * Y), unlabelled=TensorSource(U)), "without a labelled sample"),
    ],
    ids=["no pool", "no labels", "a class without labels"],
)
def test_data_that_do_not_fit(data, words):
    with pytest.raises(UsageError, match=words) as error:
        WAD().check_data(data())
    assert error.value.fix


def test_more_promoted_than_labelled_is_told():
    data = Data(train=TensorSource(X, Y), unlabelled=TensorSource(draw(200, 4, seed=5)))
    with pytest.warns(UserWarning, match="promotes 12 pseudo-labelled samples to 6"):
        WAD().check_data(data)
    WAD(promotions=0).check_data(data)


def test_one_view_is_not_enough_for_an_encoder():
    with pytest.raises(UsageError, match="two views"):
        execute(WAD(), Roles(student=student()), small(), **SETTINGS)


def test_a_teacher_of_maps_is_refused():
    maps = nn.Unflatten(1, (2, 2))
    with pytest.raises(UsageError, match="no vector"):
        WAD().check(Roles(teacher=maps, student=student()), Batch(x=X, y=Y))
