"""Class moments from batches, and the principal subspaces of classes outside of what a readout sees."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.nn.subspace import ClassMoments, class_subspaces, principal, rotations, row_space


def generator(seed):
    return torch.Generator().manual_seed(seed)


def sample(count=200, dim=12, seed=0):
    """Embeddings of two classes, each with its own covariance, and a readout."""
    g = generator(seed)
    y = torch.arange(count) % 2
    mix = torch.randn(2, dim, dim, generator=g, dtype=torch.float64)
    h = torch.einsum("nd,nde->ne", torch.randn(count, dim, generator=g, dtype=torch.float64), mix[y]) + 5 * y[:, None]
    return h, y, torch.randn(2, dim, generator=g, dtype=torch.float64)


def moments_of(h, y, batch=7):
    moments = ClassMoments(2, h.shape[1])
    for rows in torch.arange(len(h)).split(batch):
        moments.add(h[rows], y[rows])
    return moments


H, Y, W = sample()


def test_moments_of_batches_are_those_of_the_whole():
    moments = moments_of(H, Y)
    for c in range(2):
        part = H[c == Y]
        torch.testing.assert_close(moments.means[c], part.mean(0))
        torch.testing.assert_close(moments.covariances[c], part.T.cov(correction=0))
    assert moments.counts.tolist() == [100, 100]


def test_moments_do_not_cancel_far_from_the_origin():
    x = 1e6 + torch.randn(500, 1, generator=generator(1))
    moments = ClassMoments(1, 1)
    for part in x.split(50):
        moments.add(part, torch.zeros(len(part), dtype=torch.int64))
    torch.testing.assert_close(moments.covariances[0, 0, 0], x.double().var(correction=0))


def test_directions_are_orthonormal_and_unseen_by_the_readout():
    found = class_subspaces(moments_of(H, Y), 4, W, generator(2))
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    torch.testing.assert_close(found.directions @ found.directions.mT, eye, atol=1e-12, rtol=0)
    assert (found.directions @ W.T).abs().max() < 1e-9
    q = row_space(W)
    projected = H - H @ q @ q.T
    assert (projected @ W.T).abs().max() < 1e-9


def test_a_rotation_stays_in_the_span_and_keeps_its_variance():
    plain, turned = (class_subspaces(moments_of(H, Y), 4, W, g) for g in (None, generator(3)))
    for found in (plain, turned):
        z = torch.einsum("csd,nd->ncs", found.directions, H)
        spread = torch.stack([z[c == Y, c].var(0, correction=0) for c in range(2)])
        torch.testing.assert_close(found.variances, spread)
    assert not torch.allclose(plain.directions, turned.directions)
    spans = [f.directions.mT @ f.directions for f in (plain, turned)]
    torch.testing.assert_close(*spans)
    torch.testing.assert_close(plain.variances.sum(1), turned.variances.sum(1))
    torch.testing.assert_close(plain.share, turned.share)


def test_no_other_directions_outside_of_the_readout_hold_more():
    found = class_subspaces(moments_of(H, Y), 3, W)
    q = row_space(W)
    for c in range(2):
        part = H[c == Y] - H[c == Y] @ q @ q.T
        values = torch.linalg.svdvals(part - part.mean(0)) ** 2 / len(part)
        torch.testing.assert_close(found.variances[c], values[:3])
        torch.testing.assert_close(found.share[c], values[:3].sum() / values.sum())


def test_signs_do_not_depend_on_the_solver():
    covariance = torch.stack([H[c == Y].T.cov() for c in range(2)])
    _, directions = principal(covariance, 5)
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()
    flipped = torch.diag(torch.tensor([-1.0] + [1.0] * 11, dtype=torch.float64))
    _, mirrored = principal(flipped @ covariance @ flipped, 5)
    one, other = (d @ flipped if i else d for i, d in enumerate((directions, mirrored)))
    torch.testing.assert_close(one.abs(), other.abs())


def test_the_same_seed_gives_the_same_bits():
    one, other = (class_subspaces(moments_of(H, Y), 4, W, generator(5)) for _ in range(2))
    assert torch.equal(one.directions, other.directions)


def test_rotations_have_no_preferred_direction():
    turns = rotations(4000, 3, generator(6))
    assert turns.mean(0).abs().max() < 0.05
    assert ((turns**2).mean(0) - 1 / 3).abs().max() < 0.03


def test_the_row_space_of_dependent_rows_is_smaller():
    weight = torch.randn(3, 8, generator=generator(7), dtype=torch.float64)
    weight[2] = weight[0] - weight[1]
    assert row_space(weight).shape == (8, 2)


def test_too_few_samples_are_refused_by_class():
    with pytest.raises(UsageError, match="too few samples") as error:
        class_subspaces(moments_of(H[:5], Y[:5]), 2)
    assert (error.value.where, error.value.found) == ("class 1", "2 samples")


def test_too_few_directions_are_refused_by_class():
    h = H.clone()
    h[Y == 1, 3:] = 0
    with pytest.raises(UsageError, match="too few directions") as error:
        class_subspaces(moments_of(h, Y), 4)
    assert error.value.where == "class 1"
    assert error.value.found.startswith("3 directions")
