"""Fair latents: the penalty against an integral, closed forms, drawn rows, and what stays as it was."""

import csv
import math

import pytest
import torch

from limbeck import Engine, Optim, Roles
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.categorical import Columns, biased_table
from limbeck.engine.run import execute
from limbeck.evaluate.fairness import FairTable, demographic_parity_ratio, downstream, equalized_odds_ratio, synthesise
from limbeck.losses.independence import gaussian_kl, group_distance
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import TableVAE

SIZES = (2, 3, 2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def density(z, mean, logvar):
    return (-((z - mean) ** 2) / (2 * logvar.exp())).exp() / (2 * math.pi * logvar.exp()).sqrt()


def test_the_penalty_is_an_integral():
    mean, logvar, groups = normal(9, 1), 0.5 * normal(9, 1, seed=1), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1])
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    every = density(z, mean, logvar).mean(0)
    expected, square = 0.0, torch.trapezoid(every**2, z)
    for g in range(3):
        own = density(z, mean[groups == g], logvar[groups == g]).mean(0)
        expected += (groups == g).double().mean() ** 2 * torch.trapezoid((own - every) ** 2, z)
    found = group_distance(mean, logvar, groups, normalise=False)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(group_distance(mean, logvar, groups), expected / square, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(group_distance(mean, logvar, groups, normalise=False, chunk=2), found)


def test_the_penalty_is_zero_for_equal_groups_and_does_not_know_their_names():
    mean, logvar, groups = normal(8, 3), 0.3 * normal(8, 3, seed=1), torch.tensor([0, 1] * 4)
    twice = group_distance(torch.cat([mean, mean]), torch.cat([logvar, logvar]), torch.tensor([0] * 8 + [1] * 8))
    assert twice.item() == pytest.approx(0, abs=1e-12)
    found = group_distance(mean, logvar, groups)
    assert found > 0
    torch.testing.assert_close(group_distance(mean, logvar, 1 - groups), found)
    order = torch.randperm(8)
    torch.testing.assert_close(group_distance(mean[order], logvar[order], groups[order]), found)


def test_one_group_alone_is_no_penalty_and_has_a_finite_gradient():
    mean = normal(5, 2).requires_grad_()
    loss = group_distance(mean, torch.zeros(5, 2).double(), torch.ones(5, dtype=torch.int64))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    (g,) = torch.autograd.grad(loss, mean)
    assert g.isfinite().all()


def test_many_latents_do_not_underflow():
    mean, groups = normal(20, 64), torch.arange(20) % 2
    found = group_distance(mean, torch.zeros(20, 64).double(), groups)
    assert 0 < found < 2


def test_divergences_have_closed_forms():
    mean, other = normal(4, 3), normal(4, 3, seed=1)
    zero = torch.zeros(4, 3).double()
    assert gaussian_kl(mean, zero, mean, zero).item() == 0
    torch.testing.assert_close(gaussian_kl(mean, zero, other, zero), 0.5 * (mean - other).square().sum(1).mean())
    c = 2.5
    logs = torch.full((4, 3), math.log(c)).double()
    assert gaussian_kl(mean, logs, mean, zero).item() == pytest.approx(1.5 * (c - 1 - math.log(c)))
    p = torch.distributions.Normal(mean, (0.5 * logs).exp())
    q = torch.distributions.Normal(other, torch.ones(4, 3).double())
    expected = torch.distributions.kl_divergence(p, q).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, logs, other, zero, reduction="none"), expected)
    standard = gaussian_kl(mean, logs)
    torch.testing.assert_close(standard, gaussian_kl(mean, logs, zero, zero))


def net(hidden=8, seed=0):
    torch.manual_seed(seed)
    return TableVAE(SIZES, 2, latent=3, hidden=hidden, decoder_hidden=8)


def rows(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (n,), generator=g) for size in SIZES], 1)
    return codes, torch.randint(2, (n,), generator=g)


def source(n=60):
    codes, groups = rows(n)
    return TensorSource(net().one_hot(codes), groups, torch.arange(n))


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    m = Roles(teacher=net(), student=net())
    batch = source().batch(torch.arange(20), 0)
    update = FairLatent().step(m, batch)
    assert update.loss.item() == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(update.loss, list(m.student.module.encoder.parameters()))
    assert all(g.abs().max() < 1e-6 for g in gradients)


def test_without_the_penalty_it_is_a_conditional_autoencoder():
    m = Roles(teacher=net(), student=net(4))
    batch = source().batch(torch.arange(20), 0)
    plain, fair = (FairLatent(fairness=f).teach(m, batch) for f in (0.0, 10.0))
    mean, logvar = m.teacher.module.encode(batch.x, batch.y)
    torch.testing.assert_close(fair.loss - plain.loss, 10 * group_distance(mean, logvar, batch.y), rtol=1e-3, atol=1e-4)


def test_a_run_leaves_teacher_and_decoder_and_writes_a_table(tmp_path):
    m = Roles(teacher=net(16), student=net(4, seed=1))
    method = FairLatent(teach_steps=4, rows=70)
    engine = Engine(steps=4, batch_size=20, device="cpu", evaluate_every=0)
    optim = dict.fromkeys(("teacher", "student"), Optim("adam", lr=0.01))
    execute(method, m, Data(train=source()), engine, optim=optim, out=tmp_path)
    teacher, student = m.teacher.module, m.student.module
    for a, b in zip(teacher.decoder.parameters(), student.decoder.parameters(), strict=True):
        assert a.equal(b)
        assert not b.requires_grad
    encoders = [sum(p.numel() for p in n.encoder.parameters()) for n in (student, teacher)]
    assert encoders[0] < encoders[1]
    with next((tmp_path / "artefacts").rglob("table.csv")).open() as file:
        table = list(csv.reader(file))
    assert len(table) == 71
    assert table[0] == ["column_0", "column_1", "column_2", "group"]
    given = net(16)
    frozen = Roles(teacher=given, student=net(4, seed=1))
    before = [p.clone() for p in given.parameters()]
    execute(FairLatent(teach_steps=0), frozen, Data(train=source()), engine, optim={"student": Optim("adam", lr=0.01)})
    assert all(a.equal(b) for a, b in zip(before, given.parameters(), strict=True))


