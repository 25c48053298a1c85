"""The public verbs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import __version__
from limbeck.checks import first_batch
from limbeck.core import registry
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.recipe import Recipe, plain
from limbeck.core.registry import Card
from limbeck.core.roles import Roles
from limbeck.data.condensed import Condensed
from limbeck.data.condensed_graphs import CondensedGraphs
from limbeck.engine.run import Result, execute
from limbeck.engine.settings import Engine
from limbeck.evaluate.generation import Generation, save_samples
from limbeck.evaluate.own_training import NAME as OWN_TRAINING
from limbeck.evaluate.own_training import own_settings
from limbeck.evidence import Evidence
from limbeck.job import Job, Origin, claim, describe, gather, leads, seen
from limbeck.models.folder import load_folder, save_folder
from limbeck.report.run import write_report
from limbeck.teachers import Cached, collect
from limbeck.teachers.fingerprint import fingerprint
from limbeck.timing import seconds_of, steps_within

_ENCODERS = ("SentenceTransformer", "SentenceEncoder")


def distill(
    teacher: str | nn.Module | Sequence[str | nn.Module] | None,
    student: str | nn.Module,
    data: Any,
    method: str | Method | None = None,
    *,
    budget: str | float | None = None,
    out: str | os.PathLike[str] | None = None,
    engine: Engine | Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    cache: str | os.PathLike[str] | None = None,
    progress: str = "auto",
    **fields: Any,
) -> Result:
    """Distil a teacher into a student, judge both on data that training never saw, and write the report.

    Called again with the same arguments and `out`, it goes on where it stopped.

    Args:
        teacher: A module, or what `load_model` reads, such as `"timm:resnet50"`; several make an ensemble.
        student: The same.
        data: A `Data`, a data set of torch, `(x, y)` tensors, or what `load_data` reads, such as a folder.
        method: A method, or its name; default: see `default_method`.
        budget: Time for the whole run, such as `"2m"` or seconds; sets `engine.steps`.
        out: The run's folder; default `runs/METHOD-STUDENT`.
        engine: How it is executed.
        optim: How each role is optimised: `Optim`, its fields, or a function from a module to an optimizer.
        pretrained: Whether a student of a library starts from the library's trained weights, or from random ones.
        cache: A folder for the teacher's outputs on the training data, which then stand in for the teacher.
        progress: `"auto"`, `"bar"`, `"lines"` or `"off"`.
        **fields: Hyper-parameters of the method, where it is given by name.

    Returns:
        The roles, the history and the numbers; `result.out` is the run's folder, with `report.html` and `student/`.

    Raises:
        UsageError: Something does not fit; found before any work.
        RunError: The run had to stop.

    Example:
        >>> import tempfile
        >>> x, y = torch.randn(400, 4), torch.arange(400) % 3
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        ...     result = distill(teacher, student, (x, y), "kd", out=folder, engine={"epochs": 1}, progress="off")
        ...     sorted(path.name for path in Path(folder).glob("*.html")), result.roles.student is not None
        (['report.html'], True)
    """
    given = {role: spec for role, spec in (optim or {}).items() if callable(spec)}
    tree: dict[str, Any] = {
        "teacher": None if teacher is None else describe(teacher),
        "student": describe(student),
        "pretrained": pretrained,
        "cache": None if cache is None else os.fspath(cache),
        "data": describe(data),
        "method": method or default_method(teacher, data),
        "engine": plain(engine or {}),
        "optim": {role: plain(spec) for role, spec in (optim or {}).items() if role not in given},
        "out": None if out is None else os.fspath(out),
    }
    if not optim and _alone(teacher, data, tree["method"]):
        tree |= own_settings(data, tree["engine"])
    if isinstance(tree["method"], str):
        tree["method"] = {"name": tree["method"], **fields}
    elif fields:
        raise UsageError(
            "a method that is given whole takes no further fields", where="method", found=", ".join(fields)
        )
    recipe = Recipe.parse(tree)
    seconds = None if budget is None else seconds_of(budget)
    return run(gather(recipe, teacher, student, data, recipe.optim | given, seconds), progress=progress)


def build(recipe: Recipe | str | os.PathLike[str], budget: str | float | None = None) -> Job:
    """Load the models and data of a recipe and check that they fit; no training step is done.

    Args:
        recipe: A recipe, or its file.
        budget: Time for the whole run, such as `"2m"` or seconds.

    Raises:
        UsageError: Something does not fit.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(os.fspath(recipe))
    seconds = None if budget is None else seconds_of(budget)
    return gather(recipe, recipe.teacher, recipe.student, recipe.data, recipe.optim, seconds)


