"""Folders of saved models: written so that the model's own library loads them, wherever it can."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from limbeck.convert.record import MANIFEST, load_student, save_student
from limbeck.core.errors import UsageError, require
from limbeck.data.condensed import Condensed, condensed_folder
from limbeck.data.condensed_graphs import CondensedGraphs, graphs_folder

_DEPTH = "limbeck.convert.layers:inherit_layers"


def save_folder(
    module: nn.Module,
    path: str | os.PathLike[str],
    spec: str | None = None,
    *,
    num_classes: int | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a model so that `load_model(path)` gives it back.

    Sentence encoders are written as sentence-transformers, models of transformers and timm in the forms of these libraries,
    condensed data sets as `Condensed.save` does; all others, and those that conversions have changed otherwise than in depth,
    as a student's folder (`save_student`).

    Args:
        module: The model.
        path: The folder.
        spec: What `load_model` made it from, or its teacher where `records` convert that; None for a model of one's own.
        num_classes: What `load_model` was given.
        records: Its conversions, in their order.
    """
    path, model = Path(path), cast(Any, module)
    if isinstance(module, Condensed | CondensedGraphs):
        module.save(path)
        return
    described = all(record["kind"] == _DEPTH for record in records)  # a configuration tells the number of layers
    if hasattr(model, "tokenize") and hasattr(model, "save"):
        model.save(path)
    elif described and hasattr(model, "save_pretrained") and hasattr(model, "config"):
        model.save_pretrained(path)
    elif spec is not None and spec.startswith("timm:") and not records:
        require("timm.models", extra="vision").save_for_hf(module, str(path), safe_serialization=True)
    else:
        save_student(path, module, records, spec, num_classes=num_classes)


def load_folder(path: Path, module: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """The model in a folder of `save_folder`, sentence-transformers, transformers or timm, or the student of a run.

    Args:
        path: The folder.
        module: As for `load_student`: the model before its conversions, where that is of one's own.
        trust: As for `load_student`: whether Python code that the folder names may be run.

    Raises:
        UsageError: It holds no model, weights that do not fit, or asks for trust.
    """
    from limbeck.models.load import load_model

    if condensed_folder(path) is not None:
        return Condensed.load(path)
    if graphs_folder(path) is not None:
        return CondensedGraphs.load(path)
    if (path / "student").is_dir():
        return load_folder(path / "student", module, trust)
    if module is not None or (path / MANIFEST).is_file():
        return load_student(path, module, trust)
    if (path / "modules.json").is_file():
        return load_model(f"st:{path}")
    if (path / "config.json").is_file():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError("this file is damaged", where=path / "config.json", found=error, expected="JSON") from None
        return load_model(f"timm:local-dir:{path}" if isinstance(config.get("architecture"), str) else f"hf:{path}")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "an empty folder"
    expected = f"{MANIFEST}, or the config.json or modules.json of transformers, timm or sentence-transformers"
    raise UsageError("there is no model in this folder", where=path, found=found, expected=expected)