def test_drawn_groups_are_a_permutation_and_rows_follow_from_the_seed():
    codes, groups = rows(200)
    model = net()
    x = model.one_hot(codes)
    one, drawn = synthesise(model, x, groups, seed=3)
    again, _ = synthesise(model, x, groups, seed=3)
    other, _ = synthesise(model, x, groups, seed=4)
    assert one.equal(again)
    assert not one.equal(other)
    assert torch.bincount(drawn).equal(torch.bincount(groups))
    assert all((one[:, k] < size).all() for k, size in enumerate(SIZES))


def test_the_target_does_not_know_the_group_unless_it_is_decoded_literally():
    model = TableVAE((2, 2), 2, latent=2, hidden=4, decoder_hidden=4, target=-1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.decoder[0].weight[0, 2] = 1.0  # a unit for group 0 alone
        model.decoder[2].weight[3, 0] = 4.0  # which makes the target likely
    n = 4000
    x, groups = model.one_hot(torch.zeros(n, 2, dtype=torch.int64)), torch.arange(n) % 2
    shares = {}
    for literal in (False, True):
        made, drawn = synthesise(model, x, groups, literal=literal)
        shares[literal] = [float((made[drawn == g, 1] == 1).double().mean()) for g in (0, 1)]
    high, low = 1 / (1 + math.exp(-4)), 0.5
    assert shares[True] == pytest.approx([high, low], abs=0.03)
    assert shares[False] == pytest.approx([(high + low) / 2] * 2, abs=0.03)


def test_ratios_by_hand_and_those_of_fairlearn():
    predicted, groups = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    true = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])
    assert demographic_parity_ratio(predicted, groups) == 0.5
    assert equalized_odds_ratio(predicted, true, groups) == 0.0
    assert demographic_parity_ratio(torch.zeros(8), groups) == 1.0
    metrics = pytest.importorskip("fairlearn.metrics")
    g = torch.Generator().manual_seed(0)
    predicted, true, groups = (torch.randint(2, (300,), generator=g) for _ in range(3))
    arrays = {"y_true": true.numpy(), "y_pred": predicted.numpy(), "sensitive_features": groups.numpy()}
    assert demographic_parity_ratio(predicted, groups) == pytest.approx(metrics.demographic_parity_ratio(**arrays))
    assert equalized_odds_ratio(predicted, true, groups) == pytest.approx(metrics.equalized_odds_ratio(**arrays))


def test_a_logistic_regression_learns_a_rule():
    codes, _ = rows(300)
    codes[:, 2] = codes[:, 0]
    assert (downstream(codes, codes, SIZES, 2) == codes[:, 0]).all()


def test_tables_become_rows_of_categories():
    table, groups = biased_table(200)
    columns = Columns.of(table)
    assert columns.sizes == (4,) * 7 + (2,)
    codes = columns.codes(table)
    assert all(30 < count < 70 for count in torch.bincount(codes[:, 0]).tolist())
    rows = columns.source(table, groups)
    assert rows.x.shape == (200, 30)
    assert (rows.x.sum(1) == 8).all()
    with pytest.raises(UsageError, match="a value is missing"):
        Columns.of({"a": [1.0, float("nan")]})
    with pytest.raises(UsageError, match="none of the categories"):
        Columns.of({"a": ["x", "y"]}).codes({"a": ["z"]})
    with pytest.raises(UsageError, match="a column is missing"):
        columns.codes({"y": [0]})


def test_it_is_judged_by_what_a_classifier_makes_of_its_rows():
    m = Roles(student=net())
    numbers = FairTable(source(100)).judge(m, "student")
    assert set(numbers) == {"demographic_parity_ratio", "accuracy", "equalized_odds_ratio"}


@pytest.mark.parametrize(
    "fields", [{"fairness": -1.0}, {"kl_weight": -1.0}, {"label_decode": "x"}, {"teach_steps": -1}]
)
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        FairLatent(**fields)


def test_what_does_not_fit():
    batch = source().batch(torch.arange(4), 0)
    with pytest.raises(UsageError, match="no model of a table"):
        FairLatent().check(Roles(teacher=net(), student=torch.nn.Linear(2, 2)), batch)
    with pytest.raises(UsageError, match="does not fit the student"):
        FairLatent().check(Roles(teacher=net(), student=TableVAE(SIZES, 2, latent=5)), batch)
    with pytest.raises(UsageError, match="rows do not fit"):
        FairLatent().check(Roles(teacher=net(), student=net(4)), Batch(x=torch.zeros(2, 3), y=torch.zeros(2)))
    with pytest.raises(UsageError, match="no groups"):
        FairLatent().check_data(Data(train=TensorSource(torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64))))
    made, record = TakeDecoder(net(16))(net(4))
    assert record["kind"].endswith(":take_decoder")
    assert not made.decoder[0].weight.requires_grad
