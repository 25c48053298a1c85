"""Sources made of two, and data given as unlabelled."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import Concatenated, Data, Paired, TensorSource, load_data, together
from limbeck.data.combine import check_unlabelled


def source(start, size, labels=True):
    x = torch.arange(start, start + size).float()[:, None]
    return TensorSource(x, torch.arange(size) % 2 if labels else None)


def test_concatenated_keeps_order_ids_and_common_fields():
    a, b = source(0, 3), source(2, 4)  # 2 is in both
    both = Concatenated(a, b)
    assert len(both) == 6
    rows = torch.tensor([5, 0, 3, 2])
    batch = both.batch(rows, 0)
    assert batch.x.flatten().tolist() == [5.0, 0.0, 3.0, 2.0]
    assert batch.id.tolist() == both.ids[rows].tolist()
    assert batch.y.tolist() == both.labels[rows].tolist() == [1, 0, 1, 0]
    assert "y" not in Concatenated(a, source(5, 2, labels=False)).batch(torch.tensor([0]), 0)
    assert both.fingerprint() != Concatenated(b, a).fingerprint()


@pytest.mark.parametrize(("few", "many"), [(3, 10), (10, 3), (4, 4)])
def test_pairs_pass_over_the_larger_source_once_and_over_the_smaller_one_evenly(few, many):
    pairs = Paired(source(0, few), source(100, many, labels=False))
    size = max(few, many)
    assert len(pairs) == size
    batch = pairs.batch(torch.randperm(size, generator=torch.Generator().manual_seed(0)), view=2)
    for x, count in ((batch.x, few), (batch.unlabelled["x"], many)):
        times = x.flatten().unique(return_counts=True)[1]
        assert len(times) == count
        assert times.max() - times.min() <= 1


def test_a_pair_is_a_function_of_row_and_view():
    pairs = Paired(source(0, 5), source(100, 12, labels=False))
    whole, part = pairs.batch(torch.arange(12), 3), pairs.batch(torch.tensor([7, 2]), 3)
    assert part.x.tolist() == whole.x[[7, 2]].tolist()
    assert not torch.equal(pairs.batch(torch.arange(12), 4).x, whole.x)
    other = Paired(pairs.labelled, pairs.unlabelled, seed=1)
    assert not torch.equal(other.batch(torch.arange(12), 3).x, whole.x)
    assert other.fingerprint() != pairs.fingerprint()


def test_pairs_split_into_micro_batches():
    batch = Paired(source(0, 8), source(100, 8, labels=False)).batch(torch.arange(8), 0)
    parts = list(batch.split(2))
    assert torch.equal(torch.cat([p.unlabelled["x"] for p in parts]), batch.unlabelled["x"])
    x, labelled = together(parts[0])
    assert x.shape == (8, 1)
    assert labelled == 4


def test_token_ids_of_two_lengths_are_padded():
    tokens = lambda n: {"input_ids": torch.ones(2, n, dtype=torch.int64)}  # noqa: E731
    pairs = Paired(TensorSource(tokens(3), torch.tensor([0, 1])), TensorSource(tokens(5), ids=torch.tensor([8, 9])))
    x, _ = together(pairs.batch(torch.arange(2), 0))
    assert x["input_ids"].sum(1).tolist() == [3, 3, 5, 5]


def test_unlabelled_data_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("u,v,label\n" + "".join(f"{i},{i},{i % 2}\n" for i in range(40)))
    (tmp_path / "b.csv").write_text("u,v\n" + "".join(f"{i},{-i}\n" for i in range(30)))
    data = load_data(tmp_path / "a.csv", unlabelled=str(tmp_path / "b.csv"))
    assert list(data) == ["train", "validation", "test", "unlabelled"]
    assert len(data.unlabelled) == 30
    assert data.unlabelled.labels is None
    check_unlabelled(data.unlabelled)
    with pytest.raises(UsageError, match="have labels"):
        check_unlabelled(load_data(tmp_path / "a.csv", unlabelled=str(tmp_path / "a.csv")).unlabelled)


def test_a_method_that_needs_a_split_names_it():
    with pytest.raises(UsageError, match=r"needs data.unlabelled; there are: train"):
        _ = Data(train=source(0, 3)).unlabelled
