"""Fair latents: the penalty against an integral, closed forms, drawn rows, and what stays as it was."""

import csv
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from limbeck import Engine, Optim, Roles
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.categorical import Columns, biased_table, columns_of, read_table, table_data
from limbeck.data.synthetic import SyntheticTable
from limbeck.engine.run import execute
from limbeck.evaluate.fairness import (
    FairTable,
    auroc,
    demographic_parity_ratio,
    equalized_odds_ratio,
    fit_rows,
    group_probe,
    judge_predictions,
    synthesise,
)
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
    found = group_distance(mean, logvar, groups, 3, normalise=False)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(group_distance(mean, logvar, groups, 3), expected / square, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_pairs_in_parts_are_the_same_penalty_and_gradient(normalise):
    groups, found = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1]), []
    for chunk in (512, 2):
        mean, logvar = normal(9, 3).requires_grad_(), (0.5 * normal(9, 3, seed=1)).requires_grad_()
        loss = group_distance(mean, logvar, groups, 3, normalise=normalise, chunk=chunk)
        found.append([loss.detach(), *torch.autograd.grad(loss, (mean, logvar))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][1].abs().max() > 1e-4


def test_the_gradient_of_the_penalty_is_that_of_differences():
    mean, logvar, groups = (
        normal(5, 2).requires_grad_(),
        normal(5, 2, seed=1).requires_grad_(),
        torch.tensor([0, 1, 1, 0, 1]),
    )
    for normalise in (True, False):
        assert torch.autograd.gradcheck(
            lambda m, v, n=normalise: group_distance(m, v, groups, 2, normalise=n), (mean, logvar)
        )


def test_the_penalty_of_two_points_is_told_by_hand():
    """Two groups of one Gaussian each, d apart: 1/8 of the integral of (p_1 - p_2)^2 in all."""
    d, z = 1.7, 3
    mean = torch.zeros(2, z).double()
    mean[1, 0] = d
    logvar = torch.full((2, z), math.log(0.8), dtype=torch.float64)
    own = (4 * math.pi * 0.8) ** (-z / 2)
    expected = 2 * 0.25 * 0.25 * (2 * own - 2 * own * math.exp(-(d**2) / (4 * 0.8)))
    found = group_distance(mean, logvar, torch.tensor([0, 1]), 2, normalise=False)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_the_penalty_is_zero_for_equal_groups_and_does_not_know_their_names():
    mean, logvar, groups = normal(8, 3), 0.3 * normal(8, 3, seed=1), torch.tensor([0, 1] * 4)
    same = torch.tensor([0] * 8 + [1] * 8)
    twice = group_distance(torch.cat([mean, mean]), torch.cat([logvar, logvar]), same, 2)
    assert twice.item() == pytest.approx(0, abs=1e-12)
    found = group_distance(mean, logvar, groups, 2)
    assert found > 0
    torch.testing.assert_close(group_distance(mean, logvar, 1 - groups, 2), found)
    torch.testing.assert_close(group_distance(mean, logvar, groups, 5), found)  # three are missing
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_distance(mean[order], logvar[order], groups[order], 2), found)


def test_one_group_alone_is_no_penalty_and_has_a_finite_gradient():
    mean = normal(5, 2).requires_grad_()
    loss = group_distance(mean, torch.zeros(5, 2).double(), torch.ones(5, dtype=torch.int64), 2)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    (g,) = torch.autograd.grad(loss, mean)
    assert g.isfinite().all()


def test_many_latents_do_not_underflow():
    mean, groups = normal(20, 64).float(), torch.arange(20) % 2
    found = group_distance(mean, torch.zeros(20, 64), groups, 2)
    assert 0.01 < found < 2
    assert group_distance(mean, torch.zeros(20, 64), groups, 2, normalise=False) < 1e-30


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


def test_no_step_waits_for_the_device():
    with FakeTensorMode():  # where reading a number from a tensor raises
        m = Roles(teacher=net(16), student=net(4))
        batch = Batch(x=torch.zeros(8, 7), y=torch.zeros(8, dtype=torch.int64), id=torch.arange(8))
        for update in (FairLatent().teach(m, batch), FairLatent().step(m, batch)):
            update.loss.backward()


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
    made = SyntheticTable.load(tmp_path)
    assert made.columns == Columns.numbered(SIZES, 2)
    assert (len(made), made.info["from_rows"]) == (70, 60)
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
    assert ((fit_rows(codes, SIZES, 2)(codes) > 0) == codes[:, 0].bool()).all()
    with pytest.raises(UsageError, match="cannot be judged"):
        fit_rows(codes, SIZES, 1)


