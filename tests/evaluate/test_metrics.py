import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import f1_score, label_ranking_average_precision_score
from torch.nn.functional import one_hot
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from limbeck.evaluate.metrics import (
    agreement,
    calibration_error,
    f1,
    ranks,
    reciprocal_rank,
    spearman,
    teacher_kl,
    topk_accuracy,
)


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def problem(draw):
    return torch.randn(200, 7, generator=draw), torch.randint(7, (200,), generator=draw)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_accuracy_equals_torchmetrics(problem, k):
    logits, labels = problem
    expected = multiclass_accuracy(logits, labels, num_classes=7, top_k=k, average="micro")
    torch.testing.assert_close(topk_accuracy(logits, labels, k), expected)


def test_a_collapsed_model_earns_chance():
    labels = torch.zeros(10, dtype=torch.long)
    assert topk_accuracy(torch.ones(10, 4), labels).item() == pytest.approx(0.25)
    assert topk_accuracy(torch.ones(10, 4), labels, k=3).item() == pytest.approx(0.75)
    expected = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert reciprocal_rank(torch.ones(10, 4), labels).item() == pytest.approx(expected)


def test_ties_are_the_mean_over_their_orders(draw):
    scores = torch.randint(4, (50, 9), generator=draw).float()
    target = torch.randint(9, (50,), generator=draw)
    noise = torch.rand(4000, 50, 9, generator=draw) * 0.5  # breaks ties at random, keeps the order of the rest
    shuffled = (scores + noise).reshape(-1, 9)
    for metric in (topk_accuracy, reciprocal_rank):
        sampled = metric(shuffled, target.repeat(4000), k=3, reduction="none").reshape(4000, 50).mean(0)
        torch.testing.assert_close(metric(scores, target, k=3, reduction="none"), sampled, atol=0.04, rtol=0)


@pytest.mark.parametrize("metric", [topk_accuracy, reciprocal_rank])
def test_a_nan_score_is_not_a_hit(metric):
    scores = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    values = metric(scores, torch.tensor([0, 0]), reduction="none")
    assert values[0].isnan()
    assert values[1] == 1


def test_reciprocal_rank_equals_scikit_learn(problem):
    scores, target = problem
    expected = label_ranking_average_precision_score(one_hot(target, 7).numpy(), scores.numpy())
    assert reciprocal_rank(scores, target).item() == pytest.approx(expected)


def test_reciprocal_rank_is_zero_beyond_the_cut_off(problem):
    scores, target = problem
    full, cut = (reciprocal_rank(scores, target, k=k, reduction="none") for k in (None, 3))
    torch.testing.assert_close(cut, torch.where(full > 0.3, full, 0))


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_equals_scikit_learn(problem, average):
    logits, labels = problem
    predictions = logits.argmax(-1).clamp(max=4)  # classes 5 and 6 are never predicted
    expected = f1_score(labels, predictions, average=average)
    assert f1(predictions, labels, classes=9, average=average).item() == pytest.approx(expected)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_of_several_labels_equals_scikit_learn(draw, average):
    predictions, labels = torch.randint(2, (2, 60, 5), generator=draw)
    expected = f1_score(labels.numpy(), predictions.numpy(), average=average)
    assert f1(predictions, labels, average=average).item() == pytest.approx(expected)


def test_f1_per_class_is_nan_for_an_absent_class():
    scores = f1(torch.tensor([0, 1]), torch.tensor([0, 1]), classes=3, average="none")
    assert scores[:2].tolist() == [1, 1]
    assert scores[2].isnan()


def test_ranks_and_spearman_equal_scipy_with_ties(draw):
    a, b = torch.randint(12, (2, 3, 50), generator=draw).float()
    torch.testing.assert_close(ranks(a), torch.from_numpy(rankdata(a.numpy(), axis=-1)))
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert spearman(a, b).tolist() == pytest.approx(expected)


def test_spearman_sees_order_only(draw):
    a, b = torch.randn(2, 100, generator=draw)
    torch.testing.assert_close(spearman(a, b), spearman(a.exp(), b**3))
    assert spearman(a, -a).item() == pytest.approx(-1)


def test_spearman_of_a_constant_or_a_nan_is_undefined():
    a = torch.arange(5.0)
    assert spearman(a, torch.full((5,), 0.1)).isnan()
    assert spearman(a, torch.tensor([0, 1, math.nan, 3, 4])).isnan()


@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_equals_torchmetrics(problem, bins):
    logits, labels = problem
    probabilities = (2 * logits).softmax(-1)
    expected = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=bins, norm="l1")
    torch.testing.assert_close(calibration_error(probabilities, labels, bins), expected)


def test_calibration_error_of_sure_predictions_is_their_error():
    sure, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert calibration_error(sure, labels).item() == pytest.approx(0.25)


def test_agreement_and_kl_with_the_teacher(problem):
    teacher, _ = problem
    assert agreement(teacher * 3, teacher).item() == 1
    assert agreement(torch.zeros_like(teacher), teacher).item() == pytest.approx(1 / 7)
    assert teacher_kl(teacher + 5, teacher).item() == pytest.approx(0, abs=1e-6)
    p, q = teacher.softmax(-1), (-teacher).softmax(-1)
    torch.testing.assert_close(teacher_kl(-teacher, teacher), (p * (p / q).log()).sum(-1).mean())


def test_kl_skips_a_class_that_both_rule_out():
    student, teacher = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 0.0, -math.inf]])
    torch.testing.assert_close(teacher_kl(student, teacher), teacher_kl(student[:, :2], teacher[:, :2]))


@pytest.mark.parametrize("metric", [topk_accuracy, agreement, reciprocal_rank, teacher_kl])
def test_batches_add_up_to_the_whole(problem, metric):
    scores, labels = problem
    other = labels if metric in (topk_accuracy, reciprocal_rank) else scores.flip(0)
    parts = [metric(s, o, reduction="none") for s, o in zip(scores.split(64), other.split(64), strict=True)]
    torch.testing.assert_close(torch.cat(parts).mean(), metric(scores, other))
