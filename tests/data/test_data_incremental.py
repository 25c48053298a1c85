"""Classes that arrive in groups, the memory of what was seen, and what is refused."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.incremental import Increments, Relabelled, class_order, group_sizes, herd


def source(*classes, start=0, each=3):
    y = torch.tensor(classes).repeat(each)
    return TensorSource(torch.arange(start, start + len(y)).float()[:, None], y)


WHOLE = Data(train=source(*range(6)), validation=source(*range(6), start=100))


def test_train_is_divided_by_classes_in_a_random_order():
    found = Increments.of(WHOLE, groups=4, seed=1993)
    assert found.order == class_order(6, 1993) != tuple(range(6))
    assert found.sizes == (2, 2, 1, 1)
    assert [found.seen(t) for t in (-1, 0, 1, 2, 3)] == [0, 2, 4, 5, 6]
    first = found.train(0, [])
    assert sorted(first.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    batch = first.batch(torch.arange(6), 0)
    originals = [found.order[place] for place in batch.y.tolist()]
    assert originals == WHOLE.train.labels[torch.isin(WHOLE.train.ids, batch.id)].tolist()


def test_an_increment_has_its_own_classes_and_what_is_remembered_and_no_more():
    found = Increments.of(WHOLE, groups=[2, 4])
    memory = [found.of_class(0).ids[:1], found.of_class(1).ids[1:]]
    later = found.train(1, memory)
    assert later.labels.bincount().tolist() == [1, 2, 3, 3, 3, 3]
    assert set(torch.cat(memory).tolist()) <= set(later.ids.tolist())


def test_it_is_judged_on_the_classes_seen():
    found = Increments.of(WHOLE, groups=3, seed=0)
    for t in range(3):
        judged = found.judged(WHOLE.validation, t)
        assert judged.batch(torch.arange(len(judged)), 0).y.bincount().tolist() == [3] * found.seen(t)


@pytest.mark.parametrize("first", ["train", "increment_0"])
def test_increments_of_their_own_come_in_their_order(first):
    data = Data(**{"increment_2": source(4, start=50), first: source(3, 1), "increment_1": source(0, 2, start=20)})
    found = Increments.of(data, groups=7)  # not looked at
    assert found.order == (1, 3, 0, 2, 4)
    assert found.sizes == (2, 2, 1)
    assert found.train(1, []).ids.tolist() == data.increment_1.ids.tolist()


def test_classes_of_the_memory_are_known_from_the_start():
    data = Data(train=source(1, 3), memory=source(2, 0, start=50, each=2))
    found = Increments.of(data, groups=2)
    assert found.order == (0, 2, 1, 3)
    assert (found.known, found.sizes, found.seen(-1), found.seen(1)) == (2, (1, 1), 2, 4)
    assert [len(ids) for ids in found.memory] == [2, 2]
    assert found.train(0, found.memory).labels.bincount().tolist() == [2, 2, 3]


def test_labels_are_places_and_names_follow():
    named = TensorSource(torch.rand(4, 2), torch.tensor([2, 0, 1, 2]), classes=["a", "b", "c"])
    relabelled = Relabelled(named, [2, 0])
    assert relabelled.labels.tolist() == [0, 1, -1, 0]
    assert relabelled.classes == ("c", "a")
    assert relabelled.batch(torch.tensor([1, 3]), 0).y.tolist() == [1, 0]
    assert relabelled.fingerprint() != Relabelled(named, [0, 2]).fingerprint()


@pytest.mark.parametrize(
    ("splits", "groups", "words"),
    [
        ({"train": source(0, 1), "increment_1": source(1, 2, start=50)}, 2, "arrived before"),
        ({"train": source(0, 1), "memory": source(1, start=50)}, 2, "arrived before"),
        ({"train": source(0, 1), "validation": source(2, start=50)}, 2, "never arrives"),
        ({"train": source(0, 2)}, 2, "no samples in any increment"),
        ({"train": source(0, 1), "increment_2": source(2, start=50)}, 2, "an increment is missing"),
        ({"increment_0": source(0), "increment_3": source(1, start=50)}, 2, "an increment is missing"),
        ({"train": source(0, 1)}, 3, "do not divide"),
        ({"train": source(0, 1)}, [1, 2], "do not divide"),
        ({"train": source(0, 1)}, [2, 0], "do not divide"),
        ({"train": TensorSource(torch.rand(4, 2))}, 2, "need labels"),
        ({"train": TensorSource(torch.rand(4, 2), torch.rand(4, 3))}, 2, "need labels"),
        ({"validation": source(0)}, 2, "needs data.train"),
    ],
)
def test_splits_that_do_not_fit(splits, groups, words):
    with pytest.raises(UsageError, match=words):
        Increments.of(Data(**splits), groups)


def test_sizes_and_orders():
    assert group_sizes(100, 10) == (10,) * 10
    assert group_sizes(7, [3, 4]) == (3, 4)
    assert class_order(4) == (0, 1, 2, 3)
    assert sorted(class_order(100, 1993)) == list(range(100))


# Herding

FEATURES = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)) + 1


def test_herding_all_is_a_permutation_and_fewer_are_a_prefix():
    chosen = herd(FEATURES, 30)
    assert sorted(chosen.tolist()) == list(range(30))
    for count in (0, 1, 7):
        assert herd(FEATURES, count).tolist() == chosen[:count].tolist()


def test_the_first_is_closest_to_the_mean_of_unit_features_and_length_does_not_matter():
    unit = torch.nn.functional.normalize(FEATURES, dim=1)
    assert herd(FEATURES, 1).item() == (unit - unit.mean(0)).norm(dim=1).argmin().item()
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    assert herd(FEATURES * lengths, 9).tolist() == herd(FEATURES, 9).tolist()


def test_the_mean_of_the_chosen_is_closer_than_that_of_random_ones_on_average():
    unit = torch.nn.functional.normalize(FEATURES, dim=1)
    draws = [torch.randperm(30, generator=torch.Generator().manual_seed(k))[:10] for k in range(50)]
    chosen, *drawn = ((unit[rows].mean(0) - unit.mean(0)).norm() for rows in (herd(FEATURES, 10), *draws))
    assert chosen < torch.stack(drawn).mean()
