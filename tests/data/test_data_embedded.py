import pytest
import torch
from torch import nn

from limbeck.data import load_data
from limbeck.data.procedural import superclasses


@pytest.mark.parametrize(
    ("name", "count", "shape", "classes"),
    [
        ("digits", 1797, (1, 8, 8), 10),
        ("iris", 150, (4,), 3),
        ("wine", 178, (13,), 3),
        ("breast_cancer", 569, (30,), 2),
    ],
)
def test_embedded_sets(name, count, shape, classes):
    pytest.importorskip("sklearn")
    data = load_data(name)
    assert list(data) == ["train", "validation", "test"]
    assert sum(len(s) for _, s in data.items()) == count
    assert data.num_classes == classes
    ids = torch.cat([s.ids for _, s in data.items()])
    assert ids.unique().numel() == count
    for _, source in data.items():
        assert source.labels.unique().numel() == classes
        assert source.batch(torch.tensor([0]), 0).x.shape == (1, *shape)
    assert (
        data.train.fingerprint() == load_data(name).train.fingerprint() != load_data(name, seed=1).train.fingerprint()
    )


def test_tables_are_standardised_by_the_training_split():
    pytest.importorskip("sklearn")
    x = load_data("wine").train.x
    assert torch.allclose(x.mean(0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(x.std(0), torch.ones(13), atol=1e-5)


def test_superclasses_are_drawn_from_the_seed():
    one, again, other = superclasses(3), superclasses(3), superclasses(4)
    assert torch.equal(one.test.x, again.test.x)
    assert not torch.equal(one.test.x, other.test.x)
    assert {len(s) for _, s in one.items()} == {2400}
    assert not set(one.train.ids.tolist()) & set(one.test.ids.tolist())
    assert torch.equal(load_data("superclasses", seed=3).train.x, one.train.x)


def test_superclasses_carry_ranking():
    data = superclasses(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 128), nn.ReLU(), nn.Linear(128, 40))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(8):
        for rows in torch.randperm(2400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.train.x[rows]), data.train.y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        scores = net(data.test.x)
    assert (scores.argmax(1) == data.test.y).float().mean() > 0.8
    second = scores.scatter(1, data.test.y[:, None], -1e9).argmax(1)  # the best wrong class
    assert (second // 5 == data.test.y // 5).float().mean() > 0.5  # 4 of 39 by chance
