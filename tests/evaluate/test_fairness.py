"""Samples of models that are told a group: how they are drawn and divided, and how fair a classifier of them is."""

import math
import sys

import pytest
import torch
from fair_worlds import eye, images, net, rows, source

from limbeck import Roles
from limbeck.core.errors import UsageError
from limbeck.data import TensorSource
from limbeck.evaluate.fairness import (
    Fairness,
    demographic_parity_ratio,
    equalized_odds_ratio,
    group_probe,
    judge_predictions,
    logistic_regression,
    synthesise,
)
from limbeck.evaluate.tasks import evaluator
from limbeck.nn.vae import TableVAE


def test_drawn_groups_are_a_permutation_and_rows_follow_from_the_seed():
    model, real = net(), source(200)
    one, drawn = synthesise(model, real, seed=3)
    again, _ = synthesise(model, real, seed=3)
    other, _ = synthesise(model, real, seed=4)
    assert one.equal(again)
    assert not one.equal(other)
    assert torch.bincount(drawn).equal(torch.bincount(real.labels))
    model.check(one)


def test_samples_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    for model, real in ((net(), source(50)), (eye(), images(50))):
        whole, groups = synthesise(model, real, torch.arange(40), seed=3)
        with monkeypatch.context() as patch:
            patch.setattr("limbeck.evaluate.fairness._AT_ONCE", 7)
            parts, same = synthesise(model, real, torch.arange(40), seed=3)
        assert groups.equal(same)
        torch.testing.assert_close(parts, whole)


def silent(kind):
    """A model that tells the target from the group alone, and real samples, a quarter of them of group 0."""
    model = TableVAE((2, 2), 2, latent=2, hidden=4, decoder_hidden=4) if kind == "table" else eye()
    first, last = (
        (model.decoder[0], model.decoder[2]) if kind == "table" else (model.decoder.hidden[0], model.decoder.target)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        first.weight[0, model.latent] = 1.0  # a unit for group 0 alone
        last.weight[-1, 0] = 4.0  # which makes the target likely
    target = torch.zeros(4000, dtype=torch.int64)
    x = (
        {"image": torch.zeros(4000, 2, 4, 4), "target": target}
        if kind == "images"
        else model.one_hot(target[:, None].expand(-1, 2))
    )
    return model, TensorSource(x, (torch.arange(4000) % 4 > 0).long(), torch.arange(4000))


@pytest.mark.parametrize("kind", ["table", "images"])
def test_the_target_does_not_know_the_group_unless_it_is_decoded_literally(kind):
    model, real = silent(kind)
    shares = {}
    for literal in (False, True):
        made, drawn = synthesise(model, real, literal=literal)
        target = model.divided(made)[1]
        shares[literal] = [float(target[drawn == g].double().mean()) for g in (0, 1)]
    high, low = 1 / (1 + math.exp(-4)), 0.5
    assert shares[True] == pytest.approx([high, low], abs=0.03)
    assert shares[False] == pytest.approx([0.25 * high + 0.75 * low] * 2, abs=0.03)


def test_ratios_by_hand():
    predicted, groups = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert demographic_parity_ratio(predicted, groups) == 0.5
    true = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])  # rates 2/2 and 1/2, and no false positive: 0 / 0 is parity
    assert equalized_odds_ratio(predicted, true, groups) == 0.5
    assert equalized_odds_ratio(predicted, torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]), groups) == 0.0
    for answer in (torch.zeros(8), torch.ones(8)):
        assert demographic_parity_ratio(answer, groups) == equalized_odds_ratio(answer, true, groups) == 1.0
    alone = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])  # group 1 has no positives: fairlearn takes its rate for 0
    assert equalized_odds_ratio(torch.ones(8), alone, groups) == 0.0


