"""Weights in safetensors files, with what they are written beside them."""

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.core.files import aside

_KEY = "limbeck"


def save(module: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a module's state, tied tensors once, whole or not at all.

    Args:
        module: What to save.
        path: The `.safetensors` file.
        metadata: JSON data kept in the file's header, such as lineage.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(nn.Linear(2, 1), f"{folder}/model.safetensors", {"method": "kd"})
        ...     load(nn.Linear(2, 1), f"{folder}/model.safetensors")
        {'method': 'kd'}
    """
    header = {"format": "pt", _KEY: json.dumps(dict(metadata or {}))}
    with aside(path) as scratch:
        save_model(module, str(scratch), metadata=header)


def load(module: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fill a module with a file's weights; every tensor must be found on both sides, in the same shape.

    Args:
        module: A module of the architecture that was saved; partly filled, and of no use, when the file does not fit.
        path: The `.safetensors` file.

    Returns:
        The metadata it was saved with; empty for files of other programs.

    Raises:
        UsageError: There is no such file, it is damaged, or it is another architecture's.
    """
    metadata = read_metadata(path)
    try:
        load_model(module, path)
    except RuntimeError as error:
        raise UsageError(
            "these weights are not of this architecture",
            where=path,
            found=str(error).removeprefix("Error(s) in loading state_dict for "),
            fix="build the module that was saved; the file's metadata says which",
        ) from None
    return metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata in a file's header, read without its tensors.

    Raises:
        UsageError: There is no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(_KEY, "{}"))
    except FileNotFoundError:
        raise UsageError("there is no such weights file", where=path, fix="correct the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            "this is not a whole safetensors file", where=path, found=error, fix="save or copy it again"
        ) from None
