"""ONNX files that were run and compared with the module before they got their name."""

import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.adapt import call, main_output
from limbeck.core.errors import LimbeckError, RunError, UsageError, require
from limbeck.core.files import aside
from limbeck.evaluate.cost import evaluating, size_bytes
from limbeck.export.parity import check_parity

Example = tuple[Tensor, ...] | Mapping[str, Tensor]

_LARGEST = 1_800_000_000  # a protobuf ends at 2 GiB; larger weights go to a file beside it


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how well it agrees with the module.

    Args:
        path: The `.onnx` file.
        bytes: Its size, with external weights.
        opset: Version of ONNX's operators.
        inputs: Names of the inputs, in order.
        checked: Leading sizes of the inputs on which it was compared.
        max_abs_error: Largest absolute difference of any output element.
        max_rel_error: The largest difference in an output over the largest magnitude in it.
    """

    path: str
    bytes: int
    opset: int
    inputs: tuple[str, ...]
    checked: tuple[tuple[int, ...], ...]
    max_abs_error: float
    max_rel_error: float


def to_onnx(
    module: nn.Module,
    example: Example,
    path: str | os.PathLike[str],
    axes: Sequence[str] = ("batch",),
    opset: int = 18,
    tolerance: float = 1e-4,
) -> OnnxReport:
    """Write the module's main output (logits or embedding) as an ONNX graph, and compare it with the module.

    The graph is run by onnxruntime on the CPU for several sizes of every dynamic axis, not the example's alone.

    Args:
        module: What to export; it is exported in eval mode, on the CPU.
        example: Input tensors in order, or by the names that `forward` gives them; all share the leading axes named in `axes`.
            Where some are whole numbers, as token ids, only these have the axes beyond the first: images beside texts have not.
        path: The `.onnx` file; weights beyond 1.8 GB go to `<path>.data` beside it.
        axes: Names of the leading dimensions that may vary: `("batch",)`, or `("batch", "sequence")` for token ids.
        opset: Version of ONNX's operators.
        tolerance: Largest difference allowed, relative to the largest magnitude in the output.

    Returns:
        What was written and how well it agrees.

    Raises:
        UsageError: The extra `export` is missing, or the example's tensors lack an axis or disagree about its size.
        RunError: The module cannot be traced, or the graph computes something else; no file is left.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = to_onnx(nn.Linear(4, 2), (torch.randn(3, 4),), f"{folder}/model.onnx")
        >>> report.inputs, report.checked, report.max_abs_error < 1e-5
        (('input',), ((2,), (1,), (5,)), True)
    """
    require("onnx", extra="export")
    require("onnxscript", extra="export")
    runtime = require("onnxruntime", extra="export")
    cases = [_resize(example, sizes) for sizes in _cases(example, axes)]
    model = _Main(module)
    with evaluating(model), aside(path) as scratch, _explaining(module):
        _export(model, cases[0], scratch, axes, opset)
        session = _session(runtime, scratch)
        parity = check_parity(model, _runner(session), cases, tolerance, what="the ONNX graph")
        size = sum(f.stat().st_size for f in scratch.parent.iterdir())
    return OnnxReport(
        path=str(path),
        bytes=size,
        opset=opset,
        inputs=tuple(i.name for i in session.get_inputs()),
        checked=tuple(_sizes(case, axes) for case in cases),
        max_abs_error=parity.max_abs_error,
        max_rel_error=parity.max_rel_error,
    )


class _Main(nn.Module):
    """A model of any calling form, on the CPU, as a module from tensors to its main output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        elsewhere = any(t.device.type != "cpu" for t in (*module.parameters(), *module.buffers()))
        self.module = copy.deepcopy(module).cpu() if elsewhere else module

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return main_output(call(self.module, kwargs or args))


def _export(model: _Main, example: Example, path: Path, axes: Sequence[str], opset: int) -> None:
    named = isinstance(example, Mapping)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    shapes = {name: dict(enumerate(axes[:count])) for name, count in _shared(example, axes).items()}
    with _quiet():
        torch.onnx.export(
            model,
            () if named else tuple(example),
            path,
            kwargs=kwargs,
            input_names=list(kwargs) or list(signature(model.module.forward).parameters)[: len(example)],
            output_names=["output"],
            dynamic_shapes={"kwargs": shapes} if named else {"args": tuple(shapes.values())},
            opset_version=opset,
            external_data=size_bytes(model) > _LARGEST,
            dynamo=True,
            verbose=False,
        )


def _session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _runner(session: Any) -> Callable[..., list[Tensor]]:
    names = [i.name for i in session.get_inputs()]

    def run(*args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        feed = kwargs or dict(zip(names, args, strict=True))
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        return [torch.from_numpy(o) for o in outputs]

    return run


def _cases(example: Example, axes: Sequence[str]) -> list[tuple[int, ...]]:
    """Sizes of the dynamic axes to export with (the first, as tracing takes a size of one for a constant) and to check."""
    _, *rest = _sizes(example, axes)
    full = [max(2, size) for size in rest]
    return [(2, *full), (1, *full), (5, *(-(-size // 2) for size in full))]


def _shared(example: Example, axes: Sequence[Any]) -> dict[Any, int]:
    """How many of the axes each tensor has, by its name or place."""
    tensors: dict[Any, Tensor] = dict(example) if isinstance(example, Mapping) else dict(enumerate(example))
    whole = {name for name, tensor in tensors.items() if not tensor.is_floating_point()} or set(tensors)
    return {name: len(axes) if name in whole else min(1, len(axes)) for name in tensors}


def _sizes(example: Example, axes: Sequence[str]) -> tuple[int, ...]:
    """Sizes of the leading axes, which all tensors share as far as they have them."""
    tensors = list(example.values()) if isinstance(example, Mapping) else list(example)
    counts = list(_shared(example, axes).values())
    found = [tuple(t.shape[:count]) for t, count in zip(tensors, counts, strict=True)]
    sizes = max(found, key=len, default=())
    if any(part != sizes[: len(part)] for part in found) or len(sizes) < len(axes) or 0 in sizes:
        raise UsageError(
            "the example's tensors do not share the dynamic axes",
            where="example",
            found=[list(t.shape) for t in tensors],
            expected=f"leading dimensions {', '.join(axes)} of equal sizes above zero",
        )
    return sizes


def _resize(example: Example, sizes: Sequence[int]) -> Example:
    """The example with its leading axes cut or repeated to `sizes`."""

    def resize(tensor: Tensor, count: int) -> Tensor:
        for dim, size in enumerate(sizes[:count]):
            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
        return tensor

    counts = _shared(example, sizes)
    if isinstance(example, Mapping):
        return {name: resize(tensor.cpu(), counts[name]) for name, tensor in example.items()}
    return tuple(resize(tensor.cpu(), counts[i]) for i, tensor in enumerate(example))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, warnings and logs."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _explaining(module: nn.Module) -> Iterator[None]:
    """Whatever the tracer or the runtime raises, as one message."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise RunError(
            "this module could not be exported to ONNX",
            where=type(module).__name__,
            found=f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
            if str(cause).strip()
            else repr(cause),
            fix="look for a branch on a shape or a value in its forward; export half precision as float()",
        ) from error
