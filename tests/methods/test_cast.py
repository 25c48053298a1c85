"""CAST: its loss, its stages, what is detached, and what it refuses."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.parametrized import Finalise, parametrized, under
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.losses import kl
from limbeck.losses.tokens import next_tokens, token_cross_entropy, token_kl
from limbeck.methods.cast.method import CAST, reached_ratio
from limbeck.nn.mlp import mlp
from limbeck.nn.nm import ScaledNM, violations

X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(x=X, y=torch.arange(20) % 3, id=torch.arange(20))


def dense():
    torch.manual_seed(0)
    return mlp(8, 16, 16, 3)


def roles(method):
    start = dense()
    m = Roles(teacher=start, student=method.sparse(start)[0])
    m.freeze("teacher")
    return m


def loss(method, m, batch=BATCH):
    (update,) = method.step(m, batch)
    assert update.role == "student"
    return update.loss


def test_the_student_starts_as_the_dense_model():
    method = CAST()
    m = roles(method)
    assert m.student(X).equal(m.teacher(X))
    expected = method.label_weight * F.cross_entropy(m.teacher(X), BATCH.y)  # the divergence is 0
    torch.testing.assert_close(loss(method, m), expected, rtol=0, atol=1e-6)


def test_the_loss_mixes_labels_and_teacher():
    m = roles(CAST())
    for p in m.student.parameters():
        p.data.add_(0.1)
    soft, hard = kl(m.student(X), m.teacher(X)), F.cross_entropy(m.student(X), BATCH.y)
    torch.testing.assert_close(loss(CAST(label_weight=1.0), m), hard)
    torch.testing.assert_close(loss(CAST(label_weight=0.0), m), soft)
    w = 0.25  # (1 - w) soft + w hard has the gradient of w (hard + (1 - w) / w soft)
    torch.testing.assert_close(loss(CAST(label_weight=w), m), w * (hard + (1 - w) / w * soft))


def test_no_gradient_reaches_the_teacher_and_all_weights_learn():
    method = CAST()
    m = roles(method)
    loss(method, m).backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    for weight, made in under(m.student.module, ScaledNM):
        assert weight.grad[~made.mask].ne(0).any()  # the forward pass is dense
        assert made.scale.grad is not None


def test_masks_are_chosen_anew_before_the_step_and_by_the_unscaled_weight():
    method = CAST(refresh_every=3)
    m = roles(method)
    weight, made = next(under(m.student.module, ScaledNM))
    first = made.mask.clone()
    weight.data.copy_(weight.flip(1))
    made.scale.data[:, 0] = 100.0
    m.step = 1
    loss(method, m)
    assert made.mask.equal(first)
    m.step = 3
    loss(method, m)
    assert made.mask.equal(first.flip(1))


def test_next_tokens_are_learnt_the_same_way():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(7, 8), mlp(8, 16, 8), nn.Linear(8, 7)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.body(self.embed(input_ids)))

    torch.manual_seed(1)
    start, method = Model(), CAST(label_weight=0.5, include=("body.*",))
    m = Roles(teacher=start, student=method.sparse(Model())[0])
    ids = torch.arange(15).view(3, 5) % 7
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    x = {"input_ids": ids, "attention_mask": mask}
    (update,) = method.step(m, Batch(x=x))
    labels = next_tokens(x)
    assert labels.tolist()[1] == [ids[1, 1], ids[1, 2], -100, -100, -100]
    assert int(update.count) == 6
    s, t = m.student(x), m.teacher(x)
    torch.testing.assert_close(
        update.loss, (token_cross_entropy(s, labels) + token_kl(s, t, labels)) / 2, rtol=1e-5, atol=1e-6
    )
    flat = labels.flatten() != -100
    torch.testing.assert_close(token_kl(s, t, labels), kl(s.flatten(0, 1)[flat], t.flatten(0, 1)[flat]))


def test_labels_of_every_position_count_alike():
    torch.manual_seed(0)
    start = nn.Linear(8, 4)
    method = CAST(include=("",))
    m = Roles(teacher=start, student=method.sparse(nn.Linear(8, 4))[0])
    x, y = torch.randn(3, 4, 8), torch.arange(12).view(3, 4) % 4  # as many positions as classes
    flat = loss(method, m, Batch(x=x.flatten(0, 1), y=y.flatten()))
    torch.testing.assert_close(loss(method, m, Batch(x=x, y=y)), flat)


def test_factors_do_not_decay_and_adams_descends():
    m = roles(CAST())
    m.total = 10
    groups = CAST().optimizer(m, "student", Optim(weight_decay=0.1)).param_groups
    factors = {id(made.scale) for _, made in under(m.student.module, ScaledNM)}
    decays = {group["weight_decay"] for group in groups for p in group["params"] if id(p) in factors}
    assert decays == {0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(m.student.parameters()))
    with pytest.raises(UsageError, match="descends"):
        CAST().optimizer(m, "student", Optim(maximize=True))


def test_it_ends_sparse_and_says_how_far_it_came():
    start = dense()
    data = Data(train=TensorSource(X.repeat(4, 1), torch.arange(80) % 3))
    optim = {"student": Optim(lr=0.02, schedule="cosine", final=0.05, warmup=0.05)}
    before = copy.deepcopy(start.state_dict())
    result = execute(
        CAST(decay=0.1),
        Roles(teacher=start, student=copy.deepcopy(start)),
        data,
        Engine(steps=400, batch_size=16),
        optim=optim,
    )
    student = result.roles.student.module
    assert not list(parametrized(student))
    assert violations(student[0].weight, 2, 4) == violations(student[2].weight, 2, 4) == 0
    assert student[4].weight.ne(0).all()  # the head stays dense
    reached = result.results[2].value
    assert reached["ratio"] < 0.02
    assert set(reached["layers"]) == {"0", "2"}
    assert result.history[-1]["convert/relative_difference"] < 0.02
    assert all(start.state_dict()[k].equal(v) for k, v in before.items())


def test_masking_too_early_warns():
    start = dense()
    with pytest.warns(UserWarning, match="masking has a price"):
        result = execute(
            CAST(decay=1e-4),
            Roles(teacher=start, student=copy.deepcopy(start)),
            Data(train=TensorSource(X, torch.arange(20) % 3)),
            Engine(steps=2, batch_size=10),
        )
    assert violations(result.roles.student.module[0].weight, 2, 4) == 0


def test_the_ratio_is_that_of_the_means():
    m = roles(CAST(include=("0",)))
    weight, made = next(under(m.student.module, ScaledNM))
    made.refresh(weight)
    weight.data.copy_(torch.where(made.mask, 2.0, 0.5))
    assert reached_ratio(m, None)["ratio"] == pytest.approx(0.25)


def test_folding_keeps_what_the_mask_keeps():
    m = roles(CAST())
    for _, made in under(m.student.module, ScaledNM):
        made.scale.data.uniform_(0.5, 2.0)
    masked = copy.deepcopy(m.student.module)
    for weight, made in under(masked, ScaledNM):
        weight.data.mul_(made.mask)
    plain, _ = Finalise()(m.student.module)
    torch.testing.assert_close(plain(X), masked(X), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 5}, "1 to m"),
        ({"decay": -1.0}, "0 or more"),
        ({"refresh_every": 0}, "1 or more"),
        ({"label_weight": 1.5}, "share"),
        ({"temperature": 0.0}, "above 0"),
        ({"scale_blocks": -1}, "0 or more"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(UsageError, match=words):
        CAST(**fields)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (CAST(m=3, n=1), "0: the weight"),
        (CAST(include=("nothing",)), "no layer is left"),
        (CAST(scale_blocks=3), "blocks of factors"),
    ],
)
def test_a_pattern_that_does_not_fit_stops_before_any_step(method, words):
    start = dense()
    with pytest.raises(UsageError, match=words), warnings.catch_warnings():
        method.check(Roles(teacher=start, student=copy.deepcopy(start)), BATCH)
