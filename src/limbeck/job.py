"""A job: a recipe with its models and data in place, checked before any work."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from limbeck.checks import check_data, check_out, check_roles, explained, first_batch
from limbeck.core.errors import UsageError
from limbeck.core.files import write_text
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.recipe import Recipe
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.data import Data, TextSource, load_data
from limbeck.data.combine import Concatenated
from limbeck.data.condensed import condensed_size, from_source
from limbeck.data.condensed_graphs import GRAPHS, empty
from limbeck.engine.runtime import make_runtime
from limbeck.engine.settings import Engine
from limbeck.evaluate.own_training import NAME as OWN
from limbeck.evaluate.own_training import OwnTraining
from limbeck.evaluate.tasks import Evaluator, evaluator
from limbeck.models.load import conversion, load_model, model_preprocess, model_tokenizer, num_classes
from limbeck.models.specs import is_object
from limbeck.teachers import Ensemble

_FREE = {
    "out",
    *(f"engine.{name}" for name in ("workers", "checkpoint_every", "keep", "trackers", "device", "processes")),
}
_COMPARED = 256  # texts on which two tokenizers are compared


@dataclass(frozen=True)
class Origin:
    """What makes the student's structure again.

    Args:
        spec: What `load_model` reads; None for a module of the caller's.
        num_classes: What it was given.
        records: The conversions after that.
    """

    spec: str | None = None
    num_classes: int | None = None
    records: tuple[Mapping[str, Any], ...] = ()


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
        origin: What makes the student's structure again.
        taught: The training data as the teacher reads them, where it has a tokenizer of its own.
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
    origin: Origin = Origin()
    taught: Source | None = None

    @property
    def stored(self) -> bool:
        """Whether stored outputs stand in for the teacher while the student learns."""
        return self.recipe.cache is not None or self.taught is not None

    def record(self) -> None:
        """Write the recipe into the run's folder, where `limbeck run` goes on with it."""
        write_text(self.out / "recipe.yaml", self.recipe.model_copy(update={"out": "."}).yaml())

    def with_steps(self, steps: int | None) -> Job:
        """The job with a number of steps in the place of a budget, in the recipe as well."""
        engine = replace(self.engine, steps=steps)
        return replace(self, engine=engine, recipe=self.recipe.model_copy(update={"engine": engine}), budget=None)