def test_utility_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(1)
    scores, true = torch.randint(-3, 4, (200,), generator=g), torch.randint(2, (200,), generator=g)
    found = judge_predictions(scores, true, torch.randint(2, (200,), generator=g))
    assert found["f1"] == pytest.approx(metrics.f1_score(true, scores > 0))
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(true, scores))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, scores > 0))
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])) == 0.5


def test_a_linear_probe_misses_what_squares_find():
    g = torch.Generator().manual_seed(0)
    z, groups = torch.randn(6000, 2, generator=g), torch.arange(6000) % 2
    z = z * (1 + 2 * groups[:, None])  # same mean, another spread
    flat, curved = (group_probe(z[:3000], groups[:3000], z[3000:], groups[3000:], squares=s) for s in (False, True))
    assert flat < 0.6
    assert curved > 0.7


def test_tables_become_rows_of_categories_and_tables_again():
    table = biased_table(200)
    columns = Columns.of(table, "group", "y")
    assert columns.sizes == (4,) * 7 + (2,)
    codes = columns.codes(table)
    assert all(30 < count < 70 for count in torch.bincount(codes[:, 0]).tolist())
    made = columns.source(table)
    assert made.x.shape == (200, 30)
    assert (made.x.sum(1) == 8).all()
    assert made.labels.tolist() == table["group"]
    again = columns.table(codes, made.labels)
    assert again["y"] == table["y"]
    assert columns.codes(again).equal(codes)  # a bin's median lies in the bin
    assert Columns.from_dict(columns.as_dict()) == columns
    assert columns.codes({name: [1e9] if name != "y" else [0] for name in columns.names})[0].tolist() == [3] * 7 + [0]


def test_equal_numbers_are_in_one_bin_and_no_bin_is_empty():
    some = [float(v) for v in range(50)]
    table = {"a": [0.0] * 50 + some, "b": some + [99.0] * 50, "s": [0, 1] * 50, "y": [0, 0, 1, 1] * 25}
    columns = Columns.of(table, "s", "y")
    for k in (0, 1):
        assert 1 < columns.sizes[k] < 4
        assert all(torch.bincount(columns.codes(table)[:, k], minlength=columns.sizes[k]) > 0)


def test_the_last_part_of_bins_is_not_looked_at():
    table = biased_table(400)
    table["merit_0"] = [v if i < 200 else 100 * v for i, v in enumerate(table["merit_0"])]
    assert max(Columns.of(table, "group", "y", rows=range(200)).ends[0]) < 2
    data = table_data(table, "group", "y")
    assert sum(len(part) for _, part in data.items()) == 400
    assert len(torch.cat([part.ids for _, part in data.items()]).unique()) == 400
    assert columns_of(data.test.subset([1, 2])) is data.train.columns


def test_a_frame_and_a_file_are_tables(tmp_path):
    table = {"age": [20, 31, 45, 60], "sex": ["f", "m", "m", "f"], "paid": ["no", "yes", "yes", "no"]}
    (tmp_path / "t.csv").write_text(
        "\n".join(",".join(map(str, row)) for row in (table, *zip(*table.values(), strict=True)))
    )
    read = read_table(tmp_path / "t.csv", ["sex"])
    assert read == table
    pandas = pytest.importorskip("pandas")
    assert Columns.of(pandas.DataFrame(table), "sex", "paid") == Columns.of(read, "sex", "paid")


