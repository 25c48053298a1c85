import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_programs import Points, net
from torch import nn

from limbeck.core.errors import RunError, UsageError
from limbeck.core.roles import Role
from limbeck.teachers import MissingOutput, OutputStore, TopK, collect

NO_LIMIT = 2**27


def direct(teacher, data, rows, view, *layers):
    role = Role("teacher", teacher.eval())
    with torch.no_grad():
        return role.features(data.batch(rows, view), *layers)


@pytest.mark.parametrize("shard_bytes", [NO_LIMIT, 300, 1])
def test_what_is_read_is_what_the_teacher_says(tmp_path, shard_bytes):
    data, teacher = Points(), net()
    store = collect(teacher, data, tmp_path, batch_size=8, dtype="fp32", layers=["2", "2.1"], shard_bytes=shard_bytes)
    assert len(store) == 100
    rows = torch.tensor([49, 0, 3, 3, 17, 8])
    for view in (0, 1):
        found = store.read(data.ids[rows], torch.full_like(rows, view))
        logits, taps = direct(teacher, data, rows, view, "2", "2.1")
        torch.testing.assert_close(found["output"], logits)
        torch.testing.assert_close(found["2"], taps["2"])
        torch.testing.assert_close(found["2.1"], taps["2.1"])


def test_views_may_differ_in_one_batch(tmp_path):
    data, teacher = Points(), net()
    store = collect(teacher, data, tmp_path, batch_size=8, dtype="fp32", shard_bytes=500)
    rows, views = torch.tensor([4, 4, 30]), torch.tensor([1, 0, 1])
    found = store.read(data.ids[rows], views)["output"]
    for i in range(3):
        torch.testing.assert_close(found[i], direct(teacher, data, rows[i : i + 1], int(views[i]))[0][0])


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precision(tmp_path, dtype, kind):
    data, teacher = Points(), net()
    store = collect(teacher, data, tmp_path, batch_size=50, dtype=dtype)
    exact = direct(teacher, data, torch.arange(50), 0)[0]
    found = store.read(data.ids)["output"]
    assert found.dtype == kind
    assert torch.equal(found, exact.to(kind))


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(tmp_path):
    data, teacher = Points(), net(40)
    store = collect(teacher, data, tmp_path, top_k=3, dtype="fp32")
    exact = direct(teacher, data, torch.arange(50), 1)[0]
    top = store.read(data.ids, 1)["output"]
    values, indices = exact.topk(3)
    torch.testing.assert_close(top.values, values)
    assert torch.equal(top.indices.long(), indices)
    assert top.indices.dtype == torch.int16
    total = torch.logaddexp(top.values.logsumexp(-1), top.rest)
    torch.testing.assert_close(total, exact.logsumexp(-1))
    p, q = exact.softmax(-1), top.dense().softmax(-1)
    torch.testing.assert_close(q.gather(1, indices), p.gather(1, indices))
    tail = q.scatter(1, indices, 0)
    torch.testing.assert_close(tail.sum(1), 1 - p.gather(1, indices).sum(1))
    assert torch.allclose(tail.amax(1), tail.sum(1) / 37)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_top_k_of_all_classes_is_everything(shape):
    logits = torch.randn(shape)
    torch.testing.assert_close(TopK.of(logits, 6).dense(), logits)
    assert TopK.of(logits, 6).rest.isneginf().all()


