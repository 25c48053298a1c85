"""A recipe's job without weights and, where they are not on this machine, without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.recipe import Recipe
from limbeck.core.roles import Role, Roles
from limbeck.data import Data, embedded, load_data
from limbeck.data.condensed import blank, condensed_size
from limbeck.data.condensed_graphs import GRAPHS, empty
from limbeck.data.graphs import motifs
from limbeck.data.options import DataOptions
from limbeck.data.sources import Rows
from limbeck.engine.settings import Engine
from limbeck.job import student_of, teachers_of, tokenised
from limbeck.models.load import load_model, model_image_size, model_preprocess, model_tokenizer, num_classes
from limbeck.models.specs import is_object
from limbeck.teachers import Ensemble


@dataclass(frozen=True)
class Draft:
    """What a plan needs of a job.

    Args:
        method: The program.
        roles: The models, on the meta device.
        data: The data, or shapes in their place.
        engine: How it is executed.
        optim: How each role is optimised.
        recipe: What this was made from.
        taught: Training data as the teacher reads them, where it has a tokenizer of its own.
        counted: Whether the number of samples is known.
        notes: What was assumed.
    """

    method: Method
    roles: Roles
    data: Any
    engine: Engine
    optim: Mapping[str, OptimSpec]
    recipe: Recipe
    taught: Any = None
    counted: bool = True
    notes: tuple[str, ...] = ()


class Shapes(Rows):
    """A source that knows what its batches look like, and holds no samples.

    Args:
        x: Shape and dtype of one sample, by name where a sample has several parts.
        samples: How many there would be.
        classes: Number of classes, equally many samples of each; None for samples without labels.
        first: The first id.
    """

    def __init__(
        self,
        x: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        samples: int,
        classes: int | None = None,
        first: int = 0,
    ) -> None:
        self.x, self.ids, self.views = x, first + torch.arange(samples), 0
        self.labels = None if classes is None else self.ids % classes

    def batch(self, rows: Tensor, view: int) -> Batch:
        """Whatever the memory holds: only shapes and dtypes count."""
        parts = {name: torch.empty(len(rows), *shape, dtype=dtype) for name, (shape, dtype) in self.x.items()}
        x = parts["x"] if list(parts) == ["x"] else parts
        y = {} if self.labels is None else {"y": self.labels[rows]}
        return Batch(x=x, id=self.ids[rows], view=torch.full((len(rows),), view), **y)

    def fingerprint(self) -> str:
        """There is no content."""
        return "shapes"


def draft(recipe: Recipe, samples: int | None = None) -> Draft:
    """The job of a recipe, with models on the meta device and no downloads.

    Args:
        recipe: The recipe.
        samples: Training samples, where the data are not on this machine.

    Raises:
        UsageError: A model is not known, or the data are not here and the recipe does not say what they look like.
    """
    options = {"spec": recipe.data} if isinstance(recipe.data, str) else dict(recipe.data)
    spec, notes = options.pop("spec"), list[str]()
    here = all(_is_here(name) for name in (spec, options.get("unlabelled")) if name is not None)
    found: Any = load_data(spec, **options) if here else None
    classes = len(options.get("classes") or ()) or (None if found is None else found.num_classes)
    modules = teachers_of(recipe.teacher, recipe.method, classes, _load)
    teacher = modules.get("teacher")
    if "teacher" in recipe.method.logits:
        _check_classes(teacher, classes)
    each = None if recipe.student == GRAPHS else condensed_size(recipe.student)
    student: Any = None
    if not each:
        student = empty() if recipe.student == GRAPHS else student_of(recipe.student, teacher, classes, _load)[0]
    taught, known = None, student or teacher or next(iter(modules.values()), nn.Module())
    if found is not None:
        read, other = tokenised(Data(**{n: s for n, s in found.items() if n != "test"}), teacher, known)
        data, taught = read, None if other is None else other.train
    elif recipe.student == GRAPHS:
        data = Data(train=motifs(samples or recipe.engine.batch_size))
        notes.append(f"the data '{spec}' are not on this machine: drawn graphs stand for them")
    else:
        count = samples or recipe.engine.batch_size
        data = _shapes(spec, options, teacher or known, count, classes or num_classes(known))
        shown = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in data.train.x.items())
        notes.append(f"the data '{spec}' are not on this machine: samples are taken to be {shown}")
    if each:
        shape = data.train.batch(torch.arange(1), 0).x.shape[1:]
        student = blank(shape, classes or num_classes(known) or 1, each)
    recipe.method.check_data(data)
    roles = Roles(**{n: Role(n, m, model_preprocess(m)) for n, m in {**modules, "student": student}.items()})
    counted = found is not None or samples is not None
    return Draft(recipe.method, roles, data, recipe.engine, recipe.optim, recipe, taught, counted, tuple(notes))


def _is_here(spec: str) -> bool:
    spec = spec.removeprefix("condensed:")
    named = spec in embedded.NAMES or is_object(spec)
    return named or Path(spec.removeprefix("hf:")).expanduser().exists()


def _check_classes(teacher: nn.Module | None, classes: int | None) -> None:
    known = None if teacher is None else num_classes(teacher)
    if known is not None and classes is not None and known != classes:
        raise UsageError(
            "teacher and data have different classes",
            where="roles.teacher",
            found=f"the teacher has {known} classes, the data {classes}",
            expected=f"{classes} classes",
            fix="use a teacher that was trained on these classes; SPEC@FILE fills one with weights of your own",
        )


def _load(spec: str, **how: Any) -> nn.Module:
    """A model on the meta device; sentence encoders, which cannot be had without their weights, with them."""
    if spec.startswith("st:") or Path(spec).is_dir():
        return load_model(spec)
    plain = spec.partition("@")[0]  # a file of weights need not be here
    with torch.device("meta"):
        return load_model(plain, **how, pretrained=False)


def _shapes(spec: str, options: Mapping[str, Any], reader: nn.Module, samples: int, classes: int | None) -> Data:
    known = DataOptions.of(options)
    reader = reader.members[0] if isinstance(reader, Ensemble) else reader
    if known.block_size is not None:
        block = ((known.block_size,), torch.int64)
        x: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = {"input_ids": block, "attention_mask": block}
        classes = None
    elif model_tokenizer(reader) is not None:
        if known.max_length is None:
            raise _unknown(spec, "data.max_length", "the number of tokens of a text")
        tokens = ((known.max_length,), torch.int64)
        x = {"input_ids": tokens, "attention_mask": tokens}
        classes = None if known.label is None else classes or 1
    else:
        size = known.image_size or model_image_size(reader)
        if size is None:
            raise _unknown(spec, "data.image_size", "the pixels of a side of an image")
        image = ((3, size, size), torch.float32)
        if known.prompt is not None or (known.image and known.text):
            if known.max_length is None:
                raise _unknown(spec, "data.max_length", "the number of tokens of a text")
            tokens = ((known.max_length,), torch.int64)
            x = {"pixel_values": image, "input_ids": tokens, "attention_mask": tokens}
            classes = classes or 1 if known.prompt is not None else None
        else:
            x, classes = {"x": image}, classes or 1
    pool = None if known.unlabelled is None else Shapes(x, samples)
    return Data(
        train=Shapes(x, samples, classes), validation=Shapes(x, samples, classes, first=samples), unlabelled=pool
    )


def _unknown(spec: str, field: str, what: str) -> UsageError:
    return UsageError(
        "the data are not on this machine, and the recipe does not say what they look like",
        where=field,
        found=f"'{spec}' is no file or folder here",
        expected=what,
        fix=f"correct the path, or set {field}",
    )
