"""What a model is, as a short hash."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from limbeck.core.roles import Role

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(model: nn.Module | Role) -> str:
    """A hash of a model's architecture (classes, settings), of all its parameters and buffers, and of a role's preprocessing.

    Device, train or eval mode and `requires_grad` do not enter; one changed bit of a weight does. Of a preprocessing function
    that is not a module, what `repr` says enters; of a forward function, the name of its class.

    Args:
        model: A module, compiled or not, or a role.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = fingerprint(layer)
        >>> with torch.no_grad():
        ...     _ = layer.bias.add_(1)
        >>> len(before), fingerprint(layer) == before
        (32, False)
    """
    digest = hashlib.sha256()
    if isinstance(model, Role):
        for part in _function(model.preprocess):
            digest.update(part)
        model = model.module
    for part in _module(getattr(model, "_orig_mod", model)):
        digest.update(part)
    return digest.hexdigest()[:32]


def structure(module: nn.Module) -> str:
    """A hash of a model's architecture alone: classes, settings, names, kinds and shapes of its parameters and buffers.

    Example:
        >>> structure(nn.Linear(2, 1)) == structure(nn.Linear(2, 1)), structure(nn.ReLU()) == structure(nn.Tanh())
        (True, False)
    """
    digest = hashlib.sha256()
    for part in _module(module, values=False):
        digest.update(part)
    return digest.hexdigest()[:32]


def _module(module: nn.Module, values: bool = True) -> Iterator[Any]:
    for name, part in module.named_modules():
        # Not the class's module: a script's classes live in __main__, and in a module when it is imported.
        yield f"{name}:{type(part).__qualname__}\n".encode()
    yield _ADDRESS.sub("", repr(module)).encode()
    yield json.dumps(_config(module), sort_keys=True, default=str).encode()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield f"{name}:{tensor.dtype}{list(tensor.shape)}\n".encode()
        if values:
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _config(module: nn.Module) -> dict[str, Any]:
    """The configuration of a transformers model, without where it was loaded from and by which version."""
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}


def _function(function: Callable[[Any], Any] | None) -> Iterator[Any]:
    if isinstance(function, nn.Module):
        yield from _module(function)
    elif function is not None:
        yield _ADDRESS.sub("", repr(function)).encode()