def test_the_kl_of_top_k_to_the_teacher_falls_with_k():
    logits = 3 * torch.randn(200, 50, dtype=torch.float64)
    p = logits.log_softmax(-1)
    gaps = [
        torch.nn.functional.kl_div(
            TopK.of(logits, k).dense().log_softmax(-1), p, log_target=True, reduction="batchmean"
        )
        for k in (1, 5, 20, 49, 50)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[3] < 1e-6  # a tail of one class is known


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = net().train()
    teacher[2].eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    collect(teacher, Points(), tmp_path)
    assert teacher.training
    assert teacher[3].training
    assert not teacher[2][0].training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_roles_preprocessing_is_applied(tmp_path):
    data = Points()
    store = collect(Role("teacher", nn.Identity(), lambda x: x + 1), data, tmp_path, dtype="fp32")
    assert torch.equal(store.read(data.ids)["output"], data.x + 1)


def test_progress_counts_samples_and_starts_with_what_is_there(tmp_path):
    calls = []
    collect(net(), Points(views=2), tmp_path, batch_size=40, views=1)
    collect(net(), Points(views=2), tmp_path, batch_size=40, progress=lambda *a: calls.append(a))
    assert calls == [(90, 100), (100, 100)]


def test_a_finished_store_is_not_touched(tmp_path):
    collect(net(), Points(), tmp_path, batch_size=10, shard_bytes=700)
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert len(before) > 3

    class Never(nn.Sequential):
        def forward(self, x):
            raise AssertionError("the teacher was called")

    teacher = net()
    teacher.forward = Never().forward
    assert len(collect(teacher, Points(), tmp_path, batch_size=10, shard_bytes=700)) == 100
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_only_what_a_deleted_shard_held_is_computed_again(tmp_path):
    data, calls = Points(), []
    collect(net(), data, tmp_path, batch_size=10, dtype="fp32", shard_bytes=700)
    shards = sorted(tmp_path.glob("shard-*"))
    shards[1].unlink()
    store = collect(
        net(), data, tmp_path, batch_size=10, dtype="fp32", shard_bytes=700, progress=lambda *a: calls.append(a)
    )
    assert 0 < len(calls) < 5
    assert len(store) == 100
    torch.testing.assert_close(store.read(data.ids)["output"], direct(net(), data, torch.arange(50), 0)[0])


class Wide(Points):
    """20 MB of outputs."""

    def __init__(self):
        super().__init__(1000, views=1, dim=5000)


READER = """
import sys, torch
from limbeck.teachers.store import OutputStore

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

ids = torch.load(sys.argv[2], weights_only=True)
OutputStore(sys.argv[1], verify=False).read(ids[:1])
before = resident()
store = OutputStore(sys.argv[1], verify=False)
store.read(ids[[5, 999]])
grown = resident() - before
total = sum(store.read(part)["output"].double().sum().item() for part in ids.split(64))
print(grown, total)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_several_processes_map_the_files_at_once(tmp_path):
    data = Wide()
    store = collect(nn.Identity(), data, tmp_path, dtype="fp32", shard_bytes=5 * 10**6)
    torch.save(data.ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", READER, tmp_path, tmp_path / "ids.pt"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = store.read(data.ids)["output"].double().sum().item()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) > 20e6
    for reader in readers:
        grown, total = reader.communicate(timeout=60)[0].split()
        assert int(grown) < 5e6  # nothing but the pages that were asked for
        assert float(total) == pytest.approx(expected, abs=1e-6)


def test_a_store_goes_to_other_processes_by_its_path(tmp_path):
    data = Points()
    store = collect(net(), data, tmp_path)
    packed = pickle.dumps(store)
    assert len(packed) < 500
    assert torch.equal(pickle.loads(packed).read(data.ids)["output"], store.read(data.ids)["output"])


# What must be refused


def test_a_sample_or_view_that_is_not_stored_is_named(tmp_path):
    data = Points()
    store = collect(net(), data, tmp_path, views=1)
    with pytest.raises(MissingOutput, match=f"id {data.ids[0]} with view 1 is missing, in all 50 of 50(.|\n)*view 0\n"):
        store.read(data.ids, 1)
    with pytest.raises(MissingOutput, match="id 12345 with view 0 is missing, in all 1 of 2"):
        store.read(torch.tensor([int(data.ids[0]), 12345]))
    for far in (-(2**63), 2**63 - 1):
        assert store.missing(torch.tensor([far, int(data.ids[3])])).tolist() == [True, False]
    with pytest.raises(MissingOutput, match="view 1"):
        store.check(data=data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": net(7)}, "does not fit: teacher fingerprint\n"),
        ({"source": Points(name="others")}, "does not fit: data fingerprint(.|\n)*found: data fingerprint points"),
        ({"dtype": "fp32"}, "does not fit: dtype(.|\n)*found: dtype fp16(.|\n)*expected: dtype fp32"),
        ({"top_k": 2}, "does not fit: top_k(.|\n)*expected: top_k 2"),
        ({"layers": ["2"]}, r"does not fit: layers(.|\n)*expected: layers \['2'\]"),
        ({"dtype": "bf16", "source": Points(name="x")}, "does not fit: data fingerprint, dtype\n"),
    ],
)
def test_collecting_into_a_store_of_something_else_is_refused(tmp_path, change, message):
    collect(net(), Points(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    given = {"teacher": net(), "source": Points()} | change
    with pytest.raises(UsageError, match=message):
        collect(given.pop("teacher"), given.pop("source"), tmp_path, **given)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_check_names_what_differs(tmp_path):
    store = collect(net(), Points(), tmp_path, layers=["2"])
    store.check(teacher=net(), data=Points(), layers=["2"], dtype="fp16")
    with pytest.raises(UsageError, match="teacher fingerprint, data fingerprint, dtype"):
        store.check(teacher=net(3), data=Points(name="x"), dtype="fp32")
    with pytest.raises(UsageError, match=r"layer was not stored(.|\n)*found: output, 2\n(.|\n)*expected: 2.1"):
        store.check(layers=["2.1"])
    with pytest.raises(UsageError, match="layer was not stored"):
        store.read(Points().ids, layers=["4"])
    endless = Points()
    endless.views = 0
    with pytest.raises(UsageError, match="new view every epoch"):
        store.check(data=endless)


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [
        (lambda x: x * 1e6, {}, RunError, "above 6.55e"),
        (lambda x: x / 0, {"dtype": "bf16"}, None, ""),
        (lambda x: x * float("nan"), {}, RunError, "NaN"),
        (lambda x: x[: len(x) // 2], {}, UsageError, "one row for each sample"),
        (lambda x: x > 0, {}, UsageError, "expected: floating-point"),
        (lambda x: x[:, : len(x) % 7 + 1], {"batch_size": 30}, UsageError, "differ in shape"),
        (lambda x: x, {"top_k": 6}, UsageError, "1 to 5 classes"),
        (lambda x: x, {"top_k": 0}, UsageError, "1 to 5 classes"),
        (lambda x: x, {"dtype": "int8"}, UsageError, "fp16, bf16, fp32"),
        (lambda x: x, {"layers": ["lost"]}, UsageError, "no such module"),
        (lambda x: x, {"layers": ["output"]}, UsageError, "always stored"),
        (lambda x: x, {"views": 0}, UsageError, "fixed number of views"),
    ],
)
def test_outputs_that_cannot_be_stored(tmp_path, function, given, error, message):
    store = tmp_path / "store"
    if error is None:
        collect(Odd(function), Points(), store, **given)
        return
    with pytest.raises(error, match=message):
        collect(Odd(function), Points(), store, **given)
    if error is UsageError and "differ" not in message:
        assert not store.exists()


def test_repeated_ids_and_empty_data(tmp_path):
    data = Points()
    data.ids[1] = data.ids[0]
    with pytest.raises(UsageError, match="repeated ids"):
        collect(net(), data, tmp_path)
    with pytest.raises(UsageError, match="no samples"):
        collect(net(), Points(0), tmp_path)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p, -1), "shard-00001(.|\n)*checksum differs(.|\n)*only its samples"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), "shard-00001"),
        (lambda p: p.write_bytes(b""), "shard-00001"),
        (lambda p: (p.parent / "store.json").unlink(), "no store of teacher outputs"),
        (lambda p: (p.parent / "store.json").write_text("{"), "not the header"),
        (lambda p: (p.parent / "store.json").write_text("[]"), "not the header"),
    ],
)
def test_damage_is_found_by_name(tmp_path, damage, message):
    collect(net(), Points(), tmp_path, batch_size=10, shard_bytes=300)
    damage(tmp_path / "shard-00001.safetensors")
    with pytest.raises(UsageError, match=message):
        OutputStore(tmp_path)
    with pytest.raises(UsageError, match=message):
        collect(net(), Points(), tmp_path)


def test_a_newer_store_is_refused(tmp_path):
    collect(net(), Points(), tmp_path)
    file = tmp_path / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9}))
    with pytest.raises(UsageError, match="newer Limbeck"):
        OutputStore(tmp_path)


def test_there_is_no_store(tmp_path):
    with pytest.raises(UsageError, match="no store of teacher outputs"):
        OutputStore(tmp_path / "nowhere")
    assert not Path(tmp_path / "nowhere").exists()
