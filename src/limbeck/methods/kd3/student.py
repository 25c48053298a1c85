"""Students that end in the teacher's own classifier: a body, a projector, and the classifier, frozen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.adapt import main_output
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, find
from limbeck.evaluate.cost import evaluating


@dataclass(frozen=True)
class Ending:
    """Where the features of a classifier are read.

    Args:
        head: Path of the linear map that gives the logits; None where a model ends in its features.
        maps: Path of the last feature maps, where the head reads their mean; None where it reads something else.
    """

    head: str | None
    maps: str | None = None


@dataclass(frozen=True)
class Reading:
    """What a model says of a batch: `logits` `[B, K]`, `features` `[B, C, H, W]` or `[B, C]`, and pooled, `vector` `[B, C]`."""

    logits: Tensor
    features: Tensor
    vector: Tensor


def read(role: Role, x: Any, ending: Ending) -> Reading:
    """The logits of a role for a batch or an input, and the features that they come from."""
    seen: list[Tensor] = []
    head = None if ending.head is None else find(role.module, ending.head, role.name)
    hook = None if head is None else head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        logits, taps = role.features(x, *([] if ending.maps is None else [ending.maps]))
    finally:
        if hook is not None:
            hook.remove()
    vector = seen[0] if seen else logits
    return Reading(logits, vector if ending.maps is None else taps[ending.maps], vector)


def find_ending(role: Role, batch: Batch) -> Ending:
    """The linear map at the end of a model, and the feature maps whose mean it reads, found by running two samples.

    Maps count where nothing with parameters lies between them and the head, and where their mean is its input.
    """
    device = next((p.device for p in role.module.parameters()), None)
    batch = batch if device is None else batch[:2].to(device)
    paths = [name for name, _ in role.module.named_modules() if name]
    with evaluating(role.module):
        output, taps = role.features(batch, *paths)  # in the order in which the parts end
        order = list(taps)
        head = next((p for p in order if taps[p] is output and isinstance(find(role.module, p), nn.Linear)), None)
        ending = Ending(head)
        vector = read(role, batch, ending).vector
        for path in reversed(order if head is None else order[: order.index(head)]):
            found = taps[path]
            if isinstance(found, Tensor) and found.ndim == 4 and found.shape[2] * found.shape[3] > 1:
                return replace(ending, maps=path) if _is_mean(vector, found) else ending
            if any(True for _ in find(role.module, path).parameters(recurse=False)):
                return ending
    return ending


def _is_mean(vector: Tensor, maps: Tensor) -> bool:
    if vector.shape != maps.shape[:2]:
        return False
    # Fake tensors have no values to look at.
    return type(vector) is not Tensor or torch.allclose(vector, maps.mean((2, 3)), rtol=1e-3, atol=1e-4)


class Borrowed(nn.Module):
    """A body, a projector to the teacher's features, and the teacher's classifier, which does not learn.

    Args:
        backbone: The student without its own classifier.
        record: Widths and paths, as `BorrowClassifier` writes them.

    Attributes:
        teacher: Where the features that the projector aims at are read.
        embed: Linear maps to the space of the contrast, by model, while the student learns; else None.
    """

    def __init__(self, backbone: nn.Module, record: Mapping[str, Any]) -> None:
        super().__init__()
        width, out, dim = record["width"], record["out"], record["embed"]
        self.backbone, self.maps, self.size = backbone, record["maps"], record["size"]
        self.teacher = Ending(*record["teacher"])
        self.projector = _conv_projector(width, out) if self.maps is not None else _projector(width, out)
        self.classifier = nn.Linear(out, record["classes"], bias=record["bias"]).requires_grad_(False)
        pair = {"student": nn.Linear(width, dim), "teacher": nn.Linear(out, dim)} if dim else {}
        self.embed = nn.ModuleDict(pair) if dim else None

    def forward(self, *args: Any, pooled: bool = False, **kwargs: Any) -> Tensor:
        """Logits `[B, K]`, or the body's vectors `[B, C]`."""
        seen: list[Tensor] = []
        hook = None
        if self.maps is not None and not pooled:
            part = self.backbone.get_submodule(self.maps)
            hook = part.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            vector = main_output(self.backbone(*args, **kwargs))
        finally:
            if hook is not None:
                hook.remove()
        if pooled:
            return vector
        if self.maps is None:
            return self.classifier(self.projector(vector))
        maps = seen[0] if self.size is None else F.adaptive_avg_pool2d(seen[0], self.size)
        return self.classifier(self.projector(maps).mean((2, 3)))


