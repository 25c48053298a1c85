"""Weight aligning: the loss in closed form, the clipped head, whole runs with their memory, the variants, what it refuses."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.heads import AlignHead, alignment
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.incremental import Increments, class_order, herd
from limbeck.engine.run import execute
from limbeck.methods.wa.method import WA
from limbeck.nn.heads import head_of
from limbeck.nn.mlp import mlp
from limbeck.prove import seeded


class Given(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, x):
        return self.logits.clone()


OLD = [[1.0, -0.5], [0.3, 2.0], [0.0, 0.4]]
STUDENT = [[0.2, 0.1, -1.0, 0.7], [1.5, -0.3, 0.4, 0.0], [0.6, -2.0, 1.1, 0.9]]
Y = torch.tensor([0, 3, 2])


def update_of(method, student=STUDENT, old=OLD, increment=1):
    m = Roles(student=Given(student), **({} if old is None else {"old": Given(old)}))
    (update,) = method.step(m, Batch(x=torch.zeros(3, 1), y=Y), increment)
    update.loss.backward()
    assert update.role == "student"
    assert old is None or m.old.logits.grad is None
    return update, m.student.logits.grad


def test_the_loss_is_the_share_of_each_part():
    update, _ = update_of(WA())
    student, old = (torch.tensor(v, dtype=torch.float64) for v in (STUDENT, OLD))
    soft = -((old / 2).softmax(1) * (student[:, :2] / 2).log_softmax(1)).sum(1).mean()  # no factor of tau squared
    torch.testing.assert_close(update.loss.detach(), 0.5 * F.cross_entropy(student, Y) + 0.5 * soft)
    assert update.logs["label_weight"].item() == 0.5


@pytest.mark.parametrize(("method", "old"), [(WA(), None), (WA(label_weight=1.0), OLD)])
def test_without_old_classes_or_with_the_labels_alone_it_is_cross_entropy(method, old):
    update, gradient = update_of(method, old=old)
    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(student, Y)
    expected.backward()
    assert torch.equal(update.loss, expected)
    assert torch.equal(gradient, student.grad)


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
def test_the_gradient_of_the_distillation_in_closed_form(tau):
    _, gradient = update_of(WA(label_weight=0.0, temperature=tau))
    student, old = (torch.tensor(v, dtype=torch.float64) for v in (STUDENT, OLD))
    q, p = (student[:, :2] / tau).softmax(1), (old / tau).softmax(1)
    torch.testing.assert_close(gradient[:, :2], (q - p) / (tau * 3))
    assert torch.equal(gradient[:, 2:], torch.zeros(3, 2, dtype=torch.float64))


def test_a_student_that_agrees_has_the_entropy_of_the_old_one_and_no_gradient():
    agreeing = [[*row, 7.0, -3.0] for row in OLD]
    update, gradient = update_of(WA(label_weight=0.0), student=agreeing)
    p = (torch.tensor(OLD, dtype=torch.float64) / 2).softmax(1)
    torch.testing.assert_close(update.loss.detach(), -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("fields", "increment", "expected"),
    [({}, 3, 0.5), ({"share": "increments"}, 3, 0.25), ({"label_weight": 0.9}, 3, 0.9), ({"variant": "code"}, 1, 0.5)],
)
def test_the_share_of_the_labels(fields, increment, expected):
    assert update_of(WA(**fields), increment=increment)[0].logs["label_weight"].item() == pytest.approx(expected)


def test_the_penalty_fades_with_the_increments():
    for increment in (0, 3):
        plain, decayed = (update_of(WA(decay=decay), increment=increment)[0].loss for decay in (0.0, 0.1))
        squares = torch.tensor(STUDENT, dtype=torch.float64).square().sum()
        torch.testing.assert_close(decayed - plain, 0.1 / 2 / (increment + 1) * squares)


@pytest.mark.parametrize("clip", [True, False])
def test_the_head_alone_is_clipped(clip):
    m = Roles(student=seeded(0, lambda: mlp(3, 6, 4)))
    before = copy.deepcopy(m.student.module.state_dict())
    WA(clip=clip).after_update(m, "student")
    after = m.student.module.state_dict()
    assert torch.equal(after.pop("2.weight"), before.pop("2.weight").clamp(min=0) if clip else before["2.weight"])
    assert all(torch.equal(after[name], before[name]) for name in after)


# Whole runs

CLASSES, SIZES = 6, (2, 1, 3)
SGD = {"student": Optim("sgd", lr=0.05, momentum=0.9)}


def source(each, seed):
    g = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(3))
    y = torch.arange(CLASSES).repeat_interleave(each)
    return TensorSource(centres[y] + 0.5 * torch.randn(len(y), 8, generator=g), y)


DATA = Data(train=source(20, 0), validation=source(10, 1))


def student(classes=CLASSES):
    return seeded(0, lambda: mlp(8, 24, classes))


class Watched(WA):
    """Notes the modules after each stage, and the smallest weight of the head after each step."""

    seen: list
    lowest: list

    def after_stage(self, m, stage):
        self.seen.append((stage.name, {name: copy.deepcopy(role.module) for name, role in m.items()}))

    def after_update(self, m, role):
        super().after_update(m, role)
        self.lowest.append(head_of(m.student.module).weight.min().item())


def run(epochs=6, data=DATA, **fields):
    method = Watched(**{"increments": SIZES, "memory": 16, **fields})
    object.__setattr__(method, "seen", [])
    object.__setattr__(method, "lowest", [])
    engine = Engine(epochs=epochs, batch_size=10, device="cpu", evaluate_every=0)
    result = execute(method, Roles(student=student()), data, engine, optim=SGD)
    return result, dict(method.seen), method.lowest


def memories(result):
    return [artefact.value for artefact in result.results if hasattr(artefact, "value")]


def test_an_incremental_run():
    result, seen, lowest = run()
    assert list(seen) == [
        *("grow_0", "increment_0", "memory_0"),
        *("old_1", "grow_1", "increment_1", "align_1", "memory_1"),
        *("old_2", "grow_2", "increment_2", "align_2", "memory_2", "order"),
    ]
    assert [head_of(seen[f"grow_{t}"]["student"]).out_features for t in range(3)] == [2, 3, 6]
    assert min(lowest) == 0  # never below
    numbers = [r for r in result.results if isinstance(r, dict) and "top1" in r]
    assert [set(n) for n in numbers] == [{"top1", "newest", "average"}] * 3
    assert result.metrics == numbers[-1]
    assert result.metrics["average"] == pytest.approx(sum(n["top1"] for n in numbers) / 3)
    # The student that comes out predicts the data's own classes, as well as the last evaluation said.
    right = result.roles.student(DATA.validation.x).argmax(1) == DATA.validation.labels
    assert right.float().mean().item() == pytest.approx(result.metrics["top1"])
    assert right.float().mean() > 0.7


def test_the_old_model_is_the_aligned_student_of_before_and_does_not_learn():
    _, seen, _ = run()
    x = DATA.validation.x
    for t in (1, 2):
        before = seen["increment_0" if t == 1 else "align_1"]["student"]
        old = seen[f"increment_{t}"]["old"]
        assert torch.equal(old(x), before(x))
        assert not old.training
        assert torch.equal(seen[f"grow_{t}"]["student"](x)[:, : head_of(old).out_features].argmax(1), old(x).argmax(1))


def test_alignment_changes_nothing_but_the_length_of_new_rows():
    _, seen, _ = run()
    for t, old in ((1, 2), (2, 3)):
        before, after = seen[f"increment_{t}"]["student"], seen[f"align_{t}"]["student"]
        assert torch.equal(before[0].weight, after[0].weight)
        assert torch.equal(head_of(before).weight[:old], head_of(after).weight[:old])
        assert alignment(head_of(after).weight, old).item() == pytest.approx(1, abs=1e-6)
        gamma = alignment(head_of(before).weight, old)
        torch.testing.assert_close(head_of(before).weight[old:] * gamma, head_of(after).weight[old:])


def test_the_memory_stays_within_its_size_and_shrinks_to_prefixes():
    result, seen, _ = run()
    arriving = Increments.of(DATA, SIZES, 1993)
    former = []
    for t, memory in enumerate(memories(result)):
        classes = arriving.seen(t)
        assert [len(ids) for ids in memory] == [16 // classes] * classes
        assert sum(map(len, memory)) <= 16
        for short, long in zip(memory, former, strict=False):
            assert torch.equal(short, long[: len(short)])
        for place in range(len(former), classes):
            mine = arriving.of_class(place)
            features = seen[f"memory_{t}"]["student"][:2](mine.batch(torch.arange(len(mine)), 0).x)
            assert torch.equal(memory[place], mine.ids[herd(features, 16 // classes)])
        former = memory


def test_classes_smaller_than_their_share_of_the_memory_are_remembered_whole():
    result, *_ = run(memory=10_000, epochs=1)
    for memory in memories(result):
        assert all(len(ids) == 20 for ids in memory)


def test_increments_given_as_splits_equal_those_divided_by_class():
    order = class_order(CLASSES, 1993)
    bounds = (0, 2, 3, 6)
    groups = [torch.tensor(order[a:b]) for a, b in pairwise(bounds)]
    parts = [DATA.train.subset(torch.isin(DATA.train.labels, group).nonzero().flatten()) for group in groups]
    named = Data(**{f"increment_{t}": part for t, part in enumerate(parts)}, validation=DATA.validation)
    by_number = tuple(sorted(order[:2])) + order[2:3] + tuple(sorted(order[3:]))
    result, *_ = run(data=named)
    right = result.roles.student(DATA.validation.x).argmax(1) == DATA.validation.labels
    assert right.float().mean().item() == pytest.approx(result.metrics["top1"])
    assert Increments.of(named, 1).order == by_number


def test_classes_that_a_student_knows_already_are_its_memory():
    known = Data(train=TensorSource(DATA.train.x[:60], DATA.train.labels[:60]))  # classes 0, 1 and 2
    engine = Engine(epochs=10, batch_size=10, device="cpu")
    first = execute(WA(increments=1), Roles(student=student(3)), known, engine, optim=SGD)
    rows = head_of(first.roles.student.module).weight
    trained = copy.deepcopy(first.roles.student.module)
    trained[2] = nn.Linear(24, CLASSES, bias=False)
    with torch.no_grad():
        trained[2].weight[:3] = rows
    kept = torch.arange(60).view(3, 20)[:, :5].flatten()
    data = Data(train=DATA.train.subset(range(60, 120)), memory=DATA.train.subset(kept), validation=DATA.validation)
    result = execute(WA(increments=1, memory=15), Roles(student=trained), data, engine, optim=SGD)
    torch.testing.assert_close(result.roles.old(DATA.train.x), first.roles.student(DATA.train.x))
    assert result.metrics["top1"] > 0.7


# The variants


def test_a_field_wins_over_the_variant():
    assert [WA(variant=v).point("norm") for v in ("paper", "code", "pycil")] == [2, 1, 2]
    assert WA(variant="code", norm=2.0, clamp=False).point("norm") == 2
    assert WA(variant="code", clamp=False).point("clamp") is False


def test_the_authors_code_scales_logits_of_the_old_and_the_final_model_only():
    _, seen, _ = run(variant="code", head="copy")
    assert "align_1" not in seen
    rows = head_of(seen["increment_1"]["student"]).weight
    torch.testing.assert_close(head_of(seen["grow_2"]["student"]).weight[:3], rows)
    expected = AlignHead(2, norm=1.0, clamp=True)(seen["increment_1"]["student"])[0]
    assert torch.equal(seen["old_2"]["old"](DATA.train.x), expected(DATA.train.x))
    final = AlignHead(3, norm=1.0, clamp=True)(seen["increment_2"]["student"])[0]
    assert torch.equal(seen["align_2"]["student"](DATA.train.x), final(DATA.train.x))


def test_the_authors_code_begins_with_a_new_head_and_pycil_has_a_bias_and_no_clipping():
    _, seen, _ = run(variant="code", epochs=1)
    grown, before = (head_of(seen[name]["student"]).weight for name in ("grow_1", "increment_0"))
    assert not torch.isclose(grown[:2], before).any()
    _, seen, lowest = run(variant="pycil", epochs=1)
    assert head_of(seen["align_1"]["student"]).bias is not None
    assert torch.equal(head_of(seen["align_1"]["student"]).bias, head_of(seen["increment_1"]["student"]).bias)
    assert min(lowest) < 0


def test_without_alignment_the_head_stays_as_it_was_learned():
    _, seen, _ = run(align=False, epochs=1)
    assert not any(name.startswith("align") for name in seen)


# What it refuses


@pytest.mark.parametrize(
    "fields",
    [
        {"increments": 0},
        {"increments": ()},
        {"increments": (2, 0)},
        {"memory": 0},
        {"temperature": 0.0},
        {"label_weight": 1.5},
        {"norm": 0.0},
        {"decay": -1.0},
    ],
)
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range") as error:
        WA(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


@pytest.mark.parametrize(
    ("teacher", "classes", "data", "fields", "words"),
    [
        (mlp(8, 6), 6, DATA, {}, "student before the newest classes"),
        (None, 4, DATA, {}, "label is out of range"),
        (None, 6, DATA, {"memory": 5}, "memory is out of range"),
        (None, 6, DATA, {"increments": 7}, "do not divide"),
        (None, 6, Data(train=DATA.train, increment_1=DATA.validation), {}, "arrived before"),
        (None, 6, (DATA.train.x, None), {}, "need labels"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused_before_anything_is_written(
    teacher, classes, data, fields, words, tmp_path
):
    if isinstance(data, tuple):
        data = Data(train=TensorSource(data[0]))
    with pytest.raises(UsageError, match=words):
        limbeck.distill(teacher, student(classes), data, "wa", out=tmp_path / "run", progress="off", **fields)
    assert not (tmp_path / "run").exists()


def test_a_student_that_does_not_end_in_its_classifier():
    shaped = nn.Sequential(nn.Linear(8, 9), nn.Unflatten(1, (3, 3)), nn.Linear(3, 2), nn.Flatten())
    with pytest.raises(UsageError, match="not the classifier's head"):
        WA().check(Roles(student=shaped), Batch(x=torch.zeros(2, 8), y=torch.tensor([0, 5])))
