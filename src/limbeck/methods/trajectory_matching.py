"""What FTD and AST share: experts on the real data, and condensed samples that lead a network along their way."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Stage
from limbeck.data.condensed import Condensed
from limbeck.evaluate.condensation import whole
from limbeck.methods.checks import check_field
from limbeck.optim.unroll import FORMS, Form
from limbeck.teachers.following import Following, check_following
from limbeck.teachers.trajectories import (
    ExpertTraining,
    Trajectories,
    check_buffer,
    check_buffer_data,
    check_network,
    is_buffer,
    train_experts,
)


@dataclass(frozen=True)
class TrajectoryMatching(Method):
    """Base of the methods whose condensed samples are to take a network where real data would have taken it.

    Args:
        experts: Number of experts.
        epochs: Of the experts.
        expert_lr: Their learning rate.
        expert_batch_size: Samples of their steps.
        student_steps: N.
        expert_epochs: M.
        starts: Segments start at epochs 0 to `starts - 1`.
        batch_size: Condensed samples of a step; None for all of them.
        operations: Augmentations: `("dsa",)` for one of DSA's six in each step, its names for all of them in turn.
        step_size: At first.
        step_size_lr: Its own learning rate; 0 keeps it.
        buffer: A folder of experts. Those of an earlier run with the same network, data and settings are taken, of whatever
            seed; where there are none yet, this run's are kept there. None trains them for this run.
        form: `constant` or `full`, the same gradient; `tesla`, the published approximation, where the student has no momentum.
    """

    logits: ClassVar[tuple[str, ...]] = ("teacher",)
    reads: ClassVar[tuple[str, ...] | None] = ("teacher",)

    experts: int = 20
    epochs: int = 20
    expert_lr: float = 0.01
    expert_batch_size: int = 256
    student_steps: int = 20
    expert_epochs: int = 2
    starts: int = 10
    batch_size: int | None = None
    operations: tuple[str, ...] = ()
    step_size: float = 0.01
    step_size_lr: float = 1e-5
    buffer: str | None = None
    form: Form = "constant"

    forms: ClassVar[tuple[str, ...]] = FORMS

    def __post_init__(self) -> None:
        for name in ("experts", "epochs", "student_steps", "expert_epochs", "starts"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_field("step_size", self.step_size, self.step_size > 0, "above 0")
        check_field("step_size_lr", self.step_size_lr, self.step_size_lr >= 0, "0 or more")
        check_field("form", self.form, self.form in self.forms, " | ".join(self.forms))

    @property
    def expert_training(self) -> ExpertTraining:
        """How experts are trained."""
        return ExpertTraining(
            self.experts, self.epochs, self.expert_lr, batch_size=self.expert_batch_size, operations=self.operations
        )

    @property
    def following(self) -> Following:
        """How the student follows them."""
        return Following(self.student_steps, self.expert_epochs, self.batch_size, self.operations, form=self.form)

    def check(self, m: Roles, batch: Batch) -> None:
        """The network's weights are all that it is, and experts are long enough."""
        check_network(m.teacher.module)
        check_following(m, self.following, self.epochs, self.starts)
        if self.buffer is not None and is_buffer(self.buffer):
            check_buffer(self.buffer, whole(m.teacher, m.teacher.module), self.expert_training)

    def check_data(self, data: Any) -> None:
        """Experts are trained on all samples, so none may be without value; those of an earlier run are of the same samples.

        Samples that lie on disk are not read for this.
        """
        x = getattr(getattr(data, "train", None), "x", None)
        if type(x) is Tensor and x.is_floating_point() and not bool(x.isfinite().all()):
            bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
            raise UsageError(
                "the samples hold NaN or infinite values", where="data.train", found=f"{len(bad)} samples, first {bad[0]}",
                expected="finite numbers", fix="drop or mend them",
            )  # fmt: skip
        if self.buffer is not None:
            check_buffer_data(self.buffer, data.train)

    def trained(self, m: Roles, data: Any) -> Generator[Stage, Any, Trajectories]:
        """The stage that trains the experts; returns their trajectories."""
        training = replace(self.expert_training, seed=m.seed)
        network = whole(m.teacher, m.teacher.module)
        found = yield Collect(
            "experts", lambda m, own: train_experts(network, data.train, self.buffer or own, training)
        )
        return Trajectories(found.path and (self.buffer or found.path), whole(m.teacher, m.teacher.module), training)

    def begun(self, m: Roles, x: Tensor | None = None, y: Tensor | None = None) -> Condensed:
        """The samples as they are, or others with labels, with a step size."""
        old: Any = m.student.module
        learn = ("x", "step_size") if self.step_size_lr else ("x",)
        x, y = old.x if x is None else x, old.y if y is None else y
        return Condensed(x, y, step_size=self.step_size, learn=learn, info=old.info)

    def optimizer(self, m: Roles, role: str, optim: Optim) -> torch.optim.Optimizer:
        """The step size has a rate of its own."""
        own: Mapping[str, float] = {"step_size": self.step_size_lr / optim.lr, **optim.lr_multipliers}
        return replace(optim, lr_multipliers=own).build(m[role].module)

    def after_update(self, m: Roles, role: str) -> None:
        """A step size stays above 0."""
        student: Any = m.student.module
        student.step_size.data.clamp_(min=1e-6)
