"""Deployed students: whole numbers as they were trained, two of four weights exactly, on disk and in ONNX as in torch."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.convert.low_rank import LowRank
from limbeck.convert.parametrized import Finalise, Parametrize, parametrized
from limbeck.convert.record import load_student, save_student
from limbeck.core.errors import UsageError
from limbeck.evaluate.cost import size_bytes
from limbeck.export import deploy as module
from limbeck.export.deploy import Int8Linear, SparseLinear, compress, deploy, int8_codes, restore
from limbeck.export.onnx import to_onnx
from limbeck.nn.nm import nm_bits, nm_mask

FORMS = ("int8-weight", "int8-dynamic", "2:4")
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


def net(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 24, bias=False), nn.GELU(), nn.Linear(24, 3))


def sparse(model=None):
    return Finalise()(Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4})(model or net())[0])[0]


@pytest.fixture(autouse=True)
def _torchao(request):
    if "without" not in request.node.name:
        pytest.importorskip("torchao")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_whole_numbers_are_those_the_student_was_trained_with():
    model, _ = Parametrize("limbeck.nn.fake_quant:FakeQuant")(net())
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optim.zero_grad()
        F.cross_entropy(model(X), torch.arange(6) % 3).backward()
        optim.step()
    trained = {}
    for path, layer in parametrized(model):
        weight = layer.parametrizations.weight.original.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        trained[path] = ((weight / scale).round(), scale)
    plain, _ = Finalise()(model)
    done = deploy(plain, "int8-weight", X)
    assert list(trained) == ["0", "2"]
    for path, (codes, scale) in trained.items():
        layer = done.model.get_submodule(path)
        assert layer.codes.dtype == torch.int8
        assert layer.codes.equal(codes.to(torch.int8))
        torch.testing.assert_close(layer.scale, scale, rtol=2e-7, atol=0)
        torch.testing.assert_close(
            layer.weight.dequantize(), plain.get_submodule(path).weight.detach(), rtol=3e-7, atol=0
        )
    assert done.relative_difference < 1e-6
    torch.testing.assert_close(done.model(X), model(X).detach(), rtol=1e-5, atol=1e-6)


def test_rounding_is_to_the_nearest_and_zeros_stay():
    weight = torch.randn(16, 40)
    weight[3] = 0
    weight[:, ::5] = 0
    codes, scale = int8_codes(weight)
    assert ((codes * scale - weight).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert codes.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 12
    assert not codes[weight == 0].any()


@pytest.mark.parametrize("to", FORMS)
def test_the_model_given_stays_and_the_copy_is_measured(to):
    model = sparse().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    done = deploy(model, to, X, repeats=3)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert isinstance(model[0], nn.Linear)
    assert not any(part.training for part in done.model.modules())
    assert done.layers == 2  # not the last one
    assert type(done.model[4]) is nn.Linear
    assert (done.bytes_before, done.bytes_after) == (size_bytes(model), size_bytes(done.model))
    error = (done.model(X) - model.eval()(X)).abs().max().item()
    assert done.max_abs_difference == pytest.approx(error)
    assert done.relative_difference == pytest.approx(error / model(X).abs().max().item())
    assert done.relative_difference < {"int8-weight": 0.02, "int8-dynamic": 0.05, "2:4": 1e-12}[to]
    assert done.latency_before.repeats == 3
    if to == "2:4":
        assert done.latency_after is None
        assert done.note.startswith("speed is not measured")
    else:
        assert done.latency_after.repeats == 3
        assert done.latency_after.median > 0
        assert done.note is None


def test_sizes():
    weights, rest = 32 * 64 + 24 * 32, 32 * 4 + (24 * 3 + 3) * 4
    for to in FORMS[:2]:
        done = deploy(sparse(), to, X, repeats=1)
        assert done.bytes_after == weights + (32 + 24) * 4 + rest  # a scale for each output
    done = deploy(sparse(), "2:4", X, repeats=1)
    assert done.bytes_after == weights / 4 * nm_bits(2, 4, 32) / 8 + rest
    half = deploy(sparse().half(), "2:4", X.half(), repeats=1)
    assert half.bytes_after == weights / 4 * nm_bits(2, 4, 16) / 8 + rest / 2


def test_dynamic_rounds_the_inputs_by_the_maximum_of_each_token():
    model = nn.Sequential(net()[0])
    done = deploy(model, "int8-dynamic", X, include=["0"], repeats=1)
    layer = done.model[0]
    step = torch.maximum(X.amax(1, keepdim=True) / 127, X.amin(1, keepdim=True) / -128)
    rounded = (X * (1 / step)).round().clamp(-128, 127)
    expected = (rounded @ layer.codes.float().T) * step * layer.scale[:, 0] + layer.bias
    torch.testing.assert_close(done.model(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [4, 8, 12, 64])
def test_two_of_four_restore_exactly(inputs):
    weight = torch.randn(10, inputs)
    weight = weight * nm_mask(weight, 2, 4)
    weight[0] = 0  # groups with fewer
    weight[1, 1:] = 0
    for dtype in (torch.float32, torch.bfloat16):
        values, places = compress(weight.to(dtype))
        assert values.shape == (10, inputs // 2)
        assert places.shape == (10, -(-inputs // 8))
        assert restore(values, places).equal(weight.to(dtype))


def test_every_pattern_of_two_in_four():
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    weight = torch.zeros(6, 4)
    for row, (a, b) in enumerate(pairs):
        weight[row, a], weight[row, b] = 1.0, -2.0
    values, places = compress(weight)
    assert places[:, 0].tolist() == [a | b << 2 for a, b in pairs]
    assert values.tolist() == [[1.0, -2.0]] * 6
    assert restore(values, places).equal(weight)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_disk_and_back(tmp_path, to, dtype):
    model = sparse().to(dtype)
    done = deploy(model, to, X.to(dtype), repeats=1)
    save_student(tmp_path, done.model, [done.record])
    same = load_student(tmp_path, net())
    assert same[0].weight.dtype == done.model[0].weight.dtype == dtype
    assert same.state_dict().keys() == done.model.state_dict().keys()
    assert all(value.equal(same.state_dict()[name]) for name, value in done.model.state_dict().items())
    assert same(X.to(dtype)).equal(done.model(X.to(dtype)))
    assert abs((tmp_path / "model.safetensors").stat().st_size - done.bytes_after) < 1500  # the header


def test_after_other_conversions(tmp_path):
    thin, first = LowRank(rank=8)(net())
    done = deploy(thin, "int8-weight", X, repeats=1)
    assert list(done.record["layers"]) == ["0.first", "0.second", "2.first", "2.second"]
    save_student(tmp_path, done.model, [first, done.record])
    assert load_student(tmp_path, net())(X).equal(done.model(X))


@pytest.mark.parametrize("to", FORMS)
def test_copies_and_precision(to):
    done = deploy(sparse(), to, X, repeats=1)
    twin = copy.deepcopy(done.model)
    assert twin(X).equal(done.model(X))
    half = twin.to(torch.bfloat16)(X.bfloat16())
    assert half.dtype == twin[0].weight.dtype == torch.bfloat16
    assert relative(half.float(), done.model(X)) < 0.05


@pytest.mark.parametrize("to", FORMS)
def test_onnx(tmp_path, to):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = sparse(net(width=256))
    done = deploy(model, to, X, repeats=1)
    report = to_onnx(done.model, (X,), tmp_path / "m.onnx")
    assert report.max_rel_error < 1e-5 < done.tolerance
    assert done.tolerance == (2 * done.relative_difference if to == "int8-dynamic" else 1e-4)
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == (2 if to == "int8-dynamic" else 0)
    large = [t for t in graph.initializer if math.prod(t.dims) > 8192]  # smaller ones the exporter may fold to floats
    assert [t.data_type == onnx.TensorProto.INT8 for t in large] == [to != "2:4"]


def test_processors_without_instructions_for_8_bits_compute_the_same(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    done = deploy(net(width=256), "int8-dynamic", X, repeats=1)
    layer, x = done.model[0], 3 * X
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-6, atol=1e-6)


def test_products_in_onnx_do_not_saturate(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, x = nn.Linear(64, 8), torch.ones(6, 64)
    nn.init.ones_(layer.weight)  # all products are as large as they can be
    report = to_onnx(
        deploy(nn.Sequential(layer), "int8-dynamic", x, include=["0"], repeats=1).model, (x,), tmp_path / "m.onnx"
    )
    assert report.max_rel_error < 1e-6


def test_models_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "vocab_size": 20,
    }
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()
    batch = {"input_ids": torch.randint(20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    done = deploy(bert, "int8-dynamic", batch, repeats=1)
    assert done.layers == 12
    assert done.relative_difference < 0.1
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 8}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    done = deploy(gpt2, "int8-weight", {"input_ids": torch.randint(20, (2, 5))}, repeats=1)
    assert done.layers == 8
    assert done.model.transformer.h[0].attn.c_attn.codes.shape == (48, 16)  # the right way round
    assert done.relative_difference < 0.05
    done = deploy(sparse(gpt2), "2:4", {"input_ids": torch.randint(20, (2, 5))}, repeats=1)
    assert done.relative_difference < 1e-6


def test_torch_attention_keeps_the_weight_that_it_takes_out():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    done = deploy(encoder, "int8-weight", torch.randn(2, 5, 16), repeats=1)
    assert list(done.record["layers"]) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert done.relative_difference < 0.05


def test_where_the_device_has_a_path_the_working_copy_takes_it(monkeypatch):
    taken = []

    class Semi(torch.Tensor):
        pass

    def semi(weight):
        if weight.shape[0] % 32:
            return weight
        taken.append(tuple(weight.shape))
        return weight.as_subclass(Semi)

    monkeypatch.setattr(module, "_working_copy", semi)
    done = deploy(sparse(), "2:4", X, repeats=1)
    assert set(taken) == {(32, 64)}
    assert isinstance(done.model[0].weight, Semi)
    assert done.latency_after is not None
    assert done.note is None
    assert done.max_abs_difference == 0
    assert "0.weight" not in done.model.state_dict()


def test_a_model_that_is_one_layer():
    done = deploy(nn.Linear(64, 3), "int8-weight", X, include=["*"], repeats=1)
    assert isinstance(done.model, Int8Linear)
    assert isinstance(
        deploy(sparse(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3)))[0], "2:4", X, [""]).model, SparseLinear
    )


def refuse(what, call):
    with pytest.raises(UsageError, match=what) as error:
        call()
    return str(error.value)


def test_bad_input():
    assert "int8-weight, int8-dynamic, 2:4" in refuse("no such form", lambda: deploy(net(), "int4", X))
    message = refuse("not 2:4", lambda: deploy(net(), "2:4", X))
    assert "where: 0" in message
    assert "512 groups of 4" in message
    assert "exclude this layer" in message
    odd = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    assert "where: 0" in refuse("do not divide", lambda: deploy(odd, "2:4", X[:, :6]))
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    refuse("nothing to deploy as int8-weight", lambda: deploy(images, "int8-weight", torch.ones(1, 3, 3, 3)))
    refuse("no layer is left", lambda: deploy(net(), "int8-weight", X, exclude=["*"]))
    trained, _ = Parametrize("limbeck.nn.fake_quant:FakeQuant")(net())
    assert "Finalise()" in refuse("still under a parametrization", lambda: deploy(trained, "int8-weight", X))
    done = deploy(net(), "int8-weight", X, repeats=1)
    refuse("no layer is left|nothing to deploy", lambda: deploy(done.model, "int8-weight", X, include=["0"]))


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert 'pip install "limbeck[deploy]"' in refuse("'torchao' is needed", lambda: deploy(net(), "int8-weight", X))
    assert deploy(sparse(), "2:4", X, repeats=1).layers == 2
