import pickle
import random
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from limbeck.core.errors import UsageError
from limbeck.core.source import Source
from limbeck.data import Data, DatasetSource, TensorSource, batches


def rows(*values):
    return torch.tensor(values)


class Mappings(Dataset):
    """Items in the form of Hugging Face data sets."""

    def __init__(self, count=6):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return {"pixel_values": torch.full((2,), float(row)), "label": row % 3, "note": f"row {row}"}


class Encoded(Dataset):
    """Items in the form of a tokenizer's output, of different lengths."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return {"input_ids": [1] * (row + 1), "attention_mask": [1] * (row + 1), "labels": row % 2}


class Noisy(Dataset):
    """Draws from every global generator when an item is read."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return torch.tensor([row, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64), row % 2  # noqa: NPY002


def test_tensor_source_is_a_source_and_selects_rows():
    x, y = torch.rand(5, 3), torch.tensor([0, 1, 2, 1, 0])
    source = TensorSource(x, y)
    assert isinstance(source, Source)
    batch = source.batch(rows(4, 1), view=3)
    assert torch.equal(batch.x, x[[4, 1]])
    assert batch.y.tolist() == [0, 1]
    assert torch.equal(batch.id, source.ids[[4, 1]])
    assert batch.view.tolist() == [3, 3]
    assert "y" not in TensorSource(x).batch(rows(0), 0)


def test_tensor_source_takes_mappings_tuples_and_arrays():
    ids, mask = torch.arange(6).view(3, 2), torch.ones(3, 2)
    batch = TensorSource({"input_ids": ids, "attention_mask": mask}).batch(rows(2), 0)
    assert batch.x["input_ids"].tolist() == [[4, 5]]
    assert TensorSource((ids, mask)).batch(rows(1), 0).x[0].tolist() == [[2, 3]]
    assert TensorSource(np.eye(3), np.arange(3)).batch(rows(1), 0).y.tolist() == [1]


def test_ids_survive_shuffling_and_subsets():
    x = torch.rand(20, 4)
    source, order = TensorSource(x), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TensorSource(x[order]).ids, source.ids[order])
    part = source.subset(order).subset([3, 5])
    assert torch.equal(part.ids, source.ids[order[[3, 5]]])
    assert torch.equal(part.batch(rows(1), 0).x, x[order[5:6]])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.flip(0), y),
        lambda x, y: (x, y.flip(0)),
        lambda x, y: (x[:-1], y[:-1]),
        lambda x, y: (x + (torch.arange(len(x)) == 7)[:, None] * 1e-6, y),
    ],
)
def test_fingerprint_changes_with_any_sample(change):
    x, y = torch.rand(10, 3), torch.arange(10)
    same, other = TensorSource(x.clone(), y.clone()), TensorSource(*change(x, y))
    assert TensorSource(x, y).fingerprint() == same.fingerprint() != other.fingerprint()


def test_subset_knows_the_classes_of_the_whole():
    part = TensorSource(torch.rand(4, 2), torch.tensor([0, 1, 2, 2])).subset([0, 1])
    assert part.num_classes == 3
    assert part.labels.tolist() == [0, 1]
    assert part.fingerprint() != part.source.subset([1, 0]).fingerprint()
    with pytest.raises(UsageError, match="more than once"):
        part.subset([0, 0])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(3, 2), torch.arange(4), "different lengths"),
        (torch.rand(0, 2), None, "no samples"),
        (torch.tensor([[1.0], [float("nan")]]), None, "the first is row 1"),
        (torch.tensor([[float("inf")], [1.0]]), None, "NaN or infinite"),
        (torch.rand(2, 2), torch.tensor([0.5, float("nan")]), "NaN or infinite"),
        (torch.rand(3, 2), torch.tensor([0, -1, 2]), "-1 in row 1"),
    ],
)
def test_bad_tensors_are_refused(x, y, message):
    with pytest.raises(UsageError, match=message):
        TensorSource(x, y)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(UsageError, match=r"(?s)5 in row 1.*0 to 1"):
        TensorSource(torch.rand(2, 2), torch.tensor([0, 5]), classes=["a", "b"])
    data = Data(train=TensorSource(torch.rand(2, 2), torch.tensor([0, 7])))
    with pytest.raises(UsageError, match=r"(?s)data\.train\.y.*7 in row 1.*0 to 4"):
        data.check(num_classes=5)


