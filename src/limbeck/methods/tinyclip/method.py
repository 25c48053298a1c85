"""A small dual encoder that inherits a big one's weights and mimics which image it finds close to which text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.convert.layers import choose_layers
from limbeck.convert.masks import AddMasks, Gates, PruneMasked
from limbeck.convert.slicing import Slice, resolve
from limbeck.convert.structure import structure
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Artefact, Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.losses import affinity_mimicking, clip_loss
from limbeck.losses.gather import all_gathered
from limbeck.methods.checks import check_field, outputs
from limbeck.nn.hard_concrete import Budget, ramp


@dataclass(frozen=True)
class TinyCLIP(Method):
    """The student, a copy of the teacher, shrinks once or in several stages, and learns the teacher's affinities (Wu et al.
    2023): `L = (1 - w) L_aff + w L_clip`, both over all pairs of the batch, in all processes.

    Inheritance by rule (`keep`): the leading width, whole heads and hidden units; of layers, each `L_t // L_s`-th. Inheritance by
    masks (`sparsity`): hard-concrete gates on width, heads and hidden units learn with the weights,
    `L + l1 max(q - p, 0) + l2 max(q - p, 0)^2`, where `l1`, `l2` ascend and `q` rises to the target; then what is shut is cut
    out. The teacher is the original model in all stages. With neither, a student of any structure learns the affinities.

    Big batches matter: a batch split into micro-batches has fewer pairs to compare, not the same loss.

    Args:
        keep: For each stage, what stays: by name or glob of a dimension or list of layers; numbers, shares or indices.
        sparsity: For each stage, the share of the original's prunable numbers that is gone after it, rising, in (0, 1).
        label_weight: `w` in [0, 1]; 0 in the published runs.
        scale: Inverse temperature of teacher and student, both pinned to it. None: their own; the student's learns in [1, 100].
        mask_share: Share of a stage's steps in which masks learn: 3,000 to 8,000 steps of 6 epochs.
        ramp: Share of those in which `q` rises.
        mask_lr: Peak rate of gates and multipliers; the gates' follows the schedule of the student. A gate travels from `initial`
            to about -3, so rate times steps must be well above 6: raise it for short training.
        initial: `alpha` of the gates at first.
        budget: Penalty of `code`, nothing once the target is met, or of `paper`, signed (inferred).

    Example:
        >>> TinyCLIP(sparsity=(0.25, 0.5)).label_weight
        0.0
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    logits: ClassVar[tuple[str, ...]] = ()

    keep: tuple[Mapping[str, int | float | tuple[int, ...]], ...] = ()
    sparsity: tuple[float, ...] = ()
    label_weight: float = 0.0
    scale: float | None = 50.0
    mask_share: float = 0.3
    ramp: float = 1 / 3
    mask_lr: float = 0.02
    initial: float = 2.5
    budget: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.sparsity), (*self.sparsity, 1.0), strict=True))
        check_field("sparsity", self.sparsity, rising, "rising shares in (0, 1)")
        check_field("keep", self.keep, not (self.keep and self.sparsity), "none beside sparsity: one or the other")
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "in [0, 1]")
        check_field("scale", self.scale, self.scale is None or self.scale > 0, "above 0, or none")
        check_field("mask_share", self.mask_share, 0 < self.mask_share < 1, "in (0, 1)")
        check_field("ramp", self.ramp, 0 <= self.ramp <= 1, "in [0, 1]")
        check_field("mask_lr", self.mask_lr, self.mask_lr > 0, "above 0")

    def check(self, m: Roles, batch: Batch) -> None:
        """Both models embed images and texts; the student has what is to be cut, and less than is asked for cannot be left."""
        for role in ("teacher", "student"):
            shape = list(outputs(m, batch, role)[0].shape)
            if len(shape) != 3 or shape[1] != 2:
                raise UsageError(
                    "this model does not embed images and texts", where=role, found=shape,
                    expected="image_embeds and text_embeds, as CLIPModel of transformers returns them",
                )  # fmt: skip
            if self.scale is None and not hasattr(m[role].module, "logit_scale"):
                raise UsageError(
                    "the model has no scale of its own", where=role, expected="logit_scale", fix="set method.scale"
                )
        module = m.student.module
        if self.keep:
            Inherit(self.keep[0])(module)
        if self.sparsity:
            gates = AddMasks(_DIMS, -60.0)(module)[0].gates
            most = 1 - smallest(gates)
            if self.sparsity[-1] > most:
                raise UsageError(
                    "one unit of everything is more than this leaves", where="method.sparsity", found=self.sparsity[-1],
                    expected=f"at most {most:.3f}",
                )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Shrink and learn, stage by stage; one schedule over all."""
        total = None
        before = 0.0
        count = max(1, len(self.keep), len(self.sparsity))
        for k in range(count):
            start, end = k / count, (k + 1) / count
            if self.keep:
                yield Convert("student", Inherit(self.keep[k]), name=f"inherit {k}")
            if self.sparsity:
                record = yield Convert("student", AddMasks(_DIMS, self.initial, total), name=f"mask {k}")
                total = record["total"]
                budget = f"budget_{k}"
                setattr(m, budget, Budget(variant=self.budget))
                middle = start + self.mask_share * (end - start)
                step = partial(self.masked, budget=budget, before=before, target=self.sparsity[k])
                rates = {"student": None, budget: Optim("adam", lr=self.mask_lr, maximize=True)}
                yield Train(
                    step, roles=rates, frozen=self.frozen, data=data.train, span=(start, middle), name=f"masks {k}"
                )
                reached: Artefact = yield Collect(f"reached {k}", reached_sparsity, example={"sparsity": 1.0})
                if reached.value["sparsity"] < self.sparsity[k] - _MISSED:
                    warnings.warn(
                        f"the masks ended at a sparsity of {reached.value['sparsity']:.3f}, not {self.sparsity[k]}: train "
                        "longer, or raise method.mask_lr",
                        stacklevel=1,
                    )
                yield Convert("student", PruneMasked(), name=f"prune {k}", compare=data.train)
                start, before = middle, self.sparsity[k]
            yield Train(
                self.step,
                roles={"student": None},
                frozen=self.frozen,
                data=data.train,
                span=(start, end),
                name=f"train {k}",
            )

    def optimizer(self, m: Roles, role: str, optim: Optim) -> torch.optim.Optimizer:
        """That of the settings; gates have a rate of their own, the scale does not decay."""
        if role != "student":
            return optim.build(m[role].module)
        return replace(optim, lr_multipliers={"gates.*": self.mask_lr / optim.lr, **optim.lr_multipliers}).build(
            m[role].module
        )

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student."""
        loss, logs = self.loss(m, batch)
        yield Update("student", loss, logs=logs)

    def masked(self, m: Roles, batch: Batch, budget: str, before: float, target: float) -> Iterator[Update]:
        """One update of weights and gates, and one, upwards, of the multipliers."""
        gates: Any = m.student.module.gates
        device = next(gates.parameters()).device
        # The same draw in all micro-batches and processes.
        gates.sample(torch.Generator(device).manual_seed(1_000_003 * m.seed + m.step))
        loss, logs = self.loss(m, batch)
        sparsity = gates.sparsity()
        goal = ramp(before, target, m.step, round(self.ramp * m.total))
        yield Update("student", loss + m[budget](sparsity, goal), logs={**logs, "sparsity": sparsity.detach()})
        yield Update(budget, m[budget](sparsity.detach(), goal))

    def loss(self, m: Roles, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over the pairs of all processes, and its parts."""
        with torch.no_grad():
            teacher = all_gathered(m.teacher(batch)).unbind(1)
        images, texts = all_gathered(m.student(batch)).unbind(1)
        own = self.scale or m.student.logit_scale.exp()
        taught = self.scale or m.teacher.logit_scale.exp()
        soft = affinity_mimicking(images, texts, *teacher, student_scale=own, teacher_scale=taught)
        if not self.label_weight:
            return soft, {"affinity": soft}
        hard = clip_loss(images, texts, scale=own)
        return (1 - self.label_weight) * soft + self.label_weight * hard, {"affinity": soft, "contrastive": hard}

    @torch.no_grad()
    def after_update(self, m: Roles, role: str) -> None:
        """Keep gates and scale within their bounds."""
        if role != "student":
            return
        student: Any = m.student.module
        if isinstance(getattr(student, "gates", None), Gates):
            student.gates.clamp_()
        if hasattr(student, "logit_scale"):
            if self.scale is None:
                student.logit_scale.clamp_(0.0, math.log(100.0))
            else:
                student.logit_scale.fill_(math.log(self.scale))


_DIMS = ("*width", "*.heads", "*.ffn")
_MISSED = 0.02  # of the target; a student that much bigger is another one


def reached_sparsity(m: Roles, folder: Any) -> dict[str, float]:
    """The sparsity that the masks expect."""
    gates: Any = m.student.module.gates
    return {"sparsity": gates.sparsity().item()}


@dataclass(frozen=True)
class Inherit:
    """`Slice`, with layers from the whole depth: `0, s, 2s, ...`, `s = L_t // L_s`.

    Args:
        keep: As for `Slice`.

    Example:
        >>> from limbeck.methods.tinyclip.proof import clip
        >>> Inherit({"text_model.encoder.layers": 2})(clip())[1]["keep"]
        {'text_model.encoder.layers': [0, 2]}
    """

    keep: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The smaller model, and the record of `Slice`."""
        parts = structure(module)
        keep = resolve(self.keep, parts)
        spread = {
            name: choose_layers(parts.depths[name].size, value, "stride")
            if name in parts.depths and isinstance(value, int)
            else value
            for name, value in keep.items()
        }
        return Slice(spread)(module)


def smallest(gates: Any) -> float:
    """The share that is left where one unit of every dimension is left."""
    sizes = [len(gate.alpha) for gate in gates]
    left = [gates.sizes[name] / math.prod(sizes[place] for place in places) for name, places in gates.runs.items()]
    return float(sum(left) / gates.total)
