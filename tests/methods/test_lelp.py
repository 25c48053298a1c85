"""LELP: targets in closed form, what they do not depend on, whole runs with and without stored outputs, what it refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.api import run
from limbeck.core.errors import UsageError
from limbeck.core.recipe import Recipe
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.finished import export
from limbeck.job import assemble
from limbeck.losses import kl, soft_cross_entropy
from limbeck.methods.lelp.method import LELP, subclass_targets
from limbeck.models.load import num_classes
from limbeck.nn.mlp import mlp
from limbeck.nn.subspace import row_space
from limbeck.prove import seeded
from limbeck.teachers import Cached, Ensemble, collect

CLASSES, SIZE, S = 3, 16, 4


def generator(seed):
    return torch.Generator().manual_seed(seed)


def teacher(seed=0):
    return seeded(seed, lambda: mlp(6, SIZE, CLASSES)).double()


def student(seed=1):
    return seeded(seed, lambda: mlp(6, 5, CLASSES)).double()


X = 2 * torch.randn(120, 6, generator=generator(0), dtype=torch.float64)
Y = torch.arange(120) % CLASSES
SOURCE = TensorSource(X, Y)
BATCH = SOURCE.batch(torch.arange(10), 0)


def prepared(method=None, **modules):
    method = method or LELP(subclasses=S)
    m = Roles(**{"teacher": teacher(), "student": student(), **modules})
    m.freeze("teacher")
    method.prepare(m, SOURCE)
    m.subspaces.module.double()
    return m


def loss_of(method, m, batch=BATCH):
    (update,) = method.step(m, batch)
    assert update.role == "student"
    return update.loss


def embed(model, x=X):
    return model[:-1](x)


# Targets

LOGITS = torch.randn(7, CLASSES, generator=generator(1), dtype=torch.float64)
EMBEDDING = torch.randn(7, SIZE, generator=generator(2), dtype=torch.float64)
WEIGHT = torch.randn(CLASSES * S, SIZE, generator=generator(3), dtype=torch.float64)
BIAS = torch.randn(CLASSES * S, generator=generator(4), dtype=torch.float64)


@pytest.mark.parametrize(("tau", "beta"), [(1.0, 1.0), (4.0, 0.3), (0.5, 10.0)])
def test_the_subclasses_of_a_class_share_its_probability(tau, beta):
    target = subclass_targets(LOGITS, EMBEDDING, WEIGHT, BIAS, temperature=tau, subclass_temperature=beta)
    p = target.exp()
    torch.testing.assert_close(p.sum(1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(p.unflatten(1, (CLASSES, S)).sum(2), (LOGITS / tau).softmax(1))
    z = (EMBEDDING @ WEIGHT.T + BIAS).unflatten(1, (CLASSES, S))
    expected = (LOGITS / tau).softmax(1)[:, :, None] * (z / beta).softmax(2)  # those of the wrong classes too
    torch.testing.assert_close(p, expected.flatten(1))


def test_the_entropy_is_that_of_classes_and_the_mean_of_those_within():
    def entropy(p):
        return -(p * p.log()).sum(-1)

    p = subclass_targets(LOGITS, EMBEDDING, WEIGHT, BIAS, subclass_temperature=0.7).exp()
    z = (EMBEDDING @ WEIGHT.T + BIAS).unflatten(1, (CLASSES, S))
    classes = LOGITS.softmax(1)
    torch.testing.assert_close(entropy(p), entropy(classes) + (classes * entropy((z / 0.7).softmax(2))).sum(1))


def test_subspaces_are_those_of_each_class_outside_of_the_readout():
    method = LELP(subclasses=S, standardise=False)
    m = prepared(method)
    model, map_ = m.teacher.module, m.subspaces.module
    q = row_space(model[-1].weight.detach())
    for c, rows in enumerate(map_.weight.unflatten(0, (CLASSES, S))):
        h = embed(model)[c == Y]
        h = h - h @ q @ q.T
        _, _, directions = torch.linalg.svd(h - h.mean(0))
        span = directions[:S].T @ directions[:S]
        torch.testing.assert_close(rows.T @ rows, span, atol=1e-5, rtol=0)
        torch.testing.assert_close(rows @ model[-1].weight.T, torch.zeros(S, CLASSES).double(), atol=1e-5, rtol=0)
        z = map_(embed(model)[c == Y]).unflatten(1, (CLASSES, S))[:, c]
        torch.testing.assert_close(z.mean(0), torch.zeros(S).double(), atol=1e-5, rtol=0)


def test_standardised_coordinates_have_a_mean_variance_of_one():
    m = prepared()
    z = m.subspaces.module(embed(m.teacher.module)).unflatten(1, (CLASSES, S))
    for c in range(CLASSES):
        assert z[c == Y, c].var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-4)


def test_the_scale_of_the_embedding_does_not_matter_where_standardised():
    scaled = teacher()
    with torch.no_grad():
        for p in scaled[0].parameters():
            p *= 7.0
        scaled[-1].weight /= 7.0
    m, other = prepared(), prepared(teacher=scaled)
    torch.testing.assert_close(loss_of(LELP(subclasses=S), other), loss_of(LELP(subclasses=S), m), rtol=1e-5, atol=0)


class Shifted(nn.Module):
    """A classifier of embeddings that were moved within what its last layer sees, or turned, as the layer was."""

    def __init__(self, model, turn=None, shift=None):
        super().__init__()
        self.body, self.turn, self.shift = model[:-1], turn, shift
        self.head = copy.deepcopy(model[-1])
        if turn is not None:
            self.head.weight.data @= turn.T

    def forward(self, x):
        h = self.body(x)
        if self.shift is not None:
            h = h + torch.tanh(x.sum(1, keepdim=True)) * self.shift
        return self.head(h if self.turn is None else h @ self.turn.T)


def coordinates_of(model, method):
    m = Roles(teacher=model, student=student())
    found = method.fit(m, SOURCE)
    return found, lambda h: F.linear(h, found["weight"].double(), found["bias"].double())


def test_what_the_last_layer_sees_does_not_change_the_subspaces():
    method, model = LELP(subclasses=S), teacher()
    shift = 3 * model[-1].weight.detach()[0]
    one, z = coordinates_of(model, method)
    other, _ = coordinates_of(Shifted(model, shift=shift), method)
    torch.testing.assert_close(other["weight"], one["weight"], atol=1e-4, rtol=0)
    torch.testing.assert_close(z(embed(model)), z(embed(model) + shift), atol=1e-4, rtol=0)


def test_another_basis_of_the_embedding_does_not_change_the_span():
    turn, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator(5), dtype=torch.float64))
    method, model = LELP(subclasses=S), teacher()
    one, other = (coordinates_of(t, method)[0] for t in (model, Shifted(model, turn=turn)))
    for a, b in zip(*(f["weight"].unflatten(0, (CLASSES, S)).double() for f in (one, other)), strict=True):
        torch.testing.assert_close(b.T @ b, turn @ a.T @ a @ turn.T, atol=1e-5, rtol=1e-4)
    for name in ("deviation", "share"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=0)


def test_the_same_seed_gives_the_same_bits_and_another_another_rotation():
    found = []
    for seed in (0, 0, 1):
        m = Roles(teacher=teacher(), student=student())
        m.seed = seed
        found.append(LELP(subclasses=S).fit(m, SOURCE)["weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_without_labels_the_teachers_answers_are_the_classes():
    model = teacher()
    with torch.no_grad():
        model[-1].bias -= model(X).mean(0)  # so that it answers with each class
    answers, m = model(X).argmax(1), Roles(teacher=model)
    m.rng("rotation").manual_seed(0)
    one = LELP(subclasses=2).fit(m, TensorSource(X, answers))
    m.rng("rotation").manual_seed(0)
    other = LELP(subclasses=2).fit(m, TensorSource(X))
    assert torch.equal(one["weight"], other["weight"])


# The loss


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_one_subclass_is_distillation(tau):
    method = LELP(subclasses=1, temperature=tau)
    m = prepared(method)
    plain = kl(student()(BATCH.x), m.teacher(BATCH), temperature=tau)
    loss = loss_of(method, m)
    torch.testing.assert_close(loss, plain)
    model = student()
    expected = torch.autograd.grad(kl(model(BATCH.x), m.teacher(BATCH), temperature=tau), list(model.parameters()))
    for found, gradient in zip(torch.autograd.grad(loss, list(m.student.parameters())), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_the_loss_is_the_papers_cross_entropy_without_the_entropy_of_the_target():
    method = LELP(subclasses=S, temperature=2.0, subclass_temperature=0.4)
    m = prepared(method)
    nn.init.normal_(m.student.module[-1].subclasses.weight)
    map_, h = m.subspaces.module, embed(m.teacher.module, BATCH.x)
    p = subclass_targets(m.teacher(BATCH), h, map_.weight, map_.bias, temperature=2.0, subclass_temperature=0.4).exp()
    o = m.student.module[-1].subclasses(m.student.module[:-1](BATCH.x))
    cross = -(p * (o / 2).log_softmax(1)).sum(1).mean()
    entropy = -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(loss_of(method, m), 4 * (cross - entropy))


def test_flat_targets_and_tied_subclasses_are_distillation_and_log_s():
    method = LELP(subclasses=S, subclass_temperature=1e9)
    m = prepared(method)  # a student that was just converted has equal subclasses
    map_, h = m.subspaces.module, embed(m.teacher.module, BATCH.x)
    target = subclass_targets(m.teacher(BATCH), h, map_.weight, map_.bias, subclass_temperature=1e9)
    o = m.student.module[-1].subclasses(m.student.module[:-1](BATCH.x))
    plain = soft_cross_entropy(student()(BATCH.x), m.teacher(BATCH).softmax(1))
    torch.testing.assert_close(soft_cross_entropy(o, target.exp()), plain + math.log(S))
    torch.testing.assert_close(loss_of(method, m), kl(student()(BATCH.x), m.teacher(BATCH)))


def test_labels_have_their_share():
    soft, mixed = LELP(subclasses=S), LELP(subclasses=S, label_weight=0.25)
    m = prepared(soft)
    hard = F.cross_entropy(m.student(BATCH), BATCH.y)
    torch.testing.assert_close(loss_of(mixed, m), 0.75 * loss_of(soft, m) + 0.25 * hard)
    unlabelled = Batch(x=BATCH.x)
    torch.testing.assert_close(loss_of(mixed, m, unlabelled), loss_of(soft, m))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_largest_sum_of_probabilities_is_the_answer(tau):
    m = prepared(LELP(subclasses=S, temperature=tau))
    nn.init.normal_(m.student.module[-1].subclasses.weight)
    o = m.student.module[-1].subclasses(m.student.module[:-1](X))
    summed = (o / tau).softmax(1).unflatten(1, (CLASSES, S)).sum(2)
    torch.testing.assert_close((m.student(X) / tau).softmax(1), summed)
    assert torch.equal(m.student(X).argmax(1), summed.argmax(1))


# Whole runs


def world(count=400, seed=0):
    """Two classes of four clusters each."""
    g = generator(seed)
    k = torch.arange(count) % 8
    x = 2 * torch.randn(8, 6, generator=generator(9))[k] + 0.5 * torch.randn(count, 6, generator=g)
    return TensorSource(x, k % 2)


def test_a_run_detaches_the_teacher_and_ends_in_a_classifier(tmp_path):
    big, small = (seeded(i, lambda w=w: mlp(6, w, 2)) for i, w in enumerate((24, 8)))
    before = copy.deepcopy(big.state_dict())
    result = limbeck.distill(
        big, small, Data(train=world(), test=world(seed=1)), "lelp", subclasses=3, out=tmp_path, progress="off",
        optim={"student": {"lr": 0.01}}, engine={"epochs": 4, "batch_size": 32},
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in big.state_dict().items())
    assert all(p.grad is None for p in (*big.parameters(), *result.roles.subspaces.parameters()))
    trained = result.roles.student.module.eval()
    loaded = limbeck.load(tmp_path, seeded(5, lambda: mlp(6, 8, 2)))
    x = world().x
    assert torch.equal(loaded(x), trained(x))
    assert (loaded(x).shape[1], num_classes(loaded), trained[-1].subclasses.out_features) == (2, 2, 6)
    losses = [row["train/loss/student"] for row in result.history if "train/loss/student" in row]
    assert losses[-1] < losses[0]


def test_the_student_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    limbeck.distill(
        mlp(6, 24, 2), mlp(6, 8, 2), Data(train=world(), test=world(seed=1)), "lelp", out=tmp_path, progress="off",
        engine={"epochs": 1},
    )  # fmt: skip
    assert export(tmp_path, module=mlp(6, 8, 2)).onnx.max_abs_error < 1e-5


def test_stored_outputs_stand_in_for_the_teacher(tmp_path):
    ends = []
    for cache in (None, str(tmp_path / "cache")):
        big, small = (seeded(i, lambda w=w: mlp(6, w, 2)) for i, w in enumerate((24, 8)))
        out = tmp_path / ("stored" if cache else "live")
        tree = {
            "teacher": "t",
            "student": "s",
            "data": "d",
            "method": {"name": "lelp", "subclasses": 3},
            "cache": cache,
        }
        tree |= {"out": str(out), "engine": {"epochs": 2, "batch_size": 32}, "optim": {"student": {"lr": 0.01}}}
        data = Data(train=world(), test=world(seed=1))
        recipe = Recipe.parse({k: v for k, v in tree.items() if v is not None})
        result = run(assemble(recipe, {"teacher": big}, small, data, {}, None), progress="off")
        assert isinstance(result.roles.teacher.module, Cached) == (cache is not None)
        ends.append(result.roles.student.module.eval()(world().x))
    torch.testing.assert_close(*ends, atol=0.02, rtol=0.02)


def test_subspaces_from_stored_outputs_are_those_of_the_teacher(tmp_path):
    model, source = teacher().float(), TensorSource(X.float(), Y)
    method = LELP(subclasses=2)
    batch = source.batch(torch.arange(2), 0)
    m = Roles(teacher=model)
    store = collect(model, source, tmp_path / "store", layers=method.stores(m.teacher, batch))
    one, other = (method.fit(Roles(teacher=t), source) for t in (model, Cached(store)))
    for a, b in zip(*(f["weight"].unflatten(0, (CLASSES, 2)).double() for f in (one, other)), strict=True):
        torch.testing.assert_close(a.T @ a, b.T @ b, atol=0.01, rtol=0)


class Hidden(nn.Module):
    """What its head reads is no layer's output."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 24), nn.Linear(24, 2)

    def forward(self, x):
        return self.head(self.body(x) + 1)


