"""Trajectory matching with strong experts, smoothed so that a small data set can follow them."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.condensed import Become
from limbeck.data.coresets import medoids
from limbeck.data.ids import mix, normals
from limbeck.methods.checks import check_field
from limbeck.methods.trajectory_matching import TrajectoryMatching
from limbeck.optim.unroll import call_flat
from limbeck.teachers.following import Following
from limbeck.teachers.trajectories import ExpertTraining, Segments, Trajectories, smoothed


@dataclass(frozen=True)
class AST(TrajectoryMatching):
    """Alignment with smooth and high-quality expert trajectories (Shen, Yang and Lam 2023).

    Experts have momentum and decay, and a loss that is damped at first and keeps input gradients near 1, so that their weights
    move evenly. The student has momentum too, starts from weights that are perturbed, is scaled by where a segment starts, and
    is held to the expert after each of its epochs. The formulas are those of the authors' code; the paper could not be read.

    Args:
        penalty: `lambda` of the experts' gradient penalty, 2 in the code; 0 for none.
        momentum: Of the student.
        perturbation: `a`: convolution weights start at `W + a (d / ||d||) W`, d normal; 0 for none.
        balanced: Whether the student's loss is scaled by `balance`.
        intermediate: Weights of the distances after 1, ..., M - 1 epochs: `adaptive` (k / M), `agg` (1), or `none`.
        init: Samples to begin with: `medoids`, nearest to the centres of an expert's logits, or `real`, as they are given.
        variant: `paper`: as many medoids as samples, and the penalty is of the gradient of a whole sample (both inferred);
            `code`: 10 centres with a tenth of the samples at each, the penalty is of each pixel's gradient, larger by about the
            root of the number of pixels, and the experts' rate drops an epoch later.

    Example:
        >>> from limbeck.data.condensed import Condensed
        >>> net = torch.nn.Linear(4, 3)
        >>> m = Roles(teacher=net, student=Condensed(torch.randn(3, 4), torch.arange(3), step_size=0.1))
        >>> experts = Trajectories(None, net, ExpertTraining())
        >>> AST().follow(experts, m, Segments(2, 5).batch(torch.tensor([3]), 0)).role
        'student'
    """

    forms: ClassVar[tuple[str, ...]] = ("constant", "full")

    expert_lr: float = 0.003
    penalty: float = 2.0
    momentum: float = 0.9
    perturbation: float = 1.0
    balanced: bool = True
    intermediate: Literal["adaptive", "agg", "none"] = "adaptive"
    init: Literal["medoids", "real"] = "medoids"
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("penalty", "perturbation"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_field("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")
        enough = self.intermediate == "none" or self.student_steps >= self.expert_epochs
        check_field(
            "student_steps", self.student_steps, enough, f"{self.expert_epochs} or more, one for each expert epoch"
        )

    @property
    def expert_training(self) -> ExpertTraining:
        """How experts are trained."""
        norm: Literal["sample", "pixel"] = "sample" if self.variant == "paper" else "pixel"
        return smoothed(
            replace(super().expert_training, norm=norm, drop_after=int(self.variant == "code")), self.penalty
        )

    @property
    def following(self) -> Following:
        """How the student follows them."""
        return replace(super().following, momentum=self.momentum)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the distances on the way."""
        if self.intermediate == "none":
            return ()
        return tuple(
            1.0 if self.intermediate == "agg" else k / self.expert_epochs for k in range(1, self.expert_epochs)
        )

    def check(self, m: Roles, batch: Batch) -> None:
        """The network's weights are all that it is, and experts are long enough."""
        super().check(m, batch)
        student: Any = m.student.module
        each = student.info.get("images_per_class", 1)
        fits = self.init != "medoids" or self.variant == "paper" or each >= 10
        check_field(
            "variant", f"code, {each} samples of each class", fits, "10 samples of each class or more, or paper"
        )

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Experts, samples to begin with, then the samples."""
        experts = yield from self.trained(m, data)
        begun = self.begun(m)
        if self.init == "medoids":
            each = begun.info.get("images_per_class", 1)
            chosen = yield Collect("medoids", partial(self._medoids, experts, data.train, each), example=None)
            if chosen.value is not None:
                batch = data.train.batch(torch.tensor(chosen.value), 0)
                begun = self.begun(m, batch.x, batch.y)
        yield Convert("student", Become(begun), name="samples to begin with")
        step = partial(self.follow, experts)
        yield Train(step, roles={"student": None}, frozen=self.frozen, data=Segments(self.experts, self.starts))

    def follow(self, experts: Trajectories, m: Roles, batch: Batch) -> Update:
        """One update of the samples and of their step size."""
        student: Any = m.student.module
        size = student.step_size.detach().clone()
        scale = partial(balance, middle=self.starts // 2) if self.balanced else lambda start: 1.0
        begin = partial(perturb, shapes=[p.shape for p in m.teacher.parameters()], size=self.perturbation)
        loss = self.following.loss(m, experts, batch, scale=scale, begin=begin, weights=self.weights)
        return Update("student", loss, logs={"step_size": size})

    def _medoids(self, experts: Trajectories, source: Any, each: int, m: Roles, folder: Path) -> list[int]:
        """Rows of samples near the centres of the first expert's last logits."""
        weights, logits = experts(0, self.epochs), []
        for rows in torch.arange(len(source)).split(256):
            batch = source.batch(rows, 0).to(weights.device)
            logits.append(call_flat(experts.network, weights, batch.x).cpu())
        centres, near = (each, 1) if self.variant == "paper" else (10, each // 10)
        return medoids(torch.cat(logits), source.labels, centres, near, m.seed).tolist()


def balance(start: int, middle: int) -> float:
    """The factor of the student's loss: `log_5(s - h + 8)` from the middle h on, `1 / log_5(h - s + 8)` before it.

    Example:
        >>> round(balance(5, 5), 4), round(balance(4, 5), 4)
        (1.292, 0.7325)
    """
    return math.log(start - middle + 8, 5) if start >= middle else 1 / math.log(middle - start + 8, 5)


def perturb(weights: Tensor, key: Tensor, shapes: list[torch.Size], size: float) -> Tensor:
    """`W + size (d / ||d||_F) W` for weights of four dimensions, d standard normal; others stay as they are.

    Args:
        weights: Flat `[P]`.
        key: Of the draws `[1]`.
        shapes: Of the parameters, in their order.
        size: `a`.
    """
    if not size:
        return weights
    found = []
    for i, (part, shape) in enumerate(zip(weights.split([s.numel() for s in shapes]), shapes, strict=True)):
        if len(shape) == 4:
            noise = normals(mix(key + i), shape.numel())[0].to(part)
            part = part + size * noise / noise.norm() * part
        found.append(part)
    return torch.cat(found)
