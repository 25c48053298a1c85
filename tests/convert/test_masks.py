"""Gates on models: the gated model, evaluated, is the pruned model."""

import copy

import pytest
import torch
from test_slicing import MODELS, answer, model
from torch import nn

from limbeck.convert.masks import AddMasks, PruneMasked
from limbeck.convert.record import load_student, save_student
from limbeck.convert.structure import structure
from limbeck.core.errors import UsageError
from limbeck.nn.mlp import mlp

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def half_shut(gated, seed=0):
    """Gates with random alphas, about half of them shut."""
    rng = torch.Generator().manual_seed(seed)
    for gate in gated.gates:
        gate.alpha.data.copy_(3 * torch.randn(gate.alpha.shape, generator=rng) - 1)
    return gated.eval()


@pytest.mark.parametrize("name", ["clip", "bert", "vit", "gpt2", "tower"])
@pytest.mark.parametrize("dims", [("*.heads", "*.ffn"), ("*width",), ("*",)])
def test_the_gated_model_is_the_pruned_model(name, dims, tmp_path):
    whole = model(name)
    if name in ("tower", "gpt2"):
        dims = ("*.ffn",)
    gated, first = AddMasks(dims)(whole)
    half_shut(gated)
    pruned, second = PruneMasked()(gated)
    torch.testing.assert_close(answer(pruned.eval(), name), answer(gated, name), rtol=1e-4, atol=1e-5)
    sizes = structure(pruned).sizes()
    assert all(sizes[n] == len(units) for n, units in gated.gates.kept().items())
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())
    save_student(tmp_path / "gated", gated, [first])
    save_student(tmp_path / "pruned", pruned, [first, second])
    assert answer(load_student(tmp_path / "gated", MODELS[name][0]()), name).equal(answer(gated, name))
    assert answer(load_student(tmp_path / "pruned", MODELS[name][0]()), name).equal(answer(pruned, name))


def test_the_gates_of_a_step_are_drawn_once_and_learn():
    gated, _ = AddMasks(("*.channels",), initial=0.5)(mlp(8, 16, 16, 3))
    gated.train()
    gated.gates.sample(torch.Generator().manual_seed(0))
    one = gated(X)
    assert gated(X).equal(one)
    one.square().sum().backward()
    assert all(gate.alpha.grad.ne(0).any() for gate in gated.gates)
    gated.gates.sample(torch.Generator().manual_seed(1))
    assert not gated(X).equal(one)
    still = gated.eval()(X)
    assert gated(X).equal(still)
    other = copy.deepcopy(gated)  # with gates of its own
    other.gates.gates[0].alpha.data[:8] = -4.0
    assert gated(X).equal(still)
    assert not other(X).equal(still)


def test_what_is_expected_to_be_shut():
    whole = mlp(8, 16, 4)
    gated, _ = AddMasks(("*.channels",))(whole)
    gate = gated.gates.gates[0]
    p = gated.gates.sparsity()
    open_ = gate.open_probability().mean()
    torch.testing.assert_close(p, 1 - open_)  # every counted tensor runs over the dimension once
    p.backward()
    assert (gate.alpha.grad < 0).all()
    gate.alpha.data.copy_(torch.where(torch.arange(16) < 4, 60.0, -60.0))
    assert gated.gates.sparsity().item() == pytest.approx(0.75, abs=1e-6)


def test_sparsity_counts_against_a_bigger_model():
    gated, _ = AddMasks(("*.channels",), initial=60.0, total=2 * (8 * 16 + 16 + 16 * 4))(mlp(8, 16, 4))
    assert gated.gates.sparsity().item() == pytest.approx(0.5)


def test_width_and_units_multiply():
    whole = model("vit")
    dims, sizes = structure(whole).dims, {n: p.numel() for n, p in whole.named_parameters()}
    gated, _ = AddMasks(("*width", "*.ffn", "*.heads"))(whole)
    for gate in gated.gates:
        gate.alpha.data.fill_(60.0)
        gate.alpha.data[len(gate.alpha) // 2 :] = -60.0
    pruned, _ = PruneMasked()(gated)
    left = {n: p.numel() for n, p in pruned.named_parameters()}
    counted = {a.tensor for d in dims.values() if not d.name.endswith("width") for a in d.axes}
    kept = sum(left[n] for n in counted) / sum(sizes[n] for n in counted)
    assert gated.gates.sparsity().item() == pytest.approx(1 - kept, abs=1e-5)


def test_what_cannot_be_gated_is_said():
    with pytest.raises(UsageError, match="no such dimension"):
        AddMasks(("*.heads",))(mlp(8, 16, 3))
    with pytest.raises(UsageError, match="no gates"):
        PruneMasked()(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no layer norms"):
        AddMasks(("*width",))(model("llama"))
    with pytest.raises(UsageError, match="used twice"):
        AddMasks(("*width",))(model("gpt2"))