def test_an_embedding_that_no_layer_gives_is_not_stored(tmp_path):
    tree = {"teacher": "t", "student": "s", "data": "d", "method": {"name": "lelp"}, "cache": str(tmp_path / "cache")}
    recipe = Recipe.parse({**tree, "out": str(tmp_path / "run")})
    job = assemble(recipe, {"teacher": Hidden()}, mlp(6, 8, 2), Data(train=world()), {}, None)
    with pytest.raises(UsageError, match="embedding cannot be stored") as error:
        run(job, progress="off")
    assert "without stored outputs" in error.value.fix
    assert not list(tmp_path.iterdir())


def test_a_store_without_the_embedding_is_refused(tmp_path):
    source = TensorSource(X, Y)
    m = Roles(teacher=Cached(collect(teacher(), source, tmp_path / "store")), student=student())
    with pytest.raises(UsageError, match="not known from stored outputs"):
        LELP(subclasses=2).fit(m, source)


def test_the_engine_does_what_a_loop_of_ones_own_does():
    method = LELP(subclasses=S)
    m = prepared(method)
    optimizer = torch.optim.SGD(m.student.parameters(), lr=0.1)
    for update in method.step(m, SOURCE.batch(torch.arange(120), 0)):
        update.backward(m)
        optimizer.step()
    roles = Roles(teacher=teacher(), student=student())
    engine = Engine(steps=1, batch_size=120, device="cpu", evaluate_every=0)
    execute(method, roles, Data(train=SOURCE), engine, optim={"student": Optim("sgd", lr=0.1)})
    for name, value in m.student.module.state_dict().items():
        torch.testing.assert_close(roles.student.module.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_a_transformer_teaches_a_transformer():
    transformers = pytest.importorskip("transformers")

    def bert(width):
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        return transformers.BertForSequenceClassification(config)

    m = Roles(teacher=seeded(0, lambda: bert(16)), student=seeded(1, lambda: bert(8)))
    tokens = {"input_ids": torch.randint(20, (40, 6), generator=generator(6))}
    source = Batch(x=tokens, y=torch.arange(40) % 2)
    method = LELP(subclasses=3)
    method.check(m, source)
    m.freeze("teacher")
    method.prepare(m, Whole(source))
    (update,) = method.step(m, source)
    update.backward(m)
    assert m.student.classifier.subclasses.weight.grad.abs().sum() > 0


class Whole:
    """One batch as a source."""

    def __init__(self, batch):
        self.whole = batch

    def __len__(self):
        return len(self.whole)

    def batch(self, rows, view):
        return self.whole[int(rows[0]) : int(rows[-1]) + 1]


# What it refuses


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.0}, {"subclass_temperature": -1.0}, {"subclasses": 0}, {"label_weight": 1.5}],
)
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError) as error:
        LELP(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


def test_an_embedding_too_small_for_so_many_subclasses():
    m = Roles(teacher=teacher(), student=student())
    LELP(subclasses=SIZE - CLASSES).check(m, BATCH)
    with pytest.raises(UsageError, match="too small") as error:
        LELP(subclasses=SIZE - CLASSES + 1).check(m, BATCH)
    assert error.value.expected == f"at most {SIZE - CLASSES} outside of what it sees"
    LELP(subclasses=SIZE, null_space=False).check(m, BATCH)
    with pytest.raises(UsageError, match="too small"):
        LELP(subclasses=SIZE + 1, null_space=False).check(m, BATCH)


def test_too_many_classes_for_their_covariances():
    with torch.device("meta"):
        m = Roles(teacher=nn.Linear(4096, 1000), student=nn.Linear(4096, 1000))
        batch = Batch(x=torch.empty(2, 4096))
    with pytest.raises(UsageError, match="too many classes") as error:
        LELP().check(m, batch)
    assert "125 GiB" in error.value.found


def test_too_few_samples_of_a_class_are_found_before_any_work():
    rows = torch.cat([torch.arange(100), torch.tensor([119])])
    with pytest.raises(UsageError, match="subclasses is out of range") as error:
        LELP(subclasses=40).check_data(Data(train=SOURCE.subset(rows)))
    assert error.value.expected == "below 33, the samples of a class"


def test_a_class_that_the_data_lack():
    with pytest.raises(UsageError, match="too few samples") as error:
        LELP(subclasses=2).fit(Roles(teacher=teacher()), TensorSource(X, Y % 2))
    assert error.value.where == "class 2"


def test_an_ensemble_has_no_embedding():
    with pytest.raises(UsageError, match="no embedding of its own"):
        LELP(subclasses=2).check(Roles(teacher=Ensemble([teacher(), teacher(1)]), student=student()), BATCH)


def test_a_student_of_an_earlier_run_goes_on_with_as_many_subclasses():
    m = prepared()
    LELP(subclasses=S).check(m, BATCH)
    before = m.student(X)
    LELP(subclasses=S).prepare(m, SOURCE)
    assert torch.equal(m.student(X), before)
    with pytest.raises(UsageError, match="another number of subclasses"):
        LELP(subclasses=S + 1).check(m, BATCH)


def test_a_student_that_does_not_end_in_a_linear_layer():
    headless = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(CLASSES))
    with pytest.raises(UsageError, match="no linear layer"):
        LELP(subclasses=2).check(Roles(teacher=teacher(), student=headless), BATCH)