def gather(
    recipe: Recipe, teacher: Any, student: Any, data: Any, optim: Mapping[str, OptimSpec], budget: float | None
) -> Job:
    """The job of models and data that are named or there; what is named is loaded.

    Args:
        recipe: The recipe.
        teacher: A module, a spec, a list of specs, or None.
        student: A module or a spec.
        data: What `load_data` takes, or a mapping of `spec` and its options.
        optim: Optimizers by role.
        budget: Seconds for the whole run.

    Raises:
        UsageError: Something cannot be loaded, or does not fit.
    """
    named = isinstance(data, str | os.PathLike) or (isinstance(data, Mapping) and "spec" in data)
    options = dict(data) if isinstance(data, Mapping) and "spec" in data else {"spec": data}
    sources = load_data(options.pop("spec"), **options)
    classes = sources.num_classes
    soft = getattr(getattr(sources.train, "condensed", None), "soft", None)
    if teacher is None and soft is not None and not isinstance(recipe.method, OwnTraining):
        warnings.warn(f"this method reads class numbers, not the set's soft labels; {OWN} does", stacklevel=2)
    teachers = teachers_of(teacher, recipe.method, classes)
    teacher_module = teachers.get("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.engine.seed)
        module: nn.Module
        if student == GRAPHS:
            module, origin = empty(), Origin(student)
        elif isinstance(student, str) and (count := condensed_size(student)) is not None:
            module, origin = from_source(sources.train, count, recipe.engine.seed), Origin(student)
        else:
            module, origin = student_of(student, teacher_module, classes, partial(_load, recipe.pretrained))
    if origin.records and isinstance(recipe.teacher, str):
        origin = replace(origin, spec=recipe.teacher)
    sources, taught = tokenised(sources, teacher_module, module)
    return assemble(
        recipe,
        teachers,
        module,
        sources,
        optim,
        budget,
        origin=origin,
        taught=taught,
        normalise=named,
    )


def assemble(
    recipe: Recipe,
    teachers: Mapping[str, nn.Module],
    student: nn.Module,
    data: Data,
    optim: Mapping[str, OptimSpec],
    budget: float | None,
    *,
    origin: Origin | None = None,
    taught: Data | None = None,
    normalise: bool = False,
) -> Job:
    """The job of models and data that are there, after all checks that need no training step.

    Args:
        recipe: The recipe.
        teachers: The teacher by its role, as `teachers_of` gives it.
        student: The student.
        data: The data.
        optim: Optimizers by role.
        budget: Seconds for the whole run.
        origin: What makes the student's structure again.
        taught: The data as the teacher reads them, where it has a tokenizer of its own.
        normalise: Whether each model's own normalisation is done to its inputs, which are images in [0, 1].

    Raises:
        UsageError: Something does not fit.
    """
    method, engine = recipe.method, recipe.engine
    out = Path(recipe.out) if recipe.out else default_out(recipe)
    check_out(out)
    alone = engine if engine.processes == 1 else replace(engine, processes=1, shard=())
    device = make_runtime(alone).device
    modules: dict[str, nn.Module] = {**teachers, "student": student}
    roles = Roles(**{n: Role(n, m, model_preprocess(m) if normalise else None) for n, m in modules.items()})
    check_roles(method, roles, optim)
    check_data(data, roles, method)
    method.check_data(data)
    for _, role in roles.items():
        role.module.to(device)
    with torch.random.fork_rng():  # a look at the models changes nothing
        method.check(roles, first_batch(data.train).to(device))
    judges = {}
    for name in ("validation", "test"):
        if name in data:
            other = None if taught is None else taught[name]
            judges[name] = evaluator(data[name], student, engine.batch_size, other, "teacher" in method.logits)
    return Job(
        method,
        roles,
        data,
        engine,
        optim,
        evaluate=judges.get("validation"),
        test=judges.get("test", judges.get("validation")),
        recipe=recipe,
        out=out,
        budget=budget,
        origin=origin or Origin(),
        taught=None if taught is None else seen(taught),
    )


def seen(data: Data) -> Source:
    """The samples that a teacher may be asked about while the student learns: those to train on, and the unlabelled ones."""
    return Concatenated(data.train, data.unlabelled) if "unlabelled" in data else data.train


def default_out(recipe: Recipe) -> Path:
    """`runs/METHOD-STUDENT`."""
    student = re.sub(r"\W+", "-", recipe.student.rpartition("/")[2].rpartition(":")[2]).strip("-")
    return Path("runs") / f"{type(recipe.method).__name__.lower()}-{student}"


def claim(job: Job) -> Job:
    """The job as an earlier start of the same run recorded it in the folder, or the job itself.

    Raises:
        UsageError: The folder holds another run.
    """
    path = job.out / "recipe.yaml"
    if not path.exists():
        return job
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = recorded["engine"]["steps"]
    if job.budget is not None and (steps is not None or (job.out / "run.json").exists()):
        job = job.with_steps(steps)  # the first start found how many fit, or was not asked to
    here, there = _identity(job.recipe.dump()), _identity(recorded)
    for field in (*here, *there):
        if here.get(field) != there.get(field):
            raise UsageError(
                "the run's folder holds another run",
                where=f"{job.out}: {field}",
                found=str(there.get(field)),
                expected=str(here.get(field)),
                fix="choose another folder with --out, or delete this one",
            )
    return job


def leads() -> bool:
    """Whether this process is the first of the run, or the only one: the one that writes and prints.

    Example:
        >>> leads()
        True
    """
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def describe(value: Any) -> Any:
    """What a recipe says of a model or data set: the spec, or the class of an object of the caller's.

    Example:
        >>> describe("timm:resnet18"), describe(nn.Linear(2, 1))
        ('timm:resnet18', 'a torch.nn.modules.linear.Linear')
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    if isinstance(value, Mapping) and "spec" in value:
        return {**value, "spec": describe(value["spec"])}
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def teachers_of(
    teacher: Any, method: Method, classes: int | None, load: Callable[..., nn.Module] = load_model
) -> dict[str, nn.Module]:
    """The teachers by role: `teacher`, or `teacher_0`, `teacher_1`, ... for a method that keeps several apart; none for None.

    Args:
        teacher: A module, a spec, a list of either, or None.
        method: The method.
        classes: Classes of the data.
        load: Called as `load_model` is.
    """
    if isinstance(teacher, list | tuple) and not method.averages:
        return {f"teacher_{i}": teacher_of(one, classes, load) for i, one in enumerate(teacher)}
    return {} if teacher is None else {"teacher": teacher_of(teacher, classes, load)}


def teacher_of(teacher: Any, classes: int | None, load: Callable[..., nn.Module] = load_model) -> nn.Module:
    """The teacher, or the ensemble of a list of them.

    Args:
        teacher: A module, a spec, or a list of either.
        classes: Classes of the data.
        load: Called as `load_model` is.
    """
    if isinstance(teacher, list | tuple):
        members = [teacher_of(member, classes, load) for member in teacher]
        return Ensemble(members, preprocess=[model_preprocess(member) for member in members])
    # A library's classifier keeps the classes it was trained on; weights of the caller's were trained on the data's.
    own = isinstance(teacher, str) and ("@" in teacher or is_object(teacher))
    return load(teacher, num_classes=classes if own else None)


def student_of(
    student: Any, teacher: nn.Module | None, classes: int | None, load: Callable[..., nn.Module] = load_model
) -> tuple[nn.Module, Origin]:
    """The student, made from the teacher where its spec is a conversion, and what makes it again.

    Args:
        student: A module or a spec.
        teacher: The teacher, whose classes it gets.
        classes: Classes of the data, where the teacher names none.
        load: Called as `load_model` is.
    """
    if isinstance(student, nn.Module):
        return student, Origin()
    change = conversion(student)
    if change is not None and teacher is not None:
        module, record = change(teacher)
        return module, Origin(records=(record,))
    encoder = teacher is not None and hasattr(teacher, "encode")
    count = None if encoder else (teacher is not None and num_classes(teacher)) or classes
    return load(student, num_classes=count, teacher=teacher), Origin(student, count)


def tokenised(data: Data, teacher: nn.Module | None, student: nn.Module) -> tuple[Data, Data | None]:
    """Texts as the student reads them, and as the teacher does where that differs; other data as they are."""
    if not all(isinstance(source, TextSource) and source.tokenizer is None for _, source in data.items()):
        return data, None
    own = model_tokenizer(student)
    other = None if teacher is None else model_tokenizer(teacher)
    if own is None and other is None:
        return data, None  # the first batch says what is missing
    first, second = own or other, other or own
    with explained("these texts cannot be tokenised", "data", "texts"):
        read = _read(data, first)
    longest = read.train.subset(read.train.lengths.argsort(descending=True)[:_COMPARED])
    one, other = (longest.with_tokenizer(tokenizer, longest.max_length).fingerprint() for tokenizer in (first, second))
    if one == other:
        return read, None
    return read, _read(data, second)


def _load(pretrained: bool, spec: str, **how: Any) -> nn.Module:
    return load_model(spec, pretrained=pretrained or spec.startswith("st:"), **how)  # which has no other form


def _read(data: Data, tokenizer: Any) -> Data:
    return Data(**{name: source.with_tokenizer(tokenizer, source.max_length) for name, source in data.items()})


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
