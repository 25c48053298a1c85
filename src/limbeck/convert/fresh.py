"""Roles that hold something new: a module made in the place of another, which only lends its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Fresh:
    """A new module of Limbeck's, whatever the old one was.

    Args:
        make: Its class, such as `"limbeck.nn.motion:SpatialHead"`.
        arguments: What it is made with; plain data.
        seed: Of its weights.

    Raises:
        UsageError: The class is not one of `limbeck.nn`.

    Example:
        >>> head, record = Fresh("limbeck.nn.motion:SpatialHead", {"channels": 4})(nn.Identity())
        >>> type(head).__name__, record["arguments"]
        ('SpatialHead', {'channels': 4})
    """

    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The new module, and the record that rebuilds its structure."""
        record = {"kind": f"{__name__}:fresh", "make": self.make, "arguments": dict(self.arguments)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return fresh(module, record), record


def fresh(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a new module, from the record of its conversion."""
    path, _, name = record["make"].partition(":")
    if not path.startswith("limbeck.nn."):
        raise UsageError("only modules of limbeck.nn are made", where="make", found=record["make"])
    made: nn.Module = getattr(import_module(path), name)(**record["arguments"])
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return made if first is None else made.to(first.device)
