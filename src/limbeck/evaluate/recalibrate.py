"""Running statistics of batch norms, measured anew: those of a sub-network are not those of the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from limbeck.core.adapt import call

_NORMS = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def recalibrate(module: nn.Module, inputs: Iterable[Any]) -> nn.Module:
    """Set the running mean and variance of all batch norms to their averages over some batches.

    Args:
        module: A model of its own, such as `Elastic.extract` gives; changed in place and left in evaluation mode.
        inputs: Model inputs, batch by batch; training data without labels.

    Returns:
        The module.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> recalibrate(norm, [x]).running_mean, norm.running_var
        (tensor([2., 4.]), tensor([2., 8.]))
    """
    norms = [part for part in module.modules() if isinstance(part, _NORMS) and part.track_running_stats]
    if not norms:
        return module.eval()
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of all batches
        norm.train()
    for x in inputs:
        call(module, x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return module.eval()
