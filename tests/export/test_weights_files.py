import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from limbeck.core.errors import RunError, UsageError
from limbeck.core.files import aside, write_text
from limbeck.export import safetensors
from limbeck.export.parity import check_parity


def tied():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    return model


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = write_text(tmp_path / "deep" / "a.txt", "before")

    def fail():
        with aside(target) as scratch:
            scratch.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "before"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_files_beside_the_main_one_move_along(tmp_path):
    with aside(tmp_path / "m.onnx") as scratch:
        scratch.write_text("graph")
        (scratch.parent / "m.onnx.data").write_text("weights")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_weights_and_metadata_come_back(tmp_path):
    source, target = tied().bfloat16(), tied().bfloat16()
    safetensors.save(source, tmp_path / "m.safetensors", {"lineage": {"layers": [0, 2]}, "seed": 1})
    assert safetensors.load(target, tmp_path / "m.safetensors") == {"lineage": {"layers": [0, 2]}, "seed": 1}
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    assert target[1].weight is target[0].weight
    assert (tmp_path / "m.safetensors").stat().st_size < 900  # the tied matrix is stored once


def test_a_file_of_another_program_has_no_metadata(tmp_path):
    save_file({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "m.safetensors")
    layer = nn.Linear(2, 1)
    assert safetensors.load(layer, tmp_path / "m.safetensors") == {}
    assert layer.weight.tolist() == [[1, 1]]


@pytest.mark.parametrize("other", [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 2)), nn.Linear(4, 2, bias=False)])
def test_weights_of_another_architecture_are_refused(tmp_path, other):
    safetensors.save(nn.Linear(4, 2), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="not of this architecture"):
        safetensors.load(other, tmp_path / "m.safetensors")


@pytest.mark.parametrize("size", [0, 7, 60, -1])
def test_a_damaged_file_is_refused_by_name(tmp_path, size):
    path = tmp_path / "m.safetensors"
    safetensors.save(nn.Linear(4, 2), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"not a whole safetensors file\n  where: .*m\.safetensors"):
        safetensors.load(nn.Linear(4, 2), path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no such weights file\n  where: .*gone"):
        safetensors.read_metadata(tmp_path / "gone.safetensors")


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(TypeError):
        safetensors.save(nn.Linear(2, 1), tmp_path / "m.safetensors", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_parity_measures_the_largest_difference():
    result = check_parity(lambda x: 10 * x, lambda x: 10 * x + 1e-4, [(torch.ones(3),), (torch.ones(2),)])
    assert result.max_abs_error == pytest.approx(1e-4, rel=0.01)
    assert result.max_rel_error == pytest.approx(1e-5, rel=0.01)
    assert result.outputs == 2


def test_parity_is_relative_to_the_size_of_the_output():
    def small(x):
        return x * 1e-5

    check_parity(small, small, [(torch.ones(3),)])
    with pytest.raises(RunError, match="computes something else"):
        check_parity(small, lambda x: small(x) * 1.01, [(torch.ones(3),)])


def test_parity_takes_keywords_mappings_and_nested_outputs():
    def model(x, mask=None):
        return {"a": x * 2, "b": (x, None), "n": 3}

    assert check_parity(model, model, [{"x": torch.ones(2), "mask": None}]).outputs == 2


def nan_at(i):
    return torch.tensor([torch.nan if i == j else float(j) for j in range(3)])


@pytest.mark.parametrize(
    ("reference", "candidate", "what"),
    [
        (torch.ones(3), torch.ones(4), "other shapes"),
        ((torch.ones(3),), (torch.ones(3), torch.ones(3)), "other shapes"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "something else"),
        (nan_at(0), nan_at(1), "something else"),
        (torch.ones(3), nan_at(1), "something else"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "something else"),
        (torch.zeros(2), torch.full((2,), 1e-3), "something else"),
    ],
)
def test_a_difference_stops_with_its_place(reference, candidate, what):
    with pytest.raises(RunError, match=f"the copy .*{what}") as error:
        check_parity(lambda x: reference, lambda x: candidate, [(torch.ones(5, 2),)], what="the copy")
    assert "[5, 2]" in str(error.value)
    assert error.value.exit_code == 1


def test_nan_and_inf_in_the_same_places_agree():
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert check_parity(lambda: values, lambda: values.clone(), [()]).max_abs_error == 0
