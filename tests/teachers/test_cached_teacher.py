import copy

import pytest
import torch
from store_programs import Points, net
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.teachers import Cached, Ensemble, MissingOutput, collect


@pytest.fixture
def pair(tmp_path):
    """Data, a teacher's role, and the role that stands in for it."""
    data, teacher = Points(), net()
    store = collect(teacher, data, tmp_path, dtype="fp32", layers=["2", "2.1", "0"], shard_bytes=700)
    roles = Roles(teacher=teacher, cached=Cached(store))
    roles.freeze("teacher", "cached")
    return data, roles


def test_the_role_answers_like_the_teacher(pair):
    data, m = pair
    for view in (0, 1):
        batch = data.batch(torch.tensor([8, 2, 44]), view)
        torch.testing.assert_close(m.cached(batch), m.teacher(batch))
        assert not m.cached(batch).requires_grad


def test_features_are_found_by_the_same_paths(pair):
    data, m = pair
    batch = data.batch(torch.tensor([8, 2, 44]), 1)
    logits, taps = m.cached.features(batch, "2.1", "0")
    expected, wanted = m.teacher.features(batch, "2.1", "0")
    torch.testing.assert_close(logits, expected)
    assert list(taps) == ["0", "2.1"] or set(taps) == {"0", "2.1"}
    for path, tap in wanted.items():
        torch.testing.assert_close(taps[path], tap)
    with pytest.raises(UsageError, match="no such module"):
        m.cached.features(batch, "4")


def test_only_what_is_asked_for_is_read(pair, monkeypatch):
    data, m = pair
    asked = []
    store = m.cached.module.store
    read = store.read
    monkeypatch.setattr(store, "read", lambda *a, layers: asked.append(layers) or read(*a, layers=layers))
    m.cached(data.batch(torch.arange(3), 0))
    m.cached.features(data.batch(torch.arange(3), 0), "2")
    assert asked == [["output"], ["output", "2"]]


def test_outputs_have_the_teachers_dtype(tmp_path):
    data = Points()
    data.x = data.x.double()
    cached = Cached(collect(net().double(), data, tmp_path, dtype="bf16", top_k=2))
    assert cached(data.batch(torch.arange(3), 0)).dtype == torch.float64


def test_top_k_comes_as_dense_logits(tmp_path):
    data, teacher = Points(), net(30)
    cached = Cached(collect(teacher, data, tmp_path, dtype="fp32", top_k=4))
    batch = data.batch(torch.arange(20), 1)
    p, q = teacher.eval()(batch.x).softmax(-1), cached(batch).softmax(-1)
    assert q.shape == p.shape
    top = p.topk(4).indices
    torch.testing.assert_close(q.gather(1, top), p.gather(1, top))


def test_it_has_no_state_and_is_copied_without_its_files(pair):
    data, m = pair
    twin = copy.deepcopy(m.cached.module)
    batch = data.batch(torch.arange(3), 0)
    assert torch.equal(twin(batch), m.cached(batch))
    assert not m.cached.state_dict()
    assert twin.store is not m.cached.module.store


def test_training_on_stored_outputs_equals_training_on_the_teacher(pair):
    data, m = pair
    ends = []
    for teacher in (m.teacher, m.cached):
        torch.manual_seed(1)
        student = nn.Linear(5, 6)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(10):
            batch = data.batch(torch.arange(step, step + 8), step % 2)
            loss = (student(batch.x) - teacher(batch)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(student.weight)
    torch.testing.assert_close(*ends)


def test_a_batch_without_views_is_view_0(pair):
    data, m = pair
    batch = data.batch(torch.arange(4), 0)
    plain = Batch(x=batch.x, id=batch.id)
    assert torch.equal(m.cached(plain), m.cached(batch))


def test_other_calls_are_refused(pair):
    data, m = pair
    with pytest.raises(
        UsageError, match=r"whole batch(.|\n)*where: cached(.|\n)*found: Tensor(.|\n)*m.cached\(batch\)"
    ):
        m.cached(data.x)
    with pytest.raises(UsageError, match="whole batch"):
        m.cached.features(data.x, "2")
    with pytest.raises(MissingOutput, match="view 5"):
        m.cached(data.batch(torch.arange(2), 5))


def test_an_ensemble_may_have_stored_members(pair):
    data, m = pair
    other = net()
    batch = data.batch(torch.arange(6), 1)
    both = Role("teacher", Ensemble([m.cached.module, other], average="logits"))
    torch.testing.assert_close(both(batch), (m.teacher(batch) + other(batch.x)) / 2)
    with pytest.raises(UsageError, match="whole batch"):
        both(batch.x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_outputs_come_to_the_device_of_the_batch(pair):
    data, m = pair
    batch = data.batch(torch.arange(6), 1)
    found = m.cached(batch.to("cuda"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), m.cached(batch))
