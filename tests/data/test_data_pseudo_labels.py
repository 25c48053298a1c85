"""Pseudo labels: thresholds, selection, similarities and margins."""

import math

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data.pseudo_labels import (
    balanced_thresholds,
    class_similarities,
    confidence,
    confident,
    energy,
    entropy,
    margin_labels,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scores_in_closed_form():
    logits = 3 * draw(6, 4)
    p = logits.softmax(1)
    torch.testing.assert_close(confidence(logits), p.max(1).values)
    torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(1))
    torch.testing.assert_close(energy(logits, 2.0), -2 * (logits / 2).exp().sum(1).log())
    assert entropy(torch.tensor([[1e4, 0.0]])).item() == 0.0


def test_thresholds_rise_with_the_share_from_0_to_the_cutoff():
    found = balanced_thresholds(torch.arange(101), 0.95)
    assert found[0] == 0
    assert found[100].item() == pytest.approx(0.95)
    assert found[50].item() == pytest.approx(0.95 / 3)
    assert found[10].item() == pytest.approx(0.05)
    assert (found.diff() > 0).all()
    assert balanced_thresholds(torch.tensor([5, 5, 5])).tolist() == pytest.approx([0.95] * 3)
    assert balanced_thresholds(torch.zeros(3)).tolist() == [0, 0, 0]


def sure(label, p, classes=3):
    """Logits of one class with probability p, the others alike."""
    logits = torch.zeros(classes, dtype=torch.float64)
    logits[label] = math.log(p / (1 - p) * (classes - 1))
    return logits


def test_a_rare_class_passes_at_low_confidence():
    logits = torch.stack([*[sure(0, 0.96)] * 8, *[sure(0, 0.94)] * 2, *[sure(1, 0.5)] * 5, sure(2, 0.4)])
    assert confident(logits).tolist() == [True] * 8 + [False] * 2 + [True] * 6  # above 0.95, 0.317 and 0.05


def test_one_class_alone_needs_the_cutoff():
    logits = torch.stack([sure(1, 0.96), sure(1, 0.94)])
    assert confident(logits).tolist() == [True, False]


def test_cutoff_zero_keeps_all_and_a_shift_of_the_logits_changes_nothing():
    logits = 4 * draw(200, 5)
    assert confident(logits, cutoff=0.0).all()
    assert torch.equal(confident(logits), confident(logits + draw(200, 1, seed=1)))


def test_where_none_passes_the_surest_tenth_is_taken():
    logits = torch.stack([sure(0, 0.5 + i / 1000) for i in range(25)])
    assert confident(logits).nonzero().flatten().tolist() == [22, 23, 24]
    assert confident(logits[:1]).tolist() == [True]


FEATURES = torch.nn.functional.normalize(draw(50, 6), dim=1)
LABELLED = torch.nn.functional.normalize(draw(12, 6, seed=1), dim=1)
LABELS = torch.arange(12) % 3


def test_similarities_are_those_of_the_nearest_of_each_class():
    every = FEATURES @ LABELLED.T
    expected = torch.stack([every[:, k == LABELS].max(1).values for k in range(3)], dim=1)
    for chunk in (1, 7, 50, 4096):
        torch.testing.assert_close(class_similarities(FEATURES, LABELLED, LABELS, 3, chunk), expected)


def test_order_and_copies_do_not_count_and_more_samples_never_lower():
    before = class_similarities(FEATURES, LABELLED, LABELS, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(class_similarities(FEATURES, LABELLED[order], LABELS[order], 3), before)
    twice = torch.cat([LABELLED, LABELLED[:5]]), torch.cat([LABELS, LABELS[:5]])
    torch.testing.assert_close(class_similarities(FEATURES, *twice, 3), before)
    more = torch.cat([LABELLED, FEATURES[:4]]), torch.cat([LABELS, torch.tensor([0, 1, 1, 2])])
    assert (class_similarities(FEATURES, *more, 3) >= before - 1e-12).all()


def test_the_margin_is_the_product_of_the_paper_and_never_negative():
    similarities = draw(500, 4)
    label, weight = margin_labels(similarities)
    first, second = similarities.sort(dim=1, descending=True).values[:, :2].unbind(1)
    torch.testing.assert_close(weight, first * (1 - second / first), rtol=0, atol=1e-12)
    assert (weight >= 0).all()
    assert torch.equal(label, similarities.argmax(1))


def test_margins_at_a_tie_and_at_a_labelled_sample():
    assert margin_labels(torch.tensor([[0.3, 0.7, 0.7]]))[1].item() == 0
    axes = torch.eye(4)
    label, weight = margin_labels(class_similarities(axes[2:3], axes[:3], torch.tensor([0, 0, 1]), 2))
    assert (label.item(), weight.item()) == (1, 1.0)


def test_a_class_without_a_sample_is_named():
    with pytest.raises(UsageError, match="without a labelled sample") as error:
        class_similarities(FEATURES, LABELLED, LABELS * 2, 5)
    assert "1, 3" in error.value.found