def words(**change):
    return {"a": [0.5, 1.5, 2.5, 3.5], "s": ["x", "y", "x", "y"], "y": [0, 1, 1, 0]} | change


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (words(a=[1.0, float("nan"), 2.0, 3.0]), "a value is missing"),
        (words(a=["u", None, "v", "w"]), "a value is missing"),
        (words(a=[1.0, float("inf"), 2.0, 3.0]), "not finite"),
        (words(a=[1.0, "u", 2.0, 3.0]), "words and numbers"),
        (words(a=[1.0]), "differ in length"),
        (words(s=["x"] * 4), "cannot be protected"),
        (words(s=[0.1, 0.2, 0.3, 0.4]), "cannot be protected"),
        (words(y=[1] * 4), "cannot be protected or predicted"),
        ({"a": [1.0, 2.0], "y": [0, 1]}, "a column is missing"),
    ],
)
def test_tables_that_cannot_work(table, what):
    with pytest.raises(UsageError, match=what):
        Columns.of(table, "s", "y", bins=1)


def test_rows_that_do_not_fit_their_columns():
    columns = Columns.of(words(a=["u", "v", "u", "v"]), "s", "y")
    with pytest.raises(UsageError, match="none of the categories"):
        columns.codes(words(a=["u", "v", "u", "z"]))
    with pytest.raises(UsageError, match="none of the categories"):
        columns.group_codes(words(s=["x", "y", "x", "z"]))
    with pytest.raises(UsageError, match="a column is missing"):
        columns.codes({"y": [0]})
    binned = Columns.of(words(), "s", "y", bins=1)
    with pytest.raises(UsageError, match="a value is no number"):
        binned.codes(words(a=["u", "v", "u", "z"]))
    with pytest.raises(UsageError, match="one group"):
        table_data(words(a=["u"] * 4) | {"s": ["x", "x", "x", "y"]}, "s", "y")


def test_a_synthetic_table_is_kept_with_its_meaning(tmp_path):
    table = biased_table(100)
    columns = Columns.of(table, "group", "y")
    made = SyntheticTable(columns, columns.codes(table), columns.group_codes(table), {"seed": 3})
    made.save(tmp_path)
    again = SyntheticTable.load(tmp_path)
    assert again.codes.equal(made.codes)
    assert (again.columns, again.info) == (columns, {"seed": 3})
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == [*columns.names, "group"]
    binned = zip(columns.values[:7], made.codes[0, :7].tolist(), strict=True)
    assert [float(v) for v in lines[1][:7]] == [values[c] for values, c in binned]
    assert made.bytes() == {"codes": 800, "groups": 100}
    assert made.source().x.equal(columns.source(table).x)
    right = (made.train(50)(made.codes) > 0).long() == made.codes[:, -1]
    assert right.double().mean() > 0.7
    (tmp_path / "synthetic.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        SyntheticTable.load(tmp_path)
    with pytest.raises(UsageError, match="no synthetic table"):
        SyntheticTable.load(tmp_path / "other")


def test_it_is_judged_by_what_a_classifier_makes_of_its_rows():
    m = Roles(student=net())
    numbers = FairTable(source(100)).judge(m, "student")
    ratios = {"demographic_parity_ratio", "equalized_odds_ratio", "accuracy", "f1", "auroc"}
    assert set(numbers) == ratios | {"density", "coverage"}


def test_some_rows_of_a_sorted_file_are_of_all_groups(tmp_path):
    codes, _ = rows(400)
    ordered = TensorSource(net().one_hot(codes), torch.arange(400) // 200, torch.arange(400))
    FairLatent(rows=40)._table(ordered, Roles(teacher=net(), student=net()), tmp_path)
    assert 8 <= int(SyntheticTable.load(tmp_path).groups.sum()) <= 32


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
    with pytest.raises(UsageError, match="not one-hot"):
        FairLatent().check(Roles(teacher=net(), student=net(4)), Batch(x=torch.rand(2, 7), y=torch.zeros(2)))
    for y in (torch.zeros(3, dtype=torch.int64), torch.tensor([0.0, 1.0, 0.5]), None):
        with pytest.raises(UsageError, match="no groups"):
            FairLatent().check_data(Data(train=TensorSource(torch.zeros(3, 7), y)))
    three = Data(train=TensorSource(net().one_hot(rows(3)[0]), torch.arange(3), torch.arange(3)))
    with pytest.raises(UsageError, match="more groups"):
        next(FairLatent().stages(Roles(teacher=net(), student=net(4)), three))
    made, record = TakeDecoder(net(16))(net(4))
    assert record["kind"].endswith(":take_decoder")
    assert not made.decoder[0].weight.requires_grad
