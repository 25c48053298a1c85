"""Folders of saved models: written so that the model's own library loads them, wherever it can."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from limbeck.convert.record import rebuild
from limbeck.core.errors import UsageError, require
from limbeck.export import safetensors
from limbeck.export.files import write_text

_OWN = "limbeck.json"
_DEPTH = "limbeck.convert.layers:inherit_layers"
FORMAT = 1


def save_folder(
    module: nn.Module,
    path: str | os.PathLike[str],
    spec: str,
    *,
    num_classes: int | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a model so that `load_model(path)` gives it back.

    Sentence encoders are written as sentence-transformers, models of transformers and timm in the forms of these libraries;
    all others, and those that conversions have changed otherwise than in depth, as weights with the spec and the
    conversions that make the structure again.

    Args:
        module: The model.
        path: The folder.
        spec: What `load_model` made it from, or its teacher where `records` convert that.
        num_classes: What `load_model` was given.
        records: Its conversions, in their order.
    """
    path, model = Path(path), cast(Any, module)
    described = all(record["kind"] == _DEPTH for record in records)  # a configuration tells the number of layers
    if hasattr(model, "tokenize") and hasattr(model, "save"):
        model.save(path)
    elif described and hasattr(model, "save_pretrained") and hasattr(model, "config"):
        model.save_pretrained(path)
    elif spec.startswith("timm:") and not records:
        require("timm.models", extra="vision").save_for_hf(module, str(path), safe_serialization=True)
    else:
        recipe = {"format": FORMAT, "model": spec, "num_classes": num_classes, "records": list(records)}
        safetensors.save(module, path / "model.safetensors", recipe)
        write_text(path / _OWN, json.dumps(recipe, indent=2) + "\n")


def load_folder(path: Path) -> nn.Module:
    """The model in a folder of `save_folder`, sentence-transformers, transformers or timm.

    Raises:
        UsageError: It holds no model, or weights that do not fit.
    """
    from limbeck.models.load import load_model

    if (path / "modules.json").is_file():
        return load_model(f"st:{path}")
    if (path / _OWN).is_file():
        return _own(path)
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return load_model(f"timm:local-dir:{path}" if isinstance(config.get("architecture"), str) else f"hf:{path}")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "an empty folder"
    expected = f"{_OWN}, or the config.json or modules.json of transformers, timm or sentence-transformers"
    raise UsageError("there is no model in this folder", where=path, found=found, expected=expected)


def _own(path: Path) -> nn.Module:
    from limbeck.models.load import load_model

    try:
        recipe = json.loads((path / _OWN).read_text(encoding="utf-8"))
        spec, classes, records = recipe["model"], recipe["num_classes"], recipe["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("this does not describe a saved model", where=path / _OWN, found=repr(error)) from None
    try:
        module = load_model(spec, num_classes=classes, pretrained=spec.startswith("st:"))
    except UsageError as error:
        raise UsageError(
            "the structure of this model cannot be made again",
            where=path,
            found=f"{spec}: {error.what}",
            expected="a spec of load_model",
            fix=f"build the module and fill it: limbeck.export.safetensors.load(module, '{path / 'model.safetensors'}')",
        ) from error
    module = rebuild(module, records)
    safetensors.load(module, path / "model.safetensors")
    return module