def test_judged_numbers_are_those_of_fairlearn_and_scikit_learn():
    fair, metrics = pytest.importorskip("fairlearn.metrics"), pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(1)
    scores, (true, groups) = torch.randn(300, generator=g), (torch.randint(2, (300,), generator=g) for _ in range(2))
    found = judge_predictions(scores, true, groups)
    arrays = {"y_true": true.numpy(), "y_pred": (scores > 0).numpy(), "sensitive_features": groups.numpy()}
    for name in ("demographic_parity_ratio", "equalized_odds_ratio"):
        assert found[name] == pytest.approx(getattr(fair, name)(**arrays))
    assert found["f1"] == pytest.approx(metrics.f1_score(true, scores > 0))
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(true, scores))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, scores > 0))
    assert judge_predictions(scores, torch.ones(300, dtype=torch.int64), groups)["auroc"] == 0.5


def test_fairness_needs_fairlearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairlearn.metrics", None)
    with pytest.raises(UsageError, match=r"limbeck\[fair\]"):
        Fairness(source())


def test_a_logistic_regression_learns_a_rule():
    codes, _ = rows(300)
    x = net().one_hot(codes)[:, :5]
    assert ((logistic_regression(x, codes[:, 0])(x) > 0) == codes[:, 0].bool()).all()


def test_a_linear_probe_misses_what_squares_find():
    g = torch.Generator().manual_seed(0)
    z, groups = torch.randn(6000, 2, generator=g), torch.arange(6000) % 2
    z = z * (1 + 2 * groups[:, None])  # same mean, another spread
    flat, curved = (group_probe(z[:3000], groups[:3000], z[3000:], groups[3000:], squares=s) for s in (False, True))
    assert flat < 0.6
    assert curved > 0.7


@pytest.mark.parametrize("kind", ["table", "images"])
def test_it_is_judged_by_what_a_classifier_makes_of_its_samples(kind):
    m = Roles(student=net() if kind == "table" else eye())
    real = source(100) if kind == "table" else images(100)
    numbers = Fairness(real).judge(m, "student")
    ratios = {"demographic_parity_ratio", "equalized_odds_ratio", "accuracy", "f1", "auroc"}
    assert set(numbers) == ratios | {"density", "coverage"}
    assert isinstance(evaluator(real, m.student.module), Fairness)


def test_nothing_is_judged_on_the_samples_that_it_was_drawn_from(monkeypatch):
    drawn, judged = [], []

    class Spy(TensorSource):
        def batch(self, rows, view):
            judged.extend(self.ids[rows].tolist())
            return super().batch(rows, view)

    def spied(model, real, rows, **options):
        drawn.extend(real.ids[rows].tolist())
        return synthesise(model, source(100), rows, **options)

    monkeypatch.setattr("limbeck.evaluate.fairness.synthesise", spied)
    real = source(100)
    Fairness(Spy(real.x, real.labels, real.ids)).judge(Roles(student=net()), "student")
    assert len(drawn) == len(judged) == 50
    assert not set(drawn) & set(judged)


def test_held_out_samples_of_one_group_cannot_be_judged():
    alone = TensorSource(source().x, torch.ones(60, dtype=torch.int64), torch.arange(60))
    with pytest.raises(UsageError, match="tell nothing of fairness"):
        Fairness(alone)


def test_more_than_two_classes_are_not_judged():
    assert evaluator(images(classes=3), eye(classes=3)) is None


def test_images_are_judged_by_pixels_and_their_class_alike():
    """Pixels and class of which nothing is known cost log 2 each, and log K."""
    model, real = eye(classes=3), images(5, classes=3)
    nothing = {"image": torch.zeros(5, 2, 4, 4), "target": torch.zeros(5, 3)}
    assert model.reconstruction(nothing, real.x).item() == pytest.approx(32 * math.log(2) + math.log(3), rel=1e-6)
    group = torch.tensor([0, 1, 0, 1, 0])
    (mean, _), (other, _) = model.encode(real.x, group), model.encode(real.x, 1 - group)
    assert mean.equal(other)  # the encoder is not told, the decoder is
    assert not model.decode(mean, group)["image"].equal(model.decode(mean, 1 - group)["image"])
