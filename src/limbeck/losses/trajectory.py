"""How far a training came from where another one went."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.errors import UsageError


def trajectory_matching(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """`||end - target||^2 / ||start - target||^2` of flat parameters (Cazenavette et al. 2022, MTT, equation 2).

    1 for a training that went nowhere, 0 for one that arrived.

    Args:
        end: Where the student's training ended `[P]`.
        start: Where both began `[P]`.
        target: Where the expert went `[P]`.

    Raises:
        UsageError: Shapes differ.

    Example:
        >>> import torch
        >>> trajectory_matching(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([2.0, 0.0]))
        tensor(0.2500)
    """
    if not end.shape == start.shape == target.shape:
        found = f"{list(end.shape)}, {list(start.shape)}, {list(target.shape)}"
        raise UsageError("these parameters are not of one network", where="trajectory_matching", found=found)
    return (end - target).square().sum() / (start - target).square().sum()


def input_gradient_norm(gradient: Tensor, norm: str = "sample") -> Tensor:
    """The norms that a penalty on input gradients looks at: one for each sample, or for each pixel over its channels.

    Args:
        gradient: `[B, C, ...]`.
        norm: `sample` `[B]`, or `pixel` `[B, ...]`.

    Example:
        >>> import torch
        >>> input_gradient_norm(torch.ones(2, 4, 3, 3), "pixel").shape, input_gradient_norm(torch.ones(2, 4))
        (torch.Size([2, 3, 3]), tensor([2., 2.]))
    """
    squared = gradient.square()
    total = squared.sum(1) if norm == "pixel" and gradient.ndim > 2 else squared.flatten(1).sum(1)
    return (total + 1e-12).sqrt()  # the root has no slope at 0
