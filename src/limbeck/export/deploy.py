"""Students in the form in which they run: weights of 8 bits through torchao, or two of every four weights stored.

The layers hold plain tensors: a deployed student is saved and loaded like any other, and written as ONNX.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from limbeck.convert.parametrized import layers_of
from limbeck.core.adapt import call, main_output
from limbeck.core.errors import UsageError, require
from limbeck.evaluate.cost import Latency, evaluating, latency, size_bytes
from limbeck.export.parity import check_parity
from limbeck.nn.nm import check_pattern, nm_mask, violations

Form = Literal["int8-weight", "int8-dynamic", "2:4"]

_FLAT = 1e-10  # below it all weights of a row are zero, as in FakeQuant
_NO_PATH = (
    "speed is not measured: 2:4 weights run sparse only in half precision, with sizes in multiples of 64, on CUDA devices "
    "of compute capability 8.0 or more; here they were restored, exactly"
)


@dataclass(frozen=True)
class Deployed:
    """A deployed model, and what deploying did to it on this machine.

    Args:
        model: The deployed copy, in eval mode.
        record: What rebuilds its structure, for `save_student` after the records that the model already has.
        layers: Layers changed.
        bytes_before: Size of the stored state before.
        bytes_after: And after.
        latency_before: Time of one call on the batch before.
        latency_after: And after; None where the hardware has no path of its own for the form.
        max_abs_difference: Largest difference of any element of the main output on the batch.
        relative_difference: That over the largest magnitude in the output.
        note: What was not measured, and why.
    """

    model: nn.Module
    record: dict[str, Any]
    layers: int
    bytes_before: int
    bytes_after: int
    latency_before: Latency
    latency_after: Latency | None
    max_abs_difference: float
    relative_difference: float
    note: str | None = None

    @property
    def tolerance(self) -> float:
        """What a graph in ONNX may differ by, relatively; `to_onnx` takes it.

        A layer that rounds its inputs turns noise of the last bit into whole steps, and so do all layers after it: with
        `int8-dynamic`, two runtimes differ about as much as rounding itself changed the outputs.
        """
        return max(1e-4, 2 * self.relative_difference) if self.record["form"] == "int8-dynamic" else 1e-4


def deploy(
    model: nn.Module,
    to: Form,
    batch: Any,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    repeats: int = 20,
) -> Deployed:
    """Copy a model, put its linear layers into the form in which they run, and measure both on a batch.

    `int8-weight`: symmetric, a scale per output, `s = max|w| / 127`, the grid of `FakeQuant(bits=8)`: a student trained on it
    keeps its whole numbers. (torchao's own choice, `max|w| / 127.5`, clips the largest weight.) Multiplied as floats.
    `int8-dynamic`: the same weights; the inputs of a layer are rounded to 8 bits too, by the maximum of each token, and
    multiplied as whole numbers. `2:4`: two values of four and their places; restored where the device has no such product.

    Args:
        model: The student, finalised, on the device to measure; it stays as it is.
        to: The form.
        batch: An input of the model: a tensor, or a mapping or tuple of tensors.
        include: Globs of the layers' paths, as in `Parametrize`; convolutions stay as they are.
        exclude: Globs of layers that stay.
        repeats: Calls timed.

    Returns:
        The deployed copy, with sizes, times and differences.

    Raises:
        UsageError: The form is unknown, torchao (extra `deploy`) is missing, no linear layer is left, one is under a
            parametrization or not 2:4.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> from limbeck.convert.parametrized import Finalise, Parametrize
        >>> sparse, _ = Finalise()(Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4})(net)[0])
        >>> done = deploy(sparse, "2:4", torch.randn(4, 64))
        >>> done.layers, done.bytes_before, done.bytes_after, done.max_abs_difference
        (1, 8716, 4876, 0.0)
    """
    kind = _form(to)[0]
    others = (nn.Conv2d, NonDynamicallyQuantizableLinear)  # torch's attention takes the weight out of the latter
    found = {path: model.get_submodule(path) for path in layers_of(model, include, exclude)}
    paths = [path for path, layer in found.items() if not isinstance(layer, others)]
    if not paths:
        raise UsageError(
            f"there is nothing to deploy as {to}",
            where=type(model).__name__,
            expected="linear layers; convolutions are not deployed",
        )
    for path in paths:
        if parametrize.is_parametrized(found[path]):
            raise UsageError(
                "a layer is still under a parametrization",
                where=path,
                fix="student, record = limbeck.convert.parametrized.Finalise()(student)",
            )
    states = {path: kind.parts(path, found[path]) for path in paths}
    record = {
        "kind": f"{__name__}:deploy_module",
        "form": to,
        "layers": {path: str(_weight(found[path]).dtype).removeprefix("torch.") for path in paths},
    }
    deployed = deploy_module(copy.deepcopy(model), record)
    for path, state in states.items():
        deployed.get_submodule(path).load_state_dict(state)
    return _measure(model, deployed.eval(), record, batch, repeats)


def deploy_module(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Replace linear layers by those of a form in place, structure only, as a record says."""
    kind, arguments = _form(record["form"])
    for path, dtype in record["layers"].items():
        old: Any = module.get_submodule(path)
        weight = _weight(old)
        made = kind(*weight.shape[::-1], bias=old.bias is not None, dtype=getattr(torch, dtype), **arguments)
        made.to(weight.device).train(old.training)
        if not path:
            return made
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, made)
    return module


