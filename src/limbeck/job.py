"""A job: a recipe with its models and data in place, checked before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import LimbeckError, UsageError
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.recipe import Recipe
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.data import Data
from limbeck.engine.runtime import make_runtime
from limbeck.engine.settings import Engine
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.tasks import Evaluator, evaluator

_FREE = {"out", *(f"engine.{name}" for name in ("workers", "checkpoint_every", "keep", "trackers", "device", "processes"))}


@dataclass(frozen=True)
class Job:
    """What `run` executes.

    Args:
        method: The program.
        roles: The models.
        data: The data.
        engine: How it is executed.
        optim: How each role is optimised.
        evaluate: Judges the student while it learns, on the validation data; None where there are none.
        test: Judges teacher and student on data that training never sees.
        recipe: What this was made from, as plain data.
        out: The run's folder.
        budget: Seconds for the whole run; None runs as many steps as the engine's settings say.
    """

    method: Method
    roles: Roles
    data: Data
    engine: Engine
    optim: Mapping[str, OptimSpec]
    evaluate: Evaluator | None
    test: Evaluator | None
    recipe: Recipe
    out: Path
    budget: float | None = None

    def with_steps(self, steps: int) -> Job:
        """The job with a number of steps, in the recipe as well."""
        engine = replace(self.engine, steps=steps)
        return replace(self, engine=engine, recipe=self.recipe.model_copy(update={"engine": engine}), budget=None)


def assemble(
    recipe: Recipe,
    teacher: nn.Module | None,
    student: nn.Module,
    data: Data,
    optim: Mapping[str, OptimSpec],
    budget: float | None,
) -> Job:
    """The job of models and data that are there, after all checks that need no training step.

    Raises:
        UsageError: Something does not fit.
    """
    method, engine = recipe.method, recipe.engine
    out = Path(recipe.out) if recipe.out else default_out(recipe)
    check_out(out)
    device = make_runtime(replace(engine, processes=1, shard=())).device
    roles = Roles(student=student) if teacher is None else Roles(teacher=teacher, student=student)
    check_roles(method, roles, optim)
    check_data(data, roles)
    for _, role in roles.items():
        role.module.to(device)
    with torch.random.fork_rng():  # a look at the models changes nothing
        method.check(roles, first_batch(data.train).to(device))
    validation, test = data.get("validation"), data.get("test") or data.get("validation")
    judges = [None if source is None else evaluator(source, engine.batch_size) for source in (validation, test)]
    return Job(method, roles, data, engine, optim, *judges, recipe, out, budget)


def default_out(recipe: Recipe) -> Path:
    """`runs/METHOD-STUDENT`."""
    student = re.sub(r"\W+", "-", recipe.student.rpartition("/")[2].rpartition(":")[2]).strip("-")
    return Path("runs") / f"{type(recipe.method).__name__.lower()}-{student}"


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
    if out.is_dir() and any(out.iterdir()) and not (out / "recipe.yaml").exists():
        raise UsageError(
            "the run's folder holds other files",
            where=out,
            found=", ".join(sorted(p.name for p in out.iterdir())[:3]),
            expected="no folder, an empty one, or that of the same run",
            fix="choose another with --out",
        )


def claim(job: Job) -> Job:
    """The job that an earlier start of the same run recorded in the folder, or the job itself.

    Raises:
        UsageError: The folder holds another run.
    """
    path = job.out / "recipe.yaml"
    if not path.exists():
        return job
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    if job.budget is not None:  # the number of steps was found by the first start
        job = job.with_steps(recorded["engine"]["steps"])
    here, there = _identity(job.recipe.dump()), _identity(recorded)
    for field in (*here, *there):
        if here.get(field) != there.get(field):
            raise UsageError(
                "the run's folder holds another run",
                where=f"{job.out}: {field}",
                found=there.get(field, "nothing"),
                expected=here.get(field, "nothing"),
                fix="choose another folder with --out, or delete this one",
            )
    return job


def _identity(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The fields of a recipe, flat, without those that two starts of one run may differ in."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        field = f"{path}{name}"
        if isinstance(value, Mapping) and value:
            flat |= _identity(value, f"{field}.")
        elif field not in _FREE:
            flat[field] = value
    return flat


def check_roles(method: Method, roles: Roles, optim: Mapping[str, OptimSpec]) -> None:
    """The method's roles are there, and optimizers are given for roles that learn."""
    for name in (*method.trains, *method.frozen):
        roles[name]
    for name in optim:
        if name not in roles and name not in method.trains:
            raise UsageError(
                "an optimizer is given for a role that there is not",
                where=f"optim.{name}",
                found=name,
                expected=" or ".join(dict.fromkeys((*method.trains, *roles))),
                fix="rename or remove it",
            )


def check_data(data: Data, roles: Roles) -> None:
    """Every model takes the data and answers with numbers; the labels are classes that the models have."""
    batch = first_batch(data.train)
    scores = {name: answer(roles, name, batch) for name in roles}
    classes = data.classes
    labels = getattr(data.train, "labels", None)
    labels = batch.get("y") if labels is None else labels
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return
    for name, output in scores.items():
        count = output.shape[-1]
        if output.ndim != 2:
            continue
        if classes is not None and len(classes) != count:
            raise UsageError(
                f"{name} and data have different classes",
                where=f"roles.{name}",
                found=f"the {name} has {count} classes, the data {len(classes)}",
                expected=f"{len(classes)} classes",
                fix=f"use a {name} that was trained on these classes" if name == "teacher" else "change its last layer",
            )
        if int(labels.max()) >= count or int(labels.min()) < 0:
            raise UsageError(
                "a label is out of range",
                where="data.train",
                found=f"labels {int(labels.min())} to {int(labels.max())}",
                expected=f"0 to {count - 1}, the {count} classes of the {name}",
                fix="number the classes from 0, or use models with as many classes as the data",
            )


def answer(roles: Roles, name: str, batch: Batch) -> Tensor:
    """A role's output for a batch in evaluation mode; what goes wrong is told in one message."""
    role = roles[name]
    with _explained(f"the {name} cannot work with these data", f"roles.{name}", batch), evaluating(role.module):
        output = role(batch.to(next((p.device for p in role.module.parameters()), torch.device("cpu"))))
    if not bool(output.isfinite().all()):
        raise UsageError(
            f"the {name} answers with numbers that are not finite",
            where=f"roles.{name}",
            found="NaN or infinity for the first samples",
            fix="look at the data for NaN, and at the weights",
        )
    return output


def first_batch(source: Source, size: int = 2) -> Batch:
    """The first samples of a source."""
    if not len(source):
        raise UsageError("there are no samples", where="data.train", found="0 samples", expected="at least one")
    with _explained("a sample cannot be read", "data.train"):
        return source.batch(torch.arange(min(size, len(source))), 0)


@contextmanager
def _explained(what: str, where: str, batch: Batch | None = None) -> Iterator[None]:
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:  # models and data sets of others raise anything
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        given = None if batch is None else f"a model that takes {batch!r}"
        raise UsageError(what, where=where, found=found, expected=given) from error


def describe(value: Any) -> str:
    """What a recipe says of a model or data set that is an object of the caller's.

    Example:
        >>> describe("timm:resnet18"), describe(nn.Linear(2, 1))
        ('timm:resnet18', 'torch.nn.modules.linear.Linear object')
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return f"{type(value).__module__}.{type(value).__qualname__} object"