def _conv_projector(width: int, out: int) -> nn.Sequential:
    """SimKD's: 1 x 1 to half the teacher's width, 3 x 3, 1 x 1 (Chen et al. 2022, section 3)."""
    half, layers = max(1, out // 2), list[nn.Module]()
    for a, b, kernel in ((width, half, 1), (half, half, 3), (half, out, 1)):
        layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def _projector(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, half := max(1, out // 2)), nn.ReLU(), nn.Linear(half, out))


@dataclass(frozen=True, eq=False)
class BorrowClassifier:
    """Give a student the teacher's classifier behind a projector; the student's own is left out.

    Args:
        classifier: The teacher's.
        record: What rebuilds the structure.

    Example:
        >>> from limbeck.core.roles import Roles
        >>> from limbeck.nn.mlp import mlp
        >>> m = Roles(teacher=mlp(4, 16, 3), student=mlp(4, 6, 3))
        >>> _ = m.convert("student", BorrowClassifier.between(m.teacher, m.student, Batch(x=torch.rand(2, 4))))
        >>> [p.requires_grad for p in m.student.classifier.parameters()], m.student(torch.rand(5, 4)).shape
        ([False, False], torch.Size([5, 3]))
    """

    classifier: nn.Linear
    record: Mapping[str, Any]

    @classmethod
    def between(cls, teacher: Role, student: Role, batch: Batch, embed: int = 0) -> BorrowClassifier:
        """The conversion of a student for a teacher.

        Args:
            teacher: A classifier that ends in a linear map.
            student: Any model; a linear map at its end is left out.
            batch: Two samples.
            embed: Width of the contrast's space; 0 for none.

        Raises:
            UsageError: The teacher does not end in a linear map, or a model gives no vectors.
        """
        above, below = find_ending(teacher, batch), find_ending(student, batch)
        path = above.head
        if path is None:
            raise UsageError(
                "the teacher has no classifier that a student could borrow",
                where="roles.teacher",
                found=type(teacher.module).__name__,
                expected="one model, with weights, whose last operation is an nn.Linear",
                fix="give one such model, without stored outputs (cache) in its place",
            )
        if above.maps is None or below.maps is None:
            above, below = replace(above, maps=None), replace(below, maps=None)
        with evaluating(teacher.module), evaluating(student.module):
            theirs, own = (read(r, batch, e) for r, e in ((teacher, above), (student, below)))
        for role, reading in ((teacher, theirs), (student, own)):
            if reading.vector.ndim != 2:
                raise UsageError(
                    "a model has no vector for a sample",
                    where=f"roles.{role.name}",
                    found=list(reading.vector.shape),
                    expected="features [B, C] before its classifier",
                )
        head = find(teacher.module, path)
        assert isinstance(head, nn.Linear)
        larger = below.maps is not None and own.features.shape[2] > theirs.features.shape[2]
        record = {
            "kind": f"{__name__}:borrow_classifier",
            "head": below.head,
            "maps": below.maps,
            "width": own.vector.shape[1],
            "out": head.in_features,
            "classes": head.out_features,
            "bias": head.bias is not None,
            "size": list(theirs.features.shape[2:]) if larger else None,
            "teacher": [above.head, above.maps],
            "embed": embed,
        }
        return cls(head, record)

    def __call__(self, module: nn.Module) -> tuple[Borrowed, dict[str, Any]]:
        """The student, and the record that rebuilds its structure."""
        student = borrow_classifier(copy.deepcopy(module), self.record).to(self.classifier.weight.device)
        student.classifier.load_state_dict(self.classifier.state_dict())
        return student, dict(self.record)


def borrow_classifier(module: nn.Module, record: Mapping[str, Any]) -> Borrowed:
    """The structure of such a student, from its record."""
    if record["head"] is not None:
        module.set_submodule(record["head"], nn.Identity())
    return Borrowed(module, record)


@dataclass(frozen=True)
class DropEmbedding:
    """Leave out what only the contrast needed."""

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The student, and the record."""
        record = {"kind": f"{__name__}:drop_embedding"}
        return drop_embedding(copy.deepcopy(module), record), record


def drop_embedding(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The student of a conversion, from its record."""
    module.register_module("embed", None)
    return module
