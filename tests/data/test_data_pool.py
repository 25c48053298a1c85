"""Choosing from a pool: the best of each class, and no copies of what is judged on."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import TensorSource
from limbeck.data.pool import near_duplicates, thumbnails, top_per_class

SCORES = torch.tensor(
    [[0.9, 0.1, 0.0], [0.8, 0.2, 0.5], [0.8, 0.9, 0.5], [0.1, 0.9, 0.1], [0.0, 0.3, 0.2], [0.7, 0.0, 0.0]]
)


def test_the_best_of_each_class_over_all_samples_ties_by_position():
    assert top_per_class(SCORES, 1).tolist() == [0, 1, 2]
    assert top_per_class(SCORES, 2).tolist() == [0, 1, 2, 3]  # 1 and 2 are among the best of two classes and count once
    assert top_per_class(SCORES, 100).tolist() == list(range(6))
    assert len(top_per_class(torch.rand(50, 4, generator=torch.Generator().manual_seed(0)), 5)) <= 20


def test_no_sample_per_class_is_refused():
    with pytest.raises(UsageError, match="1 or more"):
        top_per_class(SCORES, 0)


def test_copies_are_found_in_another_size_and_brightness():
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    big = torch.nn.functional.interpolate(x, 32, mode="bilinear")
    changed = TensorSource((0.6 * big[[3, 17]] + 0.1).round(decimals=2))
    assert near_duplicates(TensorSource(big), changed).nonzero().flatten().tolist() == [3, 17]
    assert not near_duplicates(TensorSource(big)).any()


def test_an_image_of_one_colour_is_nobodys_copy():
    flat = torch.full((2, 1, 8, 8), 0.5)
    assert thumbnails(flat).abs().sum() == 0
    assert not near_duplicates(TensorSource(flat), TensorSource(flat.clone(), ids=torch.tensor([5, 6]))).any()


def test_vectors_are_no_pictures():
    with pytest.raises(UsageError, match="only images"):
        near_duplicates(TensorSource(torch.rand(3, 8)), TensorSource(torch.rand(3, 8)))
