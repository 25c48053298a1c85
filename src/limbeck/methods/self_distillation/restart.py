"""A network at the beginning of training: with fresh random weights, or with weights that were kept."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Copy:
    """A copy of a network, weights and all.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> same, _ = Copy()(net)
        >>> same is net, torch.equal(same.weight, net.weight)
        (False, True)
    """

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The copy, and a record: the structure is that of before."""
        return copy.deepcopy(module), {"kind": f"{__name__}:as_before"}


@dataclass(frozen=True)
class Redraw:
    """A copy of a network whose learned weights are drawn anew, as its parts draw them when they are made.

    Every part is asked to `reset_parameters()`, and then the whole to `init_weights()`, if it has that (models of timm do).
    Buffers that are statistics are reset with their part; parameters that need no gradient stay as they are. What a network's
    constructor did to the weights of its parts beyond that is not done again.

    Args:
        seed: Of the weights; the global generator stays as it was.

    Raises:
        UsageError: Some parameter is drawn by neither; its name is told.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> one, other = Redraw(1)(net)[0], Redraw(1)(net)[0]
        >>> torch.equal(one[0].weight, other[0].weight), torch.equal(one[0].weight, net[0].weight)
        (True, False)
    """

    seed: int

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The network, and a record: the structure is that of before."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        fresh = copy.deepcopy(module).to("cpu")  # so that the draw is the same wherever it will be trained
        kept = {name: p.detach().clone() for name, p in fresh.named_parameters() if not p.requires_grad}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for p in fresh.parameters():
                p.fill_(torch.nan)
            for part in fresh.modules():
                reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
                if callable(reset):
                    reset()
            if callable(init := getattr(fresh, "init_weights", None)):
                init()
            for name, value in kept.items():
                fresh.get_parameter(name).copy_(value)
        _check(module, fresh)
        return fresh.to(device), {"kind": f"{__name__}:as_before"}


def as_before(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a network whose weights alone are others: weights are loaded afterwards."""
    return module


def _check(module: nn.Module, fresh: nn.Module) -> None:
    # Fake tensors have no values to look at.
    real = (name for name, p in fresh.named_parameters() if type(p) is nn.Parameter and p.isnan().any())
    if (left := next(real, None)) is None:
        return
    path, _, _ = left.rpartition(".")
    raise UsageError(
        "a part of the network cannot draw fresh weights",
        where=f"{type(module).__name__}.{left}",
        found=f"{type(module.get_submodule(path)).__name__} without reset_parameters",
        expected="reset_parameters in each part with weights of its own, or init_weights of the whole",
        fix="write one, or set restart=initial, which goes back to the first weights",
    )
