import json
import sys
import types

import pytest
import torch
from torch import nn

from limbeck.convert import record as record_module
from limbeck.convert.layers import InheritLayers
from limbeck.convert.record import load_student, read_manifest, rebuild, save_student
from limbeck.core.errors import UsageError


def net(depth=6):
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)]), nn.BatchNorm1d(4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.fixture
def student():
    """A net of two layers out of six, and its record."""
    module, record = InheritLayers(2)(net())
    nn.init.normal_(module[0].weight)
    module[2].running_mean.add_(1)
    return module.eval(), record


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_converted_student_comes_back_bit_equal(tmp_path, student):
    module, record = student
    save_student(tmp_path, module, [record], meta={"teacher": "net"})
    again = load_student(tmp_path, net())
    assert same(module, again)
    assert not again.training
    x = torch.randn(3, 4)
    assert torch.equal(module(x), again(x))


def test_records_apply_in_order():
    first = InheritLayers([0, 2, 4])(net())
    second = InheritLayers([1])(first[0])
    again = rebuild(net(), [first[1], second[1]])
    assert same(again, rebuild(again, []))
    assert len(again[1]) == 1


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    module = Tied()
    module.steps += 3
    save_student(tmp_path, module)
    again = load_student(tmp_path, Tied())
    assert same(module, again)
    assert again.head.weight is again.embed.weight
    assert (tmp_path / "model.safetensors").stat().st_size < 1000 + 10 * 4 * 4


def test_tied_weights_stay_tied_in_half_precision(tmp_path):
    save_student(tmp_path, Tied().half())
    again = load_student(tmp_path, Tied())
    assert again.head.weight is again.embed.weight
    assert again.head.weight.dtype == torch.float16


def test_precision_is_that_of_the_file(tmp_path, student):
    module, record = student
    save_student(tmp_path, module.bfloat16(), [record])
    again = load_student(tmp_path, net())
    assert again[0].weight.dtype == torch.bfloat16
    assert same(module, again)


def test_transposed_weights_are_saved(tmp_path):
    module = nn.Linear(3, 5)
    module.weight.data = torch.randn(3, 5).t()
    save_student(tmp_path, module)
    assert same(load_student(tmp_path, nn.Linear(3, 5)), module)


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18", "torchvision:resnet18@lost.safetensors"])
def test_the_base_is_built_from_its_spec_without_pretrained_weights(tmp_path, spec):
    load = pytest.importorskip("limbeck.models.load")
    module = load.load_model(spec.partition("@")[0], num_classes=7, pretrained=False)
    save_student(tmp_path, module, spec=spec, num_classes=7)
    assert same(load_student(tmp_path), module)


def test_the_manifest_says_what_it_is(tmp_path, student):
    module, record = student
    save_student(tmp_path, module, [record], spec="timm:x", meta={"method": "kd"}, num_classes=3)
    found = read_manifest(tmp_path)
    assert found["records"] == [record]
    assert (found["spec"], found["num_classes"], found["meta"]) == ("timm:x", 3, {"method": "kd"})
    assert found["versions"]["limbeck"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["limbeck.json", "model.safetensors"]


def test_saving_again_keeps_other_files(tmp_path):
    (tmp_path / "model.onnx").write_text("x")
    for value in (1.0, 2.0):
        module = nn.Linear(1, 1)
        nn.init.constant_(module.weight, value)
        save_student(tmp_path, module)
    assert load_student(tmp_path, nn.Linear(1, 1)).weight.item() == 2.0
    assert (tmp_path / "model.onnx").exists()


def test_a_failed_save_leaves_the_old_student(tmp_path, monkeypatch):
    module = nn.Linear(2, 2)
    save_student(tmp_path, module)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(record_module, "_sha256", fail)
    with pytest.raises(OSError, match="disk full"):
        save_student(tmp_path, nn.Linear(3, 3))
    monkeypatch.undo()
    assert same(load_student(tmp_path, nn.Linear(2, 2)), module)
    assert len(list(tmp_path.iterdir())) == 2


def test_records_must_be_plain_data(tmp_path):
    with pytest.raises(UsageError, match="plain data"):
        save_student(tmp_path / "s", nn.Linear(1, 1), [{"kind": "limbeck.x:y", "mask": torch.ones(2)}])
    assert not (tmp_path / "s").exists()


# What must be refused


@pytest.fixture
def own(monkeypatch):
    """A conversion in a module of the user's."""
    module = types.ModuleType("own_surgery")
    exec("def shrink(module, record):\n    return module[0]\nfrom os import system", module.__dict__)
    monkeypatch.setitem(sys.modules, "own_surgery", module)


def test_kinds_outside_limbeck_run_only_for_the_programs_own_records(tmp_path, own):
    records = [{"kind": "own_surgery:shrink"}]
    assert isinstance(rebuild(net(), records), nn.Linear)
    save_student(tmp_path, nn.Linear(4, 4), records)
    with pytest.raises(UsageError, match=r"outside Limbeck is not run(.|\n)*own_surgery:shrink"):
        load_student(tmp_path, net())
    assert isinstance(load_student(tmp_path, net(), trust=True), nn.Linear)


@pytest.mark.parametrize(
    "kind",
    [
        "own_surgery:system",
        "own_surgery:lost",
        "a_module_never_imported:f",
        "limbeck.convert.lost:f",
        "limbeck.convert.layers:lost",
        "limbeck.convert.layers:InheritLayers",
        "limbeck.convert.record:import_module",
        "limbeck.convert.record:json.dumps",
        "limbeck..os:system",
        "nonsense",
        None,
    ],
)
def test_kinds_that_are_no_conversions_are_refused(own, kind):
    with pytest.raises(UsageError, match="no such conversion"):
        rebuild(net(), [{"kind": kind}])


def test_a_folder_cannot_import_what_was_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\ndef f(m, r): return m\n")
    monkeypatch.syspath_prepend(tmp_path)
    save_student(tmp_path, nn.Linear(1, 1), [{"kind": "evil:f"}])
    for trust in (False, True):
        with pytest.raises(UsageError):
            load_student(tmp_path, nn.Linear(1, 1), trust=trust)


def test_a_spec_that_is_code_is_not_run_without_trust(tmp_path):
    pytest.importorskip("limbeck.models.load")
    code = tmp_path / "arch.py"
    code.write_text(
        f"from torch import nn\nopen({str(tmp_path / 'ran')!r}, 'w')\ndef build():\n    return nn.Linear(2, 2)\n"
    )
    module = nn.Linear(2, 2)
    for spec in (f"{code}:build", f"{code}:build@weights.pt", "os:abort", str(tmp_path)):
        save_student(tmp_path / "student", module, spec=spec)
        with pytest.raises(UsageError, match="no library builds"):
            load_student(tmp_path / "student")
    assert not (tmp_path / "ran").exists()
    save_student(tmp_path / "student", module, spec=f"{code}:build")
    assert same(load_student(tmp_path / "student", trust=True), module)


def test_a_model_of_ones_own_must_be_given(tmp_path):
    save_student(tmp_path, nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"load_student\(path, module\)"):
        load_student(tmp_path)


def test_a_record_that_does_not_fit_is_named(student):
    with pytest.raises(UsageError, match=r"records\[0\] \(limbeck.convert.layers:inherit_layers\)"):
        rebuild(nn.Linear(2, 2), [{"kind": student[1]["kind"]}])


def edit(path, **values):
    file = path / "limbeck.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: edit(p, format=2), r"newer Limbeck(.|\n)*format 2"),
        (lambda p: edit(p, format="x"), r"manifest(.|\n)*format"),
        (lambda p: edit(p, records=["x"]), r"manifest(.|\n)*records"),
        (lambda p: edit(p, sha256="0" * 64), "not those that were saved"),
        (lambda p: (p / "limbeck.json").write_text("{"), "damaged"),
        (lambda p: (p / "limbeck.json").write_text("[]"), "manifest"),
        (lambda p: (p / "limbeck.json").unlink(), "holds no student"),
        (lambda p: (p / "model.safetensors").unlink(), "no such weights file"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 100), "not a whole safetensors file"),
    ],
)
def test_damaged_folders_are_refused_by_name(tmp_path, damage, message):
    save_student(tmp_path, nn.Linear(2, 2))
    damage(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_student(tmp_path, nn.Linear(2, 2))


def test_one_flipped_bit_in_the_weights_is_refused(tmp_path):
    save_student(tmp_path, nn.Linear(2, 2))
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match="not those that were saved"):
        load_student(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), r'Unexpected(.|\n)*"bias"'),
        (nn.Linear(2, 2, bias=False), nn.Linear(2, 2), r'Missing(.|\n)*"bias"'),
        (nn.Linear(2, 2), nn.Linear(3, 2), "size mismatch for weight"),
    ],
)
def test_another_architecture_is_refused_and_the_tensor_named(tmp_path, saved, given, message):
    save_student(tmp_path, saved)
    with pytest.raises(UsageError, match=message):
        load_student(tmp_path, given)


def test_integers_are_not_filled_from_floats(tmp_path):
    class Counts(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.register_buffer("n", torch.ones(2, dtype=dtype))

    save_student(tmp_path, Counts(torch.float32))
    with pytest.raises(UsageError, match="another kind"):
        load_student(tmp_path, Counts(torch.int8))
