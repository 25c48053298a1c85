"""NT-Xent: golden values, and that it is the cross-entropy over the other views."""

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import UsageError
from limbeck.losses import info_nce, nt_xent


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_it_is_the_cross_entropy_over_all_other_views(tau):
    one, other = draw(5, 3), draw(5, 3, seed=1)
    z = F.normalize(torch.cat([one, other]), dim=1)
    expected = []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        logits = (z[i] @ z[others].T / tau)[None]
        expected.append(F.cross_entropy(logits, torch.tensor([others.index((i + 5) % 10)])))
    found = nt_xent(one, other, temperature=tau, reduction="none")
    torch.testing.assert_close(found, torch.stack(expected).view(2, 5).mean(0))
    torch.testing.assert_close(nt_xent(one, other, temperature=tau), torch.stack(expected).mean())


def test_golden_values():
    eye = torch.eye(8, dtype=torch.float64)
    assert nt_xent(eye[:4], eye[4:]).item() == pytest.approx(math.log(7), abs=1e-12)  # all orthogonal
    same = nt_xent(eye[:4], eye[:4], temperature=0.5).item()
    assert same == pytest.approx(math.log(math.exp(2) + 6) - 2, abs=1e-12)
    assert same == pytest.approx(0.59444, abs=1e-5)
    assert nt_xent(torch.ones(7, 3), torch.ones(7, 3), temperature=0.3).item() == pytest.approx(2.5649, abs=1e-4)


def test_length_and_rotation_do_not_count():
    one, other = draw(5, 3), draw(5, 3, seed=1)
    rotation = torch.linalg.qr(draw(3, 3, seed=2)).Q
    lengths = draw(5, 1, seed=3).abs() + 0.1
    torch.testing.assert_close(nt_xent(lengths * one @ rotation, other @ rotation), nt_xent(one, other))
    torch.testing.assert_close(nt_xent(other, one), nt_xent(one, other))


def test_with_own_side_far_away_it_is_info_nce():
    """At low temperature only near views count; where those of the own side are far, both losses are one."""
    one, other = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64) + 0.2
    both = (info_nce(one, other, temperature=0.02) + info_nce(other, one, temperature=0.02)) / 2
    torch.testing.assert_close(nt_xent(one, other, temperature=0.02), both, rtol=0, atol=1e-2)


def test_low_temperature_in_half_precision_does_not_overflow():
    one = draw(4, 3).half().requires_grad_()
    loss = nt_xent(one, draw(4, 3, seed=1).half(), temperature=0.001)
    loss.backward()
    assert loss.isfinite()
    assert one.grad.isfinite().all()


def test_a_zero_embedding_gets_no_gradient():
    one = draw(3, 2).index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    nt_xent(one, draw(3, 2, seed=1)).backward()
    assert one.grad[1].tolist() == [0.0, 0.0]
    assert one.grad.isfinite().all()


@pytest.mark.parametrize(
    ("one", "other", "temperature"),
    [((3, 2), (4, 2), 0.5), ((3, 2), (3, 4), 0.5), ((3, 2, 2), (3, 2, 2), 0.5), ((3, 2), (3, 2), 0.0)],
)
def test_what_it_refuses(one, other, temperature):
    with pytest.raises(UsageError):
        nt_xent(draw(*one), draw(*other), temperature=temperature)
