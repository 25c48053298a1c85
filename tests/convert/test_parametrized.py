"""Weights under parametrizations: put there, trained, folded, saved and built again."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Convert, Engine, Method, Optim, Roles, Train
from limbeck.convert.parametrized import Finalise, Parametrize, layers_of, parametrized, under
from limbeck.convert.record import load_student, rebuild, save_student
from limbeck.convert.slicing import Slice
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.nn.mlp import mlp
from limbeck.nn.nm import ScaledNM, violations

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
MASKED, SCALED = "limbeck.nn.nm:MaskedNM", "limbeck.nn.nm:ScaledNM"


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", [MASKED, SCALED])
def test_a_copy_is_parametrized_and_the_original_stays(kind):
    dense = net()
    before = copy.deepcopy(dense.state_dict())
    sparse, record = Parametrize(kind, {"n": 2, "m": 4})(dense)
    assert [path for path, _ in parametrized(sparse)] == record["paths"] == ["0", "2"]
    assert not list(parametrized(dense))
    assert all(dense.state_dict()[k].equal(v) for k, v in before.items())
    assert sparse(X).equal(dense(X)) == (kind == SCALED)  # CAST's forward pass is dense until the end


def test_masked_and_finalised_models_are_one_function():
    sparse, _ = Parametrize(MASKED, {"n": 2, "m": 4})(net())
    plain, _ = Finalise()(sparse)
    assert plain(X).equal(sparse(X))
    assert [type(part) for part in plain] == [type(part) for part in net()]
    assert plain.state_dict().keys() == net().state_dict().keys()
    assert violations(plain[0].weight, 2, 4) == violations(plain[2].weight, 2, 4) == 0
    assert sparse(X).equal(plain(X))  # what was folded is a copy: the unfinished one still works


def test_an_unfinished_student_comes_back_from_its_folder(tmp_path):
    sparse, record = Parametrize(SCALED, {"n": 1, "m": 4, "blocks": 2})(net())
    for weight, made in under(sparse, ScaledNM):
        weight.data.normal_()
        made.scale.data.uniform_(0.5, 2)
        made.refresh(weight)
    save_student(tmp_path, sparse, [record])
    again = load_student(tmp_path, net())
    assert again(X).equal(sparse(X))
    assert Finalise()(again)[0](X).equal(Finalise()(sparse)[0](X))


def test_several_conversions_in_a_row_come_back(tmp_path):
    small, first = Slice({"0.channels": 12})(net())
    sparse, second = Parametrize(MASKED, {"n": 2, "m": 4})(small)
    plain, third = Finalise()(sparse)
    twice, fourth = Parametrize(SCALED, {"n": 1, "m": 4, "blocks": 0}, include=["2"])(plain)
    done, fifth = Finalise()(twice)
    save_student(tmp_path, done, [first, second, third, fourth, fifth])
    assert load_student(tmp_path, net())(X).equal(done(X))


def test_two_parametrizations_of_one_weight_fold_in_their_order():
    sparse, _ = Parametrize(SCALED, {"n": 2, "m": 4, "blocks": 1}, include=["0"])(net())
    both, _ = Parametrize(MASKED, {"n": 1, "m": 4}, include=["0"])(sparse)
    scale = next(made for _, made in under(both, ScaledNM)).scale
    scale.data.fill_(3.0)
    plain, _ = Finalise()(both)
    assert violations(plain[0].weight, 1, 4) == 0
    kept = plain[0].weight != 0
    torch.testing.assert_close(plain[0].weight[kept], 3 * net()[0].weight[kept])


def test_which_layers():
    layered = nn.ModuleDict(
        {"embed": nn.Linear(4, 8), "layers": nn.ModuleList(mlp(8, 16, 8) for _ in range(2)), "head": nn.Linear(8, 2)}
    )
    assert "embed" not in layers_of(net())
    assert all(path.startswith("layers") for path in layers_of(layered, ["layers.*"]))
    assert layers_of(net(), ["*"]) == ["0", "2", "4"]
    assert layers_of(net(), exclude=["0"]) == ["2"]
    with pytest.raises(UsageError, match="no layer is left"):
        layers_of(net(), ["nothing*"])


def test_a_pattern_that_does_not_fit_names_the_layer():
    with pytest.raises(UsageError, match="2: the weight"):
        Parametrize(MASKED, {"n": 1, "m": 16}, include=["2"])(nn.Sequential(net()[0], nn.ReLU(), nn.Linear(24, 3)))


def test_records_run_nothing_but_limbecks_own_parametrizations():
    record = {"kind": "limbeck.convert.parametrized:parametrize_module", "arguments": {}, "paths": ["0"]}
    for name in ("os:system", "limbeck.core.files:aside", "torch.nn:Identity"):
        with pytest.raises(UsageError, match="no such parametrization"):
            rebuild(net(), [{**record, "parametrization": name}])
    with pytest.raises(UsageError, match="does not fit"):
        rebuild(net(), [{**record, "paths": ["9"], "parametrization": MASKED}])
    with pytest.raises(UsageError, match="nothing to finalise"):
        Finalise()(net())


def test_the_engine_compares_before_and_after(tmp_path):
    class Sparse(Method):
        frozen = ()

        def step(self, m, batch):
            return nn.functional.cross_entropy(m.student(batch), batch.y)

        def stages(self, m, data):
            yield Convert("student", Parametrize(SCALED, {"n": 2, "m": 4}))
            yield Train(self.step, roles={"student": None}, data=data.train)
            yield Convert("student", Finalise(), compare=data.train)

    source = TensorSource(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), torch.arange(64) % 3)
    result = execute(
        Sparse(),
        Roles(student=net()),
        Data(train=source),
        Engine(steps=4, batch_size=16),
        optim={"student": Optim(lr=1e-2)},
        out=tmp_path,
    )
    row = result.history[-1]
    assert row["convert/max_abs_difference"] > 0
    assert 0 <= row["convert/agreement"] <= 1
    assert not list(parametrized(result.roles.student.module))
    assert next(result.roles.student.parameters()).requires_grad
    assert violations(result.roles.student.module[0].weight, 2, 4) == 0
