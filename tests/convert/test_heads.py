"""Heads that grow, lose rows, take another order and are aligned."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from limbeck.convert.heads import AlignHead, ReshapeHead, alignment
from limbeck.convert.record import load_student, rebuild, save_student
from limbeck.core.errors import UsageError
from limbeck.nn.heads import head_of
from limbeck.nn.mlp import mlp

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def net(classes=5, seed=0):
    torch.manual_seed(seed)
    return mlp(4, 8, classes)


def test_rows_are_kept_in_the_order_asked_for_and_the_module_is_not_touched():
    base = net()
    before = base(X)
    chosen, record = ReshapeHead(keep=[4, 0, 2])(base)
    torch.testing.assert_close(chosen(X), before[:, [4, 0, 2]])
    assert torch.equal(base(X), before)
    assert head_of(base).out_features == 5
    assert record["classes"] == 3
    back = ReshapeHead(torch.tensor([2, 0, 1]).argsort().tolist())(ReshapeHead([2, 0, 1])(net(3))[0])[0]
    torch.testing.assert_close(back(X), net(3)(X))


def test_new_rows_follow_from_the_seed_and_may_be_non_negative():
    def rows(**fields):
        return head_of(ReshapeHead(new=200, **fields)(net())[0]).weight[5:]

    assert torch.equal(rows(seed=1), rows(seed=1))
    assert not torch.equal(rows(seed=1), rows(seed=2))
    bound = 8**-0.5
    assert rows().abs().max() <= bound
    assert rows().min() < -0.9 * bound
    assert rows(non_negative=True).min() >= 0
    assert rows(non_negative=True).max() > 0.9 * bound


def test_the_global_generator_is_not_used():
    base, state = net(), torch.get_rng_state()
    ReshapeHead(keep=[], new=2)(base)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("asked", "had", "has"), [(None, True, True), (None, False, False), (True, False, True)])
def test_the_bias_is_kept_dropped_or_added(asked, had, has):
    base = nn.Sequential(nn.Linear(4, 3, bias=had))
    grown, _ = ReshapeHead(new=1, bias=asked)(base)
    assert (grown[0].bias is not None) is has
    torch.testing.assert_close(grown(X)[:, :3], base(X))
    dropped, record = ReshapeHead(bias=False)(base)
    assert dropped[0].bias is None
    assert not record["bias"]


def test_a_model_that_is_its_own_head_and_one_that_counts_its_classes():
    grown, record = ReshapeHead(new=1)(nn.Linear(4, 3))
    assert isinstance(grown, nn.Linear)
    assert rebuild(nn.Linear(4, 3), [record])(X).shape == (50, 4)

    class Counting(nn.Module):
        num_classes = 3

        def __init__(self):
            super().__init__()
            self.fc, self.config = nn.Linear(4, 3), SimpleNamespace(num_labels=3)

    grown, _ = ReshapeHead(new=2)(Counting())
    assert grown.num_classes == grown.config.num_labels == 5


def test_structure_comes_back_from_the_records(tmp_path):
    grown, first = ReshapeHead(keep=[1, 0], new=4, bias=False)(net())
    aligned, second = AlignHead(old=2)(grown)
    save_student(tmp_path, aligned, [first, second])
    assert torch.equal(load_student(tmp_path, net(seed=1))(X), aligned(X))


@pytest.mark.parametrize("keep", [[5], [-1], []])
def test_rows_that_there_are_not(keep):
    with pytest.raises(UsageError, match="does not have these rows"):
        ReshapeHead(keep)(net())


# Alignment


def norms(module, p):
    return torch.linalg.vector_norm(head_of(module).weight, p, dim=1)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_aligned_rows_have_one_mean_norm_and_aligning_again_does_nothing(p):
    aligned, _ = AlignHead(old=2, norm=p)(net())
    assert norms(aligned, p)[2:].mean().item() == pytest.approx(norms(aligned, p)[:2].mean().item(), abs=1e-6)
    assert alignment(head_of(aligned).weight, 2, p).item() == pytest.approx(1, abs=1e-6)


def test_old_logits_stay_new_ones_are_scaled_and_order_within_each_is_kept():
    base = ReshapeHead(bias=False)(net())[0]
    with torch.no_grad():
        head_of(base).weight.abs_()
    aligned, _ = AlignHead(old=2)(base)
    before, after = base(X), aligned(X)
    assert torch.equal(after[:, :2], before[:, :2])
    gamma = alignment(head_of(base).weight, 2)
    assert not torch.isclose(gamma, torch.tensor(1.0))
    torch.testing.assert_close(after[:, 2:], gamma * before[:, 2:])
    assert torch.equal(after[:, :2].argmax(1), before[:, :2].argmax(1))
    assert torch.equal(after[:, 2:].argmax(1), before[:, 2:].argmax(1))


@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_the_length_of_new_rows_before_does_not_matter(factor):
    base = net()
    expected = AlignHead(old=3)(base)[0]
    with torch.no_grad():
        head_of(base).weight[3:] *= factor
    torch.testing.assert_close(head_of(AlignHead(old=3)(base)[0]).weight, head_of(expected).weight)


def test_the_bias_is_scaled_only_where_asked():
    base = net()
    gamma = alignment(head_of(base).weight, 2)
    assert torch.equal(head_of(AlignHead(2)(base)[0]).bias, head_of(base).bias)
    torch.testing.assert_close(AlignHead(2, bias=True)(base)[0](X)[:, 2:], gamma * base(X)[:, 2:])


def test_clamped_it_only_shortens_and_rows_of_zeros_are_left_alone():
    short = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert alignment(short, 1).item() == 5
    assert alignment(short, 1, clamp=True).item() == 1
    assert alignment(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1).item() == 1
    assert alignment(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 1).item() == 1


@pytest.mark.parametrize("old", [0, 5, 9])
def test_there_must_be_old_and_new_classes(old):
    with pytest.raises(UsageError, match="nothing to align"):
        AlignHead(old)(net())
