"""Condensed sets as data, with real samples to judge by what is trained on them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.condensed import Condensed
from limbeck.data.condensed_graphs import CondensedGraphs, graphs_folder
from limbeck.data.data import Data
from limbeck.data.graphs import Graphs
from limbeck.data.lessons import CondensedSource, SetsSource
from limbeck.data.options import DataOptions
from limbeck.data.synthetic import classified, load_synthetic
from limbeck.models.specs import is_object


def load_condensed(path: str, o: DataOptions, tokenizer: Any = None) -> Data:
    """A condensed or synthetic set as `train`, as `test` held-out samples: those named, else those of the run that made the set.

    Args:
        path: The set's folder, or that of the run.
        o: `held_out`, and how it is read.
        tokenizer: For texts.

    Raises:
        UsageError: There is no set, or held-out samples are of another form or have no labels.
    """
    drawn = load_synthetic(path)
    train: Any
    if graphs_folder(path) is not None:
        train = SetsSource(CondensedGraphs.load(path), seed=o.seed)
    else:
        train = CondensedSource(Condensed.load(path) if drawn is None else drawn.condensed())
    if not len(train):
        raise UsageError("there is nothing to train on", where=path, found="a condensed set without samples")
    if o.held_out is None:
        test, where = _found(Path(path)), "the data of the run that made this set"
    else:
        from limbeck.data.load import load_data

        options = vars(replace(o, held_out=None, unlabelled=None))
        test, where = load_data(o.held_out, **options), "data.held_out"
    if test is None:
        return Data(train=train)
    held = test.get("test") or test.get("validation") or test.train
    held = held if drawn is None else classified(held)
    _check(train, held, where)
    return Data(train=train, test=held)


def _found(path: Path) -> Data | None:
    """The data of the run that made a set; None where they cannot be had, which is told."""
    from limbeck.core.recipe import resolve_data
    from limbeck.data.load import load_data

    recipe = next((p / "recipe.yaml" for p in (path, path.parent) if (p / "recipe.yaml").is_file()), None)
    if recipe is None:
        why = "no run lies beside the set"
    else:
        named = resolve_data(yaml.safe_load(recipe.read_text(encoding="utf-8")).get("data"), recipe.parent)
        options = dict(named) if isinstance(named, Mapping) else {"spec": named}
        spec = str(options.pop("spec"))
        if re.match(r"an? ", spec):
            why = f"the data of the run that made the set were objects of a program's ({spec})"
        elif is_object(spec):
            why = f"the data of the run that made the set are made by Python code ({spec}), which is not run unasked"
        else:
            try:
                return load_data(spec, **options)
            except UsageError as error:
                why = f"the data of the run that made the set cannot be read ({error.what}: {spec})"
    told = f"{why}: there are no samples to judge by; give some with --set data.held_out=SPEC"
    warnings.warn(told, stacklevel=2)
    return None


def _check(train: Any, held: Any, where: str) -> None:
    graphs = isinstance(train, SetsSource)
    if graphs != isinstance(held, Graphs):
        raise UsageError(
            "the held-out samples are of another kind", where=where, found=type(held).__name__,
            expected="graphs" if graphs else "samples like those of the set",
        )  # fmt: skip
    if graphs:
        return
    batch = held.batch(train.ids[:1] * 0, 0)
    shape, expected = list(batch.x.shape[1:]) if isinstance(batch.x, Tensor) else repr(batch), list(train.x.shape[1:])
    if shape != expected:
        raise UsageError(
            "the held-out samples are of another form", where=where, found=shape, expected=expected,
            fix="read them as the data of the set were: data.image_size=..., data.features=...",
        )  # fmt: skip
    if batch.get("y") is None:
        raise UsageError("the held-out samples have no labels", where=where, expected="a class for each sample")
