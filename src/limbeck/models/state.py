"""Files of weights as tensors by their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from limbeck.core.errors import UsageError


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dictionary in a `.safetensors` file or one of `torch.save`; pickled code is not run.

    What training scripts keep under `state_dict` or `model`, and the `module.` of names, is unwrapped.

    Args:
        path: The file.

    Raises:
        UsageError: There is no such file, it is damaged, or it holds anything else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {"module.weight": torch.ones(2)}}, f"{folder}/w.pt")
        ...     read_state(f"{folder}/w.pt")
        {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("there is no such weights file", where=path, fix="correct the path")
    try:
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many kinds for a damaged or unsafe file
        raise _unreadable(path, " ".join(str(error).split())[:300]) from None
    if not isinstance(state, Mapping):
        raise _unreadable(path, type(state).__name__)
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise _unreadable(path, f"no tensors under {', '.join(map(str, [*state][:5])) or 'any name'}")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _unreadable(path: Path, found: str) -> UsageError:
    expected = "a state dictionary: tensors by their names, without pickled code"
    return UsageError("these weights cannot be loaded", where=path, found=found, expected=expected)
