"""Whether two callables compute the same thing."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from limbeck.core.errors import RunError


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from its reference.

    Args:
        max_abs_error: Largest difference of any element.
        max_rel_error: The largest difference in an output over the largest magnitude in it.
        outputs: Tensors compared.
    """

    max_abs_error: float
    max_rel_error: float
    outputs: int


def check_parity(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Iterable[tuple[Any, ...] | Mapping[str, Any]],
    tolerance: float = 1e-4,
    what: str = "the converted model",
) -> Parity:
    """Call both on the same inputs and compare every output tensor.

    An element may differ by `tolerance` times the largest magnitude in its output; whole numbers and truth values must
    be equal, and NaN or Inf must stand in the same places.

    Args:
        reference: What is right, such as the module; called without gradients.
        candidate: What is to be checked.
        inputs: Per call: positional arguments, or a mapping of keyword arguments.
        tolerance: Largest relative difference allowed.
        what: Name of the candidate in the error.

    Returns:
        The largest differences over all calls.

    Raises:
        RunError: An output differs in number, shape or value.

    Example:
        >>> double = lambda x: 2 * x
        >>> check_parity(double, lambda x: x + x, [(torch.ones(3),), (torch.zeros(2, 2),)])
        Parity(max_abs_error=0.0, max_rel_error=0.0, outputs=2)
    """
    worst_abs, worst_rel, outputs = 0.0, 0.0, 0
    for call in inputs:
        with torch.no_grad():
            a, b = _tensors(_apply(reference, call)), _tensors(_apply(candidate, call))
        if [t.shape for t in a] != [t.shape for t in b]:
            raise RunError(
                f"{what} returns other shapes", where=_sizes(call), found=_shapes(b), expected=_shapes(a), fix=_FIX
            )
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            error, relative = _difference(x, y)
            if not relative <= (tolerance if x.is_floating_point() else 0):
                raise RunError(
                    f"{what} computes something else",
                    where=f"output {i}, inputs {_sizes(call)}",
                    found=f"a relative difference of {relative:.3g}",
                    expected=f"at most {tolerance:.3g}",
                    fix=_FIX,
                )
            worst_abs, worst_rel = max(worst_abs, error), max(worst_rel, relative)
        outputs += len(a)
    return Parity(worst_abs, worst_rel, outputs)


_FIX = "look for a branch on a shape or a value, or a random operation, in the module's forward"


def _apply(fn: Callable[..., Any], call: tuple[Any, ...] | Mapping[str, Any]) -> Any:
    return fn(**call) if isinstance(call, Mapping) else fn(*call)


def _tensors(output: Any) -> list[Tensor]:
    # A ModelOutput of transformers is a mapping that pytree may not know.
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [t.cpu() for t in leaves if isinstance(t, Tensor)]


def _difference(reference: Tensor, candidate: Tensor) -> tuple[float, float]:
    """Largest absolute and relative difference; infinite where NaN or Inf stand in other places."""
    a, b = reference.double(), candidate.double()
    finite = a.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not torch.equal(finite, b.isfinite()):
        return float("inf"), float("inf")
    if not finite.any():
        return 0.0, 0.0
    error = (a - b)[finite].abs().max().item()
    return error, error / max(1e-6, a[finite].abs().max().item())


def _sizes(call: tuple[Any, ...] | Mapping[str, Any]) -> str:
    return _shapes([t for t in tree_leaves(dict(call) if isinstance(call, Mapping) else call) if isinstance(t, Tensor)])


def _shapes(tensors: list[Tensor]) -> str:
    return " ".join(str(list(t.shape)) for t in tensors) or "none"