def test_batch_costs_little_beyond_the_selection():
    x = torch.rand(2000, 64)
    source, picked = TensorSource(x, torch.arange(2000) % 10), torch.randint(0, 2000, (64,))

    def seconds(call):
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                call()
            best = min(best, (time.perf_counter() - start) / 50)
        return best

    extra = seconds(lambda: source.batch(picked, 0)) - seconds(lambda: x.index_select(0, picked))
    assert extra < 50e-6


def test_dataset_items_of_all_forms():
    pairs = DatasetSource(TensorDataset(torch.arange(6.0), torch.arange(6) % 2))
    assert pairs.batch(rows(5, 0), 0).x.tolist() == [5.0, 0.0]
    assert pairs.num_classes == 2
    assert DatasetSource(TensorDataset(torch.arange(6.0))).batch(rows(3), 0).x.tolist() == [3.0]
    batch = DatasetSource(Mappings()).batch(rows(1, 2), 0)
    assert batch.x.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert batch.y.tolist() == [1, 2]
    bare = DatasetSource(torch.arange(4.0))
    assert bare.batch(rows(2), 0).x.tolist() == [2.0]


def test_tokenizer_output_needs_a_collate_function():
    with pytest.raises(UsageError, match="collate"):
        DatasetSource(Encoded()).batch(rows(0, 1), 0)

    def padded(items):
        longest = max(len(i["input_ids"]) for i in items)
        names = ("input_ids", "attention_mask")
        filled = {k: torch.tensor([i[k] + [0] * (longest - len(i[k])) for i in items]) for k in names}
        return filled | {"labels": torch.tensor([i["labels"] for i in items])}

    batch = DatasetSource(Encoded(), collate=padded).batch(rows(0, 2), 0)
    assert batch.x["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.y.tolist() == [0, 0]


def test_items_that_are_not_understood():
    triple = TensorDataset(torch.rand(3), torch.rand(3), torch.rand(3))
    with pytest.raises(UsageError, match="3 values"):
        DatasetSource(triple).batch(rows(0), 0)
    with pytest.raises(UsageError, match="no samples"):
        DatasetSource(TensorDataset(torch.rand(0)))


def test_transform_gets_the_input_only():
    source = DatasetSource(TensorDataset(torch.arange(4.0), torch.arange(4)), transform=lambda x: -x)
    batch = source.batch(rows(2, 3), 0)
    assert batch.x.tolist() == [-2.0, -3.0]
    assert batch.y.tolist() == [2, 3]
    assert source.views == 0
    assert DatasetSource(TensorDataset(torch.rand(4))).views == 1


def test_a_sample_is_a_function_of_id_view_and_seed():
    source = DatasetSource(Noisy(), views=0)
    whole = source.batch(torch.arange(12), view=4)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    assert torch.equal(source.batch(rows(7, 3), view=4).x, whole.x[[7, 3]])
    assert torch.equal(source.subset([5, 7]).batch(rows(1), view=4).x, whole.x[[7]])
    assert not (source.batch(torch.arange(12), view=5).x[:, 1:] == whole.x[:, 1:]).any()
    assert not (DatasetSource(Noisy(), views=0, seed=9).batch(torch.arange(12), 4).x[:, 1:] == whole.x[:, 1:]).any()
    assert whole.x[:, 1:].unique().numel() == 36


def test_reading_leaves_the_global_generators_alone():
    source = DatasetSource(Noisy(), views=0)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    expected = (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    source.batch(torch.arange(4), 0)
    next(batches(source, [(torch.arange(2), 0)], workers=1))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected  # noqa: NPY002


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches_in_order(workers):
    source = DatasetSource(Noisy(), views=0)
    plan = [(torch.randperm(12, generator=torch.Generator().manual_seed(k))[:5], k) for k in range(7)]
    here, there = list(batches(source, plan)), list(batches(source, iter(plan), workers=workers))
    assert len(here) == len(there) == 7
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(a.fields()[k], b.fields()[k]) for k in ("x", "y", "id", "view"))


def test_endless_plan_with_workers_can_be_left():
    def plan():
        while True:
            yield rows(0, 1), 0

    found = batches(DatasetSource(Noisy()), plan(), workers=1)
    assert [len(next(found)) for _ in range(3)] == [2, 2, 2]
    found.close()


def test_a_worker_s_error_arrives_as_it_was_raised():
    class Broken(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, row):
            raise UsageError("an image cannot be read", where="cat.png", fix="repair it")

    source = DatasetSource(Broken(), ids=torch.arange(2))
    for workers in (0, 1):
        with pytest.raises(UsageError) as caught:
            list(batches(source, [(rows(0), 0)], workers=workers))
        assert str(caught.value) == "an image cannot be read\n  where: cat.png\n  fix: repair it"
        assert caught.value.fix == "repair it"


def test_dataset_ids_and_fingerprints():
    data = TensorDataset(torch.rand(6, 2), torch.arange(6))
    part = Subset(data, [4, 1])
    assert torch.equal(DatasetSource(part).ids, DatasetSource(data).ids[[4, 1]])
    assert DatasetSource(part).labels.tolist() == [4, 1]
    assert not set(DatasetSource(Mappings(6)).ids.tolist()) & set(DatasetSource(Mappings(7)).ids.tolist())
    assert DatasetSource(Mappings()).fingerprint() == DatasetSource(Mappings()).fingerprint()
    assert DatasetSource(Noisy()).fingerprint() == DatasetSource(Noisy()).fingerprint()
    assert torch.equal(DatasetSource(Mappings()).ids, DatasetSource(Mappings()).ids)

    def half(x):
        return x / 2

    prints = [DatasetSource(data, t, seed=s).fingerprint() for t, s in [(None, 0), (half, 0), (half, 1)]]
    assert len(set(prints)) == 3
    assert DatasetSource(data, half).fingerprint() == prints[1]


def test_sources_travel_to_other_processes():
    source = pickle.loads(pickle.dumps(TensorSource(torch.rand(4, 2), torch.arange(4)).subset([1, 2])))
    assert len(source) == 2
    assert source.batch(rows(0), 0).y.tolist() == [1]


def test_split_by_id_is_stable_and_disjoint():
    x = torch.arange(2000.0)
    data = Data.split(TensorSource(x), {"train": 0.8, "validation": 0.1, "test": 0.1})
    parts = {name: set(source.ids.tolist()) for name, source in data.items()}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 2000
    assert 150 < len(parts["test"]) < 250
    # Samples that are added or reordered move none of the others.
    more = Data.split(
        TensorSource(torch.cat([torch.arange(5000.0, 6000.0), x.flip(0)])),
        {"train": 0.8, "validation": 0.1, "test": 0.1},
    )
    assert parts["test"] == set(more.test.ids.tolist()) & set(TensorSource(x).ids.tolist())
    other = Data.split(TensorSource(x), seed=1)
    assert set(other.test.ids.tolist()) != parts["test"]


def test_data_names_what_is_missing():
    data = Data(train=TensorSource(torch.rand(2, 1)), test=TensorSource(torch.rand(2, 1)), other=None)
    assert list(data) == ["train", "test"]
    assert data["test"] is data.test
    assert data.get("validation") is None
    with pytest.raises(UsageError, match=r"the method needs data\.unlabelled; there are: train, test"):
        data.unlabelled  # noqa: B018
    with pytest.raises(UsageError, match=r"(?s)data\.train.*found: int"):
        Data(train=3)
    with pytest.raises(UsageError, match="no data"):
        Data()
    assert list(pickle.loads(pickle.dumps(data))) == ["train", "test"]


@pytest.mark.parametrize("shares", [{"train": 0.5}, {"train": 1.0, "test": 0.0}, {"a": 0.7, "b": 0.7}])
def test_shares_must_be_a_division(shares):
    with pytest.raises(UsageError, match="division"):
        Data.split(TensorSource(torch.rand(10)), shares)


def test_too_few_samples_to_divide():
    with pytest.raises(UsageError, match="would be empty"):
        Data.split(TensorSource(torch.rand(2)))