def run(job: Job | Recipe | str | os.PathLike[str], *, progress: str = "auto") -> Result:
    """Execute a job or a recipe to its end, or go on with it where it stopped; judge, save and report.

    Args:
        job: A job, a recipe or its file.
        progress: `"auto"`, `"bar"`, `"lines"` or `"off"`.

    Raises:
        UsageError: Something does not fit; found before any work.
        RunError: The run had to stop.
    """
    began = time.perf_counter()
    job = claim(job if isinstance(job, Job) else build(job))
    evidence = Evidence.begin(job)
    if job.stored:
        layers = _layers(job)
        _open(job, evidence)
        folder = job.recipe.cache or job.out / "cache"
        for name, role in job.roles.teachers.items():
            own = folder if name == "teacher" else Path(folder) / name
            source, size = job.taught or seen(job.data), job.engine.batch_size
            store = collect(role, source, own, batch_size=size, layers=layers[name])
            setattr(job.roles, name, Cached(store))
    if job.budget is not None:
        job = job.with_steps(steps_within(job, job.budget - (time.perf_counter() - began), evidence.seconds))
    _open(job, evidence)
    result = execute(
        job.method,
        job.roles,
        job.data,
        job.engine,
        optim=job.optim,
        evaluate=job.evaluate,
        out=job.out,
        progress=progress,
    )
    if leads():
        _sign(job, result.roles)
        evidence.finish(job, result.roles, time.perf_counter() - began)
        _save(job, result.roles)
        if isinstance(job.test, Generation):
            save_samples(job.test, result.roles, job.out)
        write_report(job.out)
    return result


def load(path: str | os.PathLike[str], module: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """The student of a run.

    Args:
        path: The run's folder, or the student's own.
        module: An untrained student, where it is a module of the caller's, whose code is not stored.
        trust: Whether Python code that the folder names may be run, such as `file.py:function`.

    Raises:
        UsageError: There is no student in the folder, or it is damaged, another one, or asks for trust.
    """
    if not Path(path).is_dir():
        raise UsageError("there is no such folder", where=path, expected="that of a run, or of a student")
    return load_folder(Path(path), module, trust)


def methods() -> dict[str, Card]:
    """The card of every method, by name.

    Example:
        >>> "pld" in methods()
        True
    """
    return {name: registry.card(name) for name in sorted(registry.METHODS)}


def default_method(teacher: Any, data: Any = None) -> str:
    """The method when none is named: `embedding` for sentence encoders, the set's own on condensed data alone, else `kd`."""
    if _alone(teacher, data):
        return OWN_TRAINING
    encoder = teacher.startswith("st:") if isinstance(teacher, str) else type(teacher).__name__ in _ENCODERS
    return "embedding" if encoder else "kd"


def settings_of(
    teacher: Any, data: Any, method: str | None, engine: Mapping[str, Any], overrides: Sequence[str]
) -> Any:
    """The method of a recipe, its engine and its optimizers, as far as they follow from what it is about."""
    found = method or default_method(teacher, data)
    own = own_settings(data, engine, overrides) if _alone(teacher, data, found) else {"engine": dict(engine)}
    return {"method": found, **own}


def _alone(teacher: Any, data: Any, method: Any = OWN_TRAINING) -> bool:
    """Whether a condensed set is all that there is to learn from."""
    spec = data.get("spec") if isinstance(data, Mapping) else data
    return teacher is None and method == OWN_TRAINING and isinstance(spec, str) and spec.startswith("condensed:")


def _layers(job: Job) -> dict[str, Sequence[str]]:
    """The layers that the method wants stored beside each teacher's logits."""
    batch = first_batch(job.taught or job.data.train)
    device = next((p.device for _, role in job.roles.items() for p in role.module.parameters()), torch.device("cpu"))
    return {name: job.method.stores(role, batch.to(device)) for name, role in job.roles.teachers.items()}


def _open(job: Job, evidence: Evidence) -> None:
    """Make the run's folder: what is known before training, and the recipe, with which `limbeck run` goes on."""
    if not (job.out / "recipe.yaml").exists():
        evidence.write(job)
    job.record()


def _sign(job: Job, roles: Roles) -> None:
    """Write into a condensed set how it was made."""
    small: Any = roles.student.module
    if isinstance(small, Condensed | CondensedGraphs):
        small.info["made"] = {
            "method": registry.name_of(type(job.method)),
            "fields": plain(job.method),
            "seed": job.engine.seed,
            "steps": job.engine.steps,
            "data": job.data.train.fingerprint(),
            "teachers": {name: fingerprint(role) for name, role in roles.teachers.items()},
            "limbeck": __version__,
        }


def _save(job: Job, roles: Roles) -> None:
    """Write the student's folder, in the form of the library that it is of."""
    made = roles.lineage.get("student", {"base": "student", "records": []})
    teacher = job.recipe.teacher if isinstance(job.recipe.teacher, str) else None
    origin = job.origin if made["base"] == "student" else Origin(teacher)
    records = [*origin.records, *made["records"]]
    save_folder(roles.student.module, job.out / "student", origin.spec, num_classes=origin.num_classes, records=records)
