"""Models between two that were trained from one start."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError


def interpolate(a: nn.Module, b: nn.Module, share: float) -> nn.Module:
    """A new model with weights `(1 - share) a + share b`.

    Both must have been trained from the same weights, or what lies between them is nothing (Wortsman et al. 2022). Floating
    parameters and buffers are mixed in fp32 or wider and go back to their dtype; whole numbers, such as counters, are those of
    `a`; running statistics are mixed too, and are better counted again. Shares of 0 and 1 give the ends' bits.

    Args:
        a: The model at 0.
        b: The model at 1, of the same structure.
        share: lambda in [0, 1].

    Returns:
        A copy of `a`, filled.

    Raises:
        UsageError: The share is out of range, or names, shapes or dtypes differ.

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> family = [interpolate(a, b, share) for share in (0.0, 0.5, 1.0)]
        >>> torch.allclose(family[1].weight, (a.weight + b.weight) / 2)
        True
    """
    if not 0 <= share <= 1:
        raise UsageError("the share is out of range", where="share", found=share, expected="in [0, 1]")
    first, second = a.state_dict(), b.state_dict()
    if odd := sorted(first.keys() ^ second.keys()):
        raise UsageError(
            "the models have different tensors", where="interpolate", found=odd[0], expected="one structure"
        )
    for name, tensor in first.items():
        if tensor.shape != second[name].shape or tensor.dtype != second[name].dtype:
            raise UsageError(
                "a tensor differs in form", where=name, found=f"{list(second[name].shape)} {second[name].dtype}",
                expected=f"{list(tensor.shape)} {tensor.dtype}",
            )  # fmt: skip
    mixed = copy.deepcopy(a)
    mixed.load_state_dict({name: _mix(tensor, second[name], share) for name, tensor in first.items()})
    return mixed


def _mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    if share == 0 or not a.is_floating_point():
        return a
    if share == 1:
        return b
    wide = torch.promote_types(a.dtype, torch.float32)
    return ((1 - share) * a.to(wide) + share * b.to(a.device, wide)).to(a.dtype)
