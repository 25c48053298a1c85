"""What is checked of models, data and folders before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import LimbeckError, UsageError
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.data import Data
from limbeck.data.combine import check_unlabelled
from limbeck.evaluate.cost import evaluating
from limbeck.models.load import model_image_size

RUN_FILES = ("metrics.json", "recipe.yaml")  # in the order in which they are written


def check_out(out: Path) -> None:
    """The folder can be written to, and holds nothing but a run."""
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(
            "the run's folder cannot be written",
            where=out,
            found=f"{above} is {'not writable' if above.is_dir() else 'a file'}",
            expected="a folder that can be made or written",
            fix="choose another with --out",
        )
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
    if names - {RUN_FILES[0]} and not names >= set(RUN_FILES):  # a start may have been killed after the first file
        raise UsageError(
            "the run's folder holds other files",
            where=out,
            found=", ".join(sorted(names)[:3]),
            expected="no folder, an empty one, or that of the same run",
            fix="choose another with --out",
        )


def check_roles(method: Method, roles: Roles, optim: Mapping[str, OptimSpec]) -> None:
    """The method's roles are there, and optimizers are given for roles that learn."""
    for name in (*method.trains, *method.frozen):
        if name not in roles:
            raise UsageError(
                f"the method needs a {name}, and there is none",
                where=name,
                expected="a model",
                fix=f"give one: {name}: timm:resnet18, or --{name} timm:resnet18",
            )
    known = dict.fromkeys((*method.trains, *method.makes, *roles))
    for name in optim:
        if name not in known:
            raise UsageError(
                "an optimizer is given for a role that there is not",
                where=f"optim.{name}",
                found=name,
                expected=" or ".join(known),
                fix="rename or remove it",
            )


def check_data(data: Data, roles: Roles, method: Method) -> None:
    """Models that read the data take them and answer with numbers; labels are classes of the roles that give logits."""
    batch = first_batch(data.train)
    if "unlabelled" in data:
        check_unlabelled(data.unlabelled)
    outputs = {name: answer(roles, name, batch) for name in roles if method.reads is None or name in method.reads}
    labels = getattr(data.train, "labels", None)
    labels = batch.get("y") if labels is None else labels
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return
    for name, output in outputs.items():
        if name in method.logits and output.ndim == 2 and not hasattr(roles[name].module, "encode"):
            _check_classes(name, output.shape[1], data.classes, labels)


def answer(roles: Roles, name: str, batch: Batch) -> Tensor:
    """A role's output for a batch in evaluation mode; what goes wrong is told in one message."""
    module = roles[name].module
    fix = "give data of the form that the model takes"
    if isinstance(batch.get("x"), Tensor) and batch.x.ndim == 4 and (size := model_image_size(module)):
        fix += f"; it was made for images of {size} pixels: data.image_size={size}"
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with explained(f"the {name} cannot work with these data", name, repr(batch), fix), evaluating(module):
        output = roles[name](batch.to(device))
    if not bool(output.isfinite().all()):
        raise UsageError(
            f"the {name} answers with numbers that are not finite",
            where=name,
            found="NaN or infinity for the first samples",
            expected="finite numbers",
            fix="look at the weights, and at the first samples of the data",
        )
    return output


def first_batch(source: Source, size: int = 2) -> Batch:
    """The first samples of a source."""
    if not len(source):
        raise UsageError("there are no samples", where="data.train", found="0 samples", expected="at least one")
    with explained("a sample cannot be read", "data.train"):
        batch = source.batch(torch.arange(min(size, len(source))), 0)
    return batch


@contextmanager
def explained(what: str, where: str, given: str | None = None, fix: str | None = None) -> Iterator[None]:
    """Whatever a model or data set of others raises, as one message."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        found = (str(error).splitlines() or [""])[0]
        expected = None if given is None else f"a model that takes {given}"
        raise UsageError(
            what, where=where, found=f"{type(error).__name__}: {found}", expected=expected, fix=fix
        ) from error


def _check_classes(name: str, count: int, classes: tuple[str, ...] | None, labels: Tensor) -> None:
    if classes is not None and len(classes) != count:
        raise UsageError(
            f"{name} and data have different classes",
            where=name,
            found=f"the {name} has {count} classes, the data have {len(classes)}",
            expected=f"a model with {len(classes)} classes",
            fix=f"use a {name} that was trained on these classes: NAME@weights.safetensors, or file.py:function",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        raise UsageError(
            "a label is out of range",
            where="data.train",
            found=f"labels from {low} to {high}",
            expected=f"0 to {count - 1}, for the {count} classes of the {name}",
            fix="number the classes from 0, or use models with as many classes as the data",
        )