class Int8Linear(nn.Module):
    """`y = W x + b` with `W = scale codes`, multiplied by torchao.

    Args:
        inputs: Inputs i.
        outputs: Outputs o.
        bias: Whether there is one.
        dynamic: Whether inputs are rounded to 8 bits as well, a scale per token.
        dtype: Of the weight that this stands for, and of the bias.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, dynamic: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(outputs, 1))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype), requires_grad=False) if bias else None
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.dynamic, self._make = dynamic, _torchao_tensor(dynamic)

    @staticmethod
    def parts(path: str, layer: Any) -> dict[str, Tensor]:
        """The state of an `Int8Linear` for a layer."""
        codes, scale = int8_codes(_weight(layer))
        return {"codes": codes, "scale": scale} | _bias(layer)

    @property
    def weight(self) -> Tensor:
        """The weight `[o, i]`, as torchao's tensor."""
        return self._make(self.codes, self.scale, [1, self.codes.shape[1]], self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `[..., o]` of inputs `[..., i]`."""
        if torch.onnx.is_in_onnx_export():
            return self._in_onnx(x)
        if self.dynamic and x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            return self._in_floats(x)
        return F.linear(x, self.weight, self.bias)

    def _in_floats(self, x: Tensor) -> Tensor:
        """The same where the processor has no instructions for 8 bits, and torch takes seven times as long for them."""
        rounded, step = _rounded(x.float())
        y = F.linear(rounded, self.codes.float()) * step * self.scale[:, 0]
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _in_onnx(self, x: Tensor) -> Tensor:
        """The same by operators of ONNX, so that the file holds weights of 8 bits."""
        if not self.dynamic:
            return F.linear(x, (self.codes * self.scale).to(x.dtype), self.bias)
        rounded, step = _rounded(x)
        # Unsigned both: processors without VNNI saturate in unsigned times signed, and runtimes are slow at signed inputs.
        zero = torch.tensor(128, dtype=torch.uint8)
        codes = (self.codes.to(torch.int32) + 128).to(torch.uint8)
        factors, shape = ((rounded + 128).to(torch.uint8), codes.T, zero, zero), (*x.shape[:-1], len(codes))
        product = torch.onnx.ops.symbolic("MatMulInteger", factors, dtype=torch.int32, shape=shape)
        y: Tensor = product * step * self.scale[:, 0]
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -128 to 127 in the place of inputs `[..., i]`, and their step for each token, as torchao has them."""
    step = torch.maximum(x.amax(-1, keepdim=True) / 127, x.amin(-1, keepdim=True) / -128)
    step = step.clamp(min=torch.finfo(torch.float32).eps)
    return (x * (1.0 / step)).round().clamp(-128, 127), step


class SparseLinear(nn.Module):
    """`y = W x + b` with a 2:4 weight, stored as two values of each four and their places, 2 bits each.

    Where the device multiplies such weights by itself, the working copy of the weight is torch's semi-structured tensor;
    elsewhere it is dense. It is never stored.

    Args:
        inputs: Inputs i, a multiple of 4.
        outputs: Outputs o.
        bias: Whether there is one.
        dtype: Of the values.
    """

    values: Tensor
    places: Tensor
    weight: Any

    def __init__(self, inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(outputs, inputs // 2, dtype=dtype))
        self.register_buffer("places", torch.full((outputs, math.ceil(inputs / 8)), 0b0100_0100, dtype=torch.uint8))
        self.register_buffer("weight", None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype), requires_grad=False) if bias else None
        self.register_load_state_dict_post_hook(_after_loading)
        self.restore()

    @staticmethod
    def parts(path: str, layer: Any) -> dict[str, Tensor]:
        """The state of a `SparseLinear` for a layer, after a check that it restores the weight."""
        weight = _weight(layer)
        check_pattern(weight, 2, 4, where=path)
        if wrong := violations(weight, 2, 4):
            raise UsageError(
                "these weights are not 2:4",
                where=path,
                found=f"{wrong} groups of 4 with more than 2 weights other than 0",
                expected=f"none of {weight.numel() // 4}",
                fix="exclude this layer, or train it sparse: the method cast, or Parametrize('limbeck.nn.nm:MaskedNM')",
            )
        values, places = compress(weight)
        assert restore(values, places).equal(weight), path
        return {"values": values, "places": places} | _bias(layer)

    def restore(self) -> None:
        """Make the working copy of the weight anew."""
        self.weight = _working_copy(restore(self.values, self.places))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `[..., o]` of inputs `[..., i]`."""
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        self.weight = None  # made anew where the values go
        super()._apply(fn, recurse)
        self.restore()
        return self


@torch.no_grad()
def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of -127 to 127 and a scale per row: `weight = scale codes`, up to half a scale.

    Args:
        weight: `[o, i]`.

    Returns:
        Codes `[o, i]` of int8, scales `[o, 1]` of float32.

    Example:
        >>> codes, scale = int8_codes(torch.tensor([[1.27, -0.5, 0.0], [0.0, 0.0, 0.0]]))
        >>> codes.tolist(), round(scale[0].item(), 4)
        ([[127, -50, 0], [0, 0, 0]], 0.01)
    """
    weight = weight.float()
    top = weight.abs().amax(1, keepdim=True)
    scale = torch.where(top < _FLAT, 1.0, top / 127)
    return (weight / scale).round().to(torch.int8), scale


@torch.no_grad()
def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two values of each four of a 2:4 weight, and their places, of two groups in a byte.

    Args:
        weight: `[o, i]`, of each 4 along the inputs at least 2 are 0.

    Returns:
        Values `[o, i / 2]`, places `[o, ceil(i / 8)]` of uint8: from the low bits up, the first and second place of a group.

    Example:
        >>> compress(torch.tensor([[0.0, 3.0, 0.0, 2.0]]))
        (tensor([[3., 2.]]), tensor([[13]], dtype=torch.uint8))
    """
    kept, rows = nm_mask(weight, 2, 4), len(weight)
    places = kept.view(rows, -1, 4).nonzero()[:, -1].view(rows, -1, 2).to(torch.uint8)
    groups = F.pad(places[..., 0] | places[..., 1] << 2, (0, places.shape[1] % 2)).view(rows, -1, 2)
    return weight[kept].view(rows, -1), groups[..., 0] | groups[..., 1] << 4


@torch.no_grad()
def restore(values: Tensor, places: Tensor) -> Tensor:
    """The dense weight `[o, i]` that `compress` took apart.

    Example:
        >>> restore(torch.tensor([[3.0, 2.0]]), torch.tensor([[13]], dtype=torch.uint8))
        tensor([[0., 3., 0., 2.]])
    """
    pairs = values.unflatten(1, (-1, 2))  # [o, groups, 2]
    each = torch.stack([places >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).long()
    each = each.view(len(values), -1, 2)[:, : pairs.shape[1]]
    return pairs.new_zeros(*pairs.shape[:2], 4).scatter_(-1, each, pairs).flatten(1)


def _measure(before: nn.Module, after: nn.Module, record: dict[str, Any], batch: Any, repeats: int) -> Deployed:
    device = next(before.parameters()).device
    weights = [part.weight for part in after.modules() if isinstance(part, SparseLinear)]
    without = bool(weights) and all(type(weight) is Tensor for weight in weights)
    with evaluating(before), evaluating(after):
        parity = check_parity(
            lambda x: main_output(call(before, x)),
            lambda x: main_output(call(after, x)),
            [(batch,)],
            tolerance=math.inf,
        )
        was = latency(lambda: call(before, batch), repeats=repeats, device=device)
        now = None if without else latency(lambda: call(after, batch), repeats=repeats, device=device)
    return Deployed(
        model=after,
        record=record,
        layers=len(record["layers"]),
        bytes_before=size_bytes(before),
        bytes_after=size_bytes(after),
        latency_before=was,
        latency_after=now,
        max_abs_difference=parity.max_abs_error,
        relative_difference=parity.max_rel_error,
        note=_NO_PATH if without else None,
    )


def _form(to: str) -> tuple[Any, dict[str, Any]]:
    """The class of layers of a form, and what it is made with."""
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        "int8-weight": (Int8Linear, {"dynamic": False}),
        "int8-dynamic": (Int8Linear, {"dynamic": True}),
        "2:4": (SparseLinear, {}),
    }
    if to not in forms:
        raise UsageError("there is no such form", where="to", found=to, expected=", ".join(forms))
    if forms[to][0] is Int8Linear:
        require("torchao", extra="deploy")
    return forms[to]


def _weight(layer: Any) -> Tensor:
    """The weight `[o, i]` of a linear layer, or of GPT-2's transposed one."""
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T


def _bias(layer: Any) -> dict[str, Tensor]:
    return {} if layer.bias is None else {"bias": layer.bias.detach()}


@cache
def _torchao_tensor(dynamic: bool) -> Any:
    """What makes torchao's tensor of codes and scales, as its own configuration sets it up."""
    quantization = require("torchao.quantization", extra="deploy")
    name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
    config = getattr(quantization, name)(set_inductor_config=False)  # which would change global settings
    layer: Any = nn.Linear(1, 1, bias=False)
    quantization.quantize_(layer, config)
    inputs = layer.weight.act_quant_kwargs  # None where they are not rounded
    if dynamic:  # by default a token's largest value lies between two whole numbers, and noise decides which it becomes
        inputs = replace(inputs, mapping_type=quantization.MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    return partial(quantization.Int8Tensor, act_quant_kwargs=inputs)


def _working_copy(weight: Tensor) -> Tensor:
    """A 2:4 weight as the device multiplies it: semi-structured where it can, else dense."""
    fast = (
        weight.is_cuda
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.dtype in (torch.float16, torch.bfloat16)
        and not any(size % 64 for size in weight.shape)
    )
    return torch.sparse.to_sparse_semi_structured(weight) if fast else weight


def _after_loading(module: Any, keys: Any) -> None:
    module.restore()
