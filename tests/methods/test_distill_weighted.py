"""DistillWeighted and DistillNearest: weights, the loss and its special cases, whole runs, and what they refuse."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.evaluate.similarity import leep, parc
from limbeck.methods.distill_nearest.method import DistillNearest
from limbeck.methods.distill_weighted.method import DistillWeighted
from limbeck.methods.other_tasks import score, source_heads
from limbeck.nn.mlp import mlp
from limbeck.prove import accuracy, seeded
from limbeck.teachers import Cached, collect


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, U = draw(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), draw(6, 4, seed=1)
BATCH = Batch(x=X, y=Y, unlabelled={"x": U, "id": torch.arange(6), "view": torch.zeros(6)})
SIZES = (5, 7, 2)


def roles(weights=(0.5, 0.3, 0.2)):
    sources = {f"teacher_{i}": seeded(i, lambda c=c: mlp(4, 8, c)) for i, c in enumerate(SIZES)}
    m = Roles(**sources, student=seeded(9, lambda: mlp(4, 8, 3)))
    m.freeze(*sources)
    m.heads = source_heads(m, dict(zip(sources, weights, strict=True)))
    return m


def run_step(method, m, batch=BATCH):
    """Both updates, with the gradients that they leave in their roles."""
    found = []
    for update in method.step(m, batch):
        update.backward(m)
        found.append(update)
    return found, {name: [p.grad for p in m[name].parameters()] for name in ("student", "heads")}


# Weights


def test_weights_are_powers_of_positive_similarities():
    e = [0.3, -0.1, 0.2, 0.0]
    assert DistillWeighted(power=1.0).weigh(e) == pytest.approx([0.6, 0, 0.4, 0])
    assert DistillWeighted(power=0.0).weigh(e) == [0.5, 0, 0.5, 0]  # what is not related stays out
    steep = DistillWeighted(power=50.0).weigh(e)
    assert 1 - steep[0] == pytest.approx((2 / 3) ** 50, rel=1e-6)
    assert sum(steep) == pytest.approx(1)
    assert DistillWeighted(power=float("inf")).weigh(e) == DistillNearest().weigh(e) == [1, 0, 0, 0]
    assert DistillWeighted(power=1000.0).weigh([3e2, 1e2]) == [1, 0]  # no overflow


def test_where_nothing_is_related_the_best_is_used_and_it_is_said():
    with pytest.warns(UserWarning, match="no source is related"):
        assert DistillWeighted().weigh([-0.3, -0.1]) == [0, 1]
    assert DistillNearest().weigh([-0.3, -0.1]) == [0, 1]


# The loss


def test_the_loss_is_the_weighted_sum():
    m = roles()
    first, second = DistillWeighted(label_weight=0.6).step(m, BATCH)
    body, head = m.student.module[:2], m.student.module[2]
    soft = 0
    for (name, weight), own in zip(m.heads.weights.items(), m.heads(body(U)).split(SIZES, 1), strict=True):
        soft = soft - weight * (m[name](U).softmax(-1) * own.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(first.loss, 0.6 * F.cross_entropy(head(body(X)), Y) + 0.4 * soft)
    torch.testing.assert_close(second.loss, 0.4 * soft)


def test_without_unlabelled_samples_the_labelled_ones_are_imitated():
    m = roles()
    first, _ = DistillWeighted().step(m, Batch(x=X, y=Y))
    twice, _ = DistillWeighted().step(m, Batch(x=X, y=Y, unlabelled={"x": X, "id": torch.arange(6), "view": 0}))
    torch.testing.assert_close(first.loss, twice.loss)


def test_one_weight_is_the_nearest_and_other_sources_are_not_run():
    one = roles((0.0, 1.0, 0.0))
    called = []
    for name in ("teacher_0", "teacher_2"):
        one[name].module.register_forward_hook(lambda *_: called.append(1))
    (update, _), gradients = run_step(DistillWeighted(), one)
    (nearest, _), expected = run_step(DistillNearest(), roles((0.0, 1.0, 0.0)))
    assert torch.equal(update.loss, nearest.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients["student"], expected["student"], strict=True))
    assert one.heads(torch.ones(2, 8)).shape == (2, 7)
    assert not called


def test_labels_alone_leave_the_heads_where_they_are():
    m = roles()
    (update, _), gradients = run_step(DistillWeighted(label_weight=1.0), m)
    torch.testing.assert_close(update.loss, F.cross_entropy(m.student(X), Y))
    assert all(not g.any() for g in gradients["heads"])


def test_a_head_learns_the_difference_of_probabilities():
    m = roles()
    _, gradients = run_step(DistillWeighted(label_weight=0.6), m)
    feature = m.student.module[:2](U)
    expected = [
        0.4 * weight * (own.softmax(-1) - m[name](U).softmax(-1)).sum(0) / len(U)
        for (name, weight), own in zip(m.heads.weights.items(), m.heads(feature).split(SIZES, 1), strict=True)
    ]
    torch.testing.assert_close(gradients["heads"][1], torch.cat(expected))  # of the bias
    own = [p.grad for p in m.student.module[2].parameters()]
    loss = 0.6 * F.cross_entropy(m.student(X), Y)
    expected = torch.autograd.grad(loss, list(m.student.module[2].parameters()))
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b)  # the student's own classifier hears of labels alone


def test_normalised_losses_are_divided_by_the_logarithm_of_the_classes():
    m = roles((0.0, 1.0, 0.0))
    plain, normal = (
        next(iter(DistillWeighted(label_weight=0, normalise=n).step(m, BATCH))).loss for n in (False, True)
    )
    torch.testing.assert_close(normal, plain / torch.tensor(7.0).log())


def test_the_heads_update_does_not_reach_the_student():
    m = roles()
    _, second = DistillWeighted().step(m, BATCH)
    found = torch.autograd.grad(second.loss, [*m.student.parameters(), *m.heads.parameters()], allow_unused=True)
    assert [g is None for g in found] == [True] * 4 + [False] * 2


def test_sources_get_no_gradient():
    m = roles()
    for name in m.teachers:
        m[name].unfreeze()
    for update in DistillWeighted().step(m, BATCH):
        update.loss.backward(retain_graph=True)
    assert all(p.grad is None for role in m.teachers.values() for p in role.parameters())


# Similarities


def source(count=60):
    y = torch.arange(count) % 3
    return TensorSource(3 * torch.eye(4)[y] + 0.3 * draw(count, 4, seed=2), y)


def test_the_similarity_is_that_of_features_or_of_answers():
    data, m = source(), roles()
    x, rows = data.x, torch.arange(60)
    features = m.teacher_0.module[:2](x).detach()
    assert score(m.teacher_0, data, rows, "parc") == pytest.approx(parc(features, data.labels).item())
    answers = m.teacher_0(x).detach().softmax(-1)
    assert score(m.teacher_0, data, rows, "leep") == pytest.approx(leep(answers, data.labels).exp().item())


def test_stored_sources_are_compared_by_their_stored_layer(tmp_path):
    data, m = source(), roles()
    rows = torch.arange(60)
    layers = DistillWeighted().stores(m.teacher_0, data.batch(rows[:2], 0))
    whole = collect(m.teacher_0, data, tmp_path / "a", layers=layers, dtype="fp32")
    alone = collect(m.teacher_0, data, tmp_path / "b", dtype="fp32")
    kept = Roles(teacher_0=Cached(whole), teacher_1=Cached(alone))
    assert score(kept.teacher_0, data, rows, "parc") == pytest.approx(score(m.teacher_0, data, rows, "parc"), rel=1e-4)
    outputs = parc(m.teacher_0(data.x).detach(), data.labels)
    assert score(kept.teacher_1, data, rows, "parc") == pytest.approx(outputs.item(), rel=1e-4)


# Whole runs


def splits():
    whole = source(300)
    return Data(
        train=whole.subset(range(12)), unlabelled=TensorSource(whole.x[12:150]), test=whole.subset(range(150, 300))
    )


def related():
    """A source that looks at noise alone, and one that tells two of the classes from the third."""
    blind = seeded(5, lambda: mlp(4, 8, 6))
    blind[0].weight.data[:, :3] = 0
    model = seeded(4, lambda: mlp(4, 8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    data = source(200)
    for _ in range(100):
        F.cross_entropy(model(data.x), (data.labels == 2).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [blind, model]


@pytest.mark.parametrize("kind", [DistillWeighted, DistillNearest])
def test_a_run_measures_and_trains_and_leaves_the_sources_alone(tmp_path, kind):
    sources = related()
    before = [p.clone() for s in sources for p in s.parameters()]
    m = Roles(teacher_0=sources[0], teacher_1=sources[1], student=seeded(9, lambda: mlp(4, 8, 3)))
    engine = Engine(epochs=30, batch_size=16, device="cpu", evaluate_every=0)
    optim = {"student": Optim(lr=0.02), "heads": Optim(lr=0.02)}
    execute(kind(label_weight=0.5), m, splits(), engine, optim=optim, out=tmp_path)
    told = json.loads(next(tmp_path.rglob("similarity.json")).read_text())
    assert told["scores"]["teacher_1"] > told["scores"]["teacher_0"]
    assert told["weights"]["teacher_1"] > 0.5
    assert all(torch.equal(a, p) for a, p in zip(before, (p for s in sources for p in s.parameters()), strict=True))
    assert m.student(X).shape == (6, 3)
    assert accuracy(m, splits().test) > 80


def test_by_name_with_a_list_of_teachers_and_with_their_stored_answers(tmp_path):
    engine = {"epochs": 2, "batch_size": 16}
    results = [
        limbeck.distill(
            related(), seeded(9, lambda: mlp(4, 8, 3)), splits(), "distill_nearest",
            out=tmp_path / name, engine=engine, progress="off", cache=cache,
        )
        for name, cache in (("live", None), ("stored", str(tmp_path / "store")))
    ]  # fmt: skip
    live, stored = (torch.cat([p.flatten() for p in r.roles.student.parameters()]) for r in results)
    torch.testing.assert_close(live, stored, atol=5e-3, rtol=5e-2)  # stored in half precision


# What they refuse


@pytest.mark.parametrize(
    "fields",
    [{"power": -1.0}, {"label_weight": 2.0}, {"similarity": "cosine"}, {"probe": 2}, {"weights": (0.0, 0.0)}],
)
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError) as error:
        DistillWeighted(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


def test_models_and_data_that_do_not_fit():
    m = roles()
    with pytest.raises(UsageError, match="more sources than weights"):
        DistillWeighted(weights=(0.5, 0.5)).check(m, BATCH)
    with pytest.raises(UsageError, match="fewer sources than weights"):
        DistillWeighted(weights=(0.5, 0.5, 1.0, 1.0)).check(m, BATCH)
    with pytest.raises(UsageError, match="other tasks to learn from"):
        DistillNearest().check(Roles(student=mlp(4, 3)), BATCH)
    with pytest.raises(UsageError, match="needs some labels"):
        DistillWeighted().check(m, Batch(x=X))
    with pytest.raises(UsageError, match="no classifier"):
        DistillWeighted().check(
            Roles(teacher_0=nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4))), student=mlp(4, 3)), BATCH
        )
    with pytest.raises(UsageError):
        DistillWeighted().check_data(Data(train=TensorSource(X, torch.zeros(6, dtype=torch.int64))))
