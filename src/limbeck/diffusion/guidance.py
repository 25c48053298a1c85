"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

Scale = float | Tensor


def guided(
    denoise: Callable[..., Tensor], x_t: Tensor, t: Tensor, condition: Tensor, null: Tensor, scale: Scale = 1.0
) -> Tensor:
    """What a denoiser predicts under guidance, `D_null + scale (D_condition - D_null)`, in one call of twice the batch.

    The rule is the same for all predictions. Scale 1 is the conditional prediction and 0 the unconditional one, each a call of
    the batch itself; below 1 it pulls towards the unconditional one (Ho and Salimans 2022).

    Args:
        denoise: Called as `denoise(x_t, t=t, condition=condition)`.
        x_t: Noisy samples `[B, ...]`.
        t: Times `[B]`.
        condition: Class labels `[B]`, or embeddings `[B, ...]`.
        null: The condition that says nothing, in the same form.
        scale: A number, or one for each sample `[B]`.

    Raises:
        UsageError: There are neither one scale nor as many as samples.

    Example:
        >>> def denoise(x, t, condition):
        ...     return condition[:, None].float() * torch.ones_like(x)
        >>> x, t, c = torch.zeros(2, 1), torch.ones(2), torch.tensor([1, 2])
        >>> guided(denoise, x, t, c, torch.zeros_like(c), 3.0).flatten().tolist()
        [3.0, 6.0]
    """
    if isinstance(scale, Tensor) and scale.numel() not in (1, len(x_t)):
        raise UsageError("one scale for each sample", where="scale", found=list(scale.shape), expected=[len(x_t)])
    if not isinstance(scale, Tensor):
        if scale == 1.0:
            return denoise(x_t, t=t, condition=condition)
        if scale == 0.0:
            return denoise(x_t, t=t, condition=null)
    both = denoise(torch.cat([x_t, x_t]), t=torch.cat([t, t]), condition=torch.cat([condition, null]))
    with_it, without = both.chunk(2)
    factor: Any = scale.view(-1, *(1,) * (x_t.ndim - 1)).to(x_t.device) if isinstance(scale, Tensor) else scale
    return without + factor * (with_it - without)
