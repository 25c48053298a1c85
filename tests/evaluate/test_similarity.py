"""Measures of task similarity: invariances, extremes, and hand-written references."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from limbeck.core.errors import UsageError
from limbeck.evaluate.similarity import knn_accuracy, leep, linear_cka, parc, rsa


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(60) % 4
FEATURES = draw(4, 7, seed=1)[LABELS] + draw(60, 7)
FEATURE_MEASURES = [parc, rsa, linear_cka, knn_accuracy]


def test_parc_is_the_correlation_of_ranks_of_hand_written_distances():
    x = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0, correction=0)
    upper = torch.triu_indices(60, 60, 1)
    distances = (1 - torch.corrcoef(x))[*upper]
    apart = (LABELS[upper[0]] != LABELS[upper[1]]).double()
    assert parc(FEATURES, LABELS).item() == pytest.approx(100 * spearmanr(distances, apart).statistic, abs=1e-9)
    plain = (1 - torch.corrcoef(FEATURES))[*upper]
    assert rsa(FEATURES, LABELS).item() == pytest.approx(spearmanr(plain, apart).statistic, abs=1e-9)


def test_parc_ignores_scale_and_shift_of_each_feature():
    moved = FEATURES * (0.1 + draw(7, seed=2).abs()) + 5 * draw(7, seed=3)
    torch.testing.assert_close(parc(moved, LABELS), parc(FEATURES, LABELS))


@pytest.mark.parametrize("measure", [*FEATURE_MEASURES, lambda x, y: leep(x.softmax(1), y)])
def test_order_of_samples_and_names_of_classes_do_not_matter(measure):
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(measure(FEATURES[order], LABELS[order]), measure(FEATURES, LABELS))
    renamed = torch.tensor([2, 0, 9, 1])[LABELS]
    torch.testing.assert_close(measure(FEATURES, renamed), measure(FEATURES, LABELS))


def test_relabelling_leaves_the_same_bits():
    assert torch.equal(parc(FEATURES, 3 - LABELS), parc(FEATURES, LABELS))


@pytest.mark.parametrize(("measure", "best"), [(parc, 100), (rsa, 1), (linear_cka, 1), (knn_accuracy, 1), (leep, 0)])
def test_one_hot_features_of_balanced_classes_are_the_best(measure, best):
    assert measure(F.one_hot(LABELS), LABELS).item() == pytest.approx(best, abs=1e-9)


def test_noise_is_unrelated():
    labels = torch.arange(300) % 5
    noise = draw(300, 64, seed=5)
    assert abs(parc(noise, labels)) < 3
    assert abs(rsa(noise, labels)) < 0.03
    assert abs(knn_accuracy(noise, labels) - 0.2) < 0.1


def test_better_separated_classes_are_more_related():
    blurred = FEATURES + 3 * draw(60, 7, seed=6)
    for measure in FEATURE_MEASURES:
        assert measure(FEATURES, LABELS) > measure(blurred, LABELS) + 0.01


def test_components_are_a_rotation_and_their_signs_are_fixed():
    """Wide features: other signs of the decomposition would give other correlations between samples."""
    wide = FEATURES @ draw(7, 50, seed=7)
    centred = wide - wide.mean(0)
    v = torch.linalg.svd(centred, full_matrices=False).Vh
    v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    torch.testing.assert_close(parc(wide, LABELS, pca=5), parc(centred @ v[:5].T, LABELS, pca=None))
    flipped = parc(centred @ (v[:5] * torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]])).T, LABELS, pca=None)
    assert abs(flipped - parc(wide, LABELS, pca=5)) > 1e-6
    assert parc(wide[:20], LABELS[:20]).isfinite()  # fewer samples than components


def test_constant_features_say_nothing_and_break_nothing():
    dead = torch.cat([FEATURES, torch.full((60, 1), 3.0)], 1)
    assert parc(dead, LABELS).isfinite()
    assert linear_cka(torch.ones(60, 3), LABELS) == 0


def test_cka_equals_its_form_with_sample_kernels():
    centre = torch.eye(60, dtype=torch.float64) - 1 / 60
    k, target = (centre @ a @ a.T @ centre for a in (FEATURES, F.one_hot(LABELS).double()))
    expected = (k * target).sum() / (k.norm() * target.norm())
    torch.testing.assert_close(linear_cka(FEATURES, LABELS), expected)
    wide = FEATURES @ draw(7, 90, seed=8)
    k = centre @ wide @ wide.T @ centre
    torch.testing.assert_close(linear_cka(wide, LABELS), (k * target).sum() / (k.norm() * target.norm()))


def test_leep_by_loops():
    theta = FEATURES.softmax(1)
    total = 0.0
    for x, y in zip(theta, LABELS, strict=True):
        given = theta[y == LABELS].sum(0) / theta.sum(0)
        total += (given * x).sum().log().item() / 60
    assert leep(theta, LABELS).item() == pytest.approx(total)


def test_a_neighbour_is_never_the_sample_itself():
    points = torch.eye(4, dtype=torch.float64) + 0.01 * torch.tensor(
        [[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    )
    assert knn_accuracy(points, torch.tensor([0, 1, 0, 1]), k=1) == 0


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (draw(5), torch.arange(5), "do not fit"),
        (draw(5, 2), torch.arange(4), "do not fit"),
        (draw(5, 2), torch.rand(5), "do not fit"),
        (draw(5, 2), torch.zeros(5, dtype=torch.int64), "no pairs"),
        (draw(5, 2), torch.arange(5), "no pairs"),
    ],
)
@pytest.mark.parametrize("measure", [*FEATURE_MEASURES, leep])
def test_what_cannot_be_measured(measure, features, labels, words):
    with pytest.raises(UsageError, match=words):
        measure(features, labels)


def test_more_neighbours_than_samples():
    with pytest.raises(UsageError, match="neighbours"):
        knn_accuracy(draw(4, 2), torch.tensor([0, 0, 1, 1]), k=4)
