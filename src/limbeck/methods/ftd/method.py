"""A small data set on which networks are trained to where real data would have taken them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from limbeck.convert.slicing import Slice
from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.optim import Ema, Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.condensed import Become, Condensed
from limbeck.evaluate.condensation import whole
from limbeck.methods.checks import check_field
from limbeck.optim.unroll import FORMS, Form
from limbeck.teachers.following import Following, check_following
from limbeck.teachers.trajectories import ExpertTraining, Segments, Trajectories, check_network, train_experts


@dataclass(frozen=True)
class FTD(Method):
    """Flat trajectory distillation (Du et al. 2023); `radius=0` is its base, MTT (Cazenavette et al. 2022).

    Experts are trained on the real data, along flat valleys: descent along GSAM's direction within `radius`. Then the samples
    and their step size learn so that N steps on them, from an expert's weights `w_s`, end where the expert is M epochs later:
    `||w_N - w_{s+M}||^2 / ||w_s - w_{s+M}||^2`. A batch is a batch of such segments, one each in the paper.

    Args:
        radius: `rho` of the experts' perturbation.
        gsam_alpha: `a` of GSAM, 0.4 in the authors' code; 0 is SAM. The paper writes a weight of the sharpness instead, which
            is 1 for SAM and 0 for plain descent.
        adaptive: Whether the perturbation is in proportion to the squared weights, as in the code.
        experts: Number of experts.
        epochs: Of the experts.
        expert_lr: Their learning rate.
        expert_batch_size: Samples of their steps.
        student_steps: N.
        expert_epochs: M.
        starts: Segments start at epochs 0 to `starts - 1`.
        batch_size: Condensed samples of a step; None for all of them.
        operations: Augmentations, `("color", "shift", "cutout", "flip", "scale", "rotate")` for DSA.
        step_size: At first.
        step_size_lr: Its own learning rate; 0 keeps it.
        ema: Decay of the average of the samples that is delivered; 0 delivers the last ones.
        form: `constant` or `full`, the same gradient; `tesla`, the published approximation.

    Example:
        >>> import tempfile
        >>> from limbeck.data.condensed import Condensed
        >>> from limbeck.teachers.trajectories import Segments
        >>> net = torch.nn.Linear(4, 3)
        >>> m = Roles(teacher=net, student=Condensed(torch.randn(3, 4), torch.arange(3), step_size=0.1))
        >>> experts = Trajectories(None, net, ExpertTraining())
        >>> [update.role for update in [FTD().follow(experts, m, Segments(2, 5).batch(torch.tensor([3]), 0))]]
        ['student']
    """

    logits: ClassVar[tuple[str, ...]] = ("teacher",)
    reads: ClassVar[tuple[str, ...] | None] = ("teacher",)

    radius: float = 0.01
    gsam_alpha: float = 0.4
    adaptive: bool = True
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
    ema: float = 0.999
    form: Form = "constant"

    def __post_init__(self) -> None:
        for name in ("experts", "epochs", "student_steps", "expert_epochs", "starts"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("radius", "gsam_alpha", "step_size_lr"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_field("step_size", self.step_size, self.step_size > 0, "above 0")
        check_field("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        check_field("form", self.form, self.form in FORMS, " | ".join(FORMS))

    @property
    def expert_training(self) -> ExpertTraining:
        """How experts are trained."""
        return ExpertTraining(
            self.experts, self.epochs, self.expert_lr, batch_size=self.expert_batch_size, operations=self.operations,
            radius=self.radius, gsam_alpha=self.gsam_alpha, adaptive=self.adaptive,
        )  # fmt: skip

    @property
    def following(self) -> Following:
        """How the student follows them."""
        return Following(
            self.student_steps, self.expert_epochs, self.batch_size, self.operations, form=self.form
        )  # fmt: skip

    def check(self, m: Roles, batch: Batch) -> None:
        """The network's weights are all that it is, and experts are long enough."""
        check_network(m.teacher.module)
        check_following(m, self.following, self.epochs, self.starts)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Experts, then the samples."""
        training = replace(self.expert_training, seed=m.seed)
        network = whole(m.teacher, m.teacher.module)
        found = yield Collect("experts", lambda m, folder: train_experts(network, data.train, folder, training))
        yield Convert("student", Become(self.begun(m)), name="give a step size")
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        experts = Trajectories(found.path, whole(m.teacher, m.teacher.module), training)
        step = partial(self.follow, experts)
        segments = Segments(self.experts, self.starts)
        yield Train(step, roles={"student": None}, frozen=self.frozen, data=segments, ema=average)
        if average:
            yield Convert("student", Slice({}), of="student_average", name="deliver the average")

    def begun(self, m: Roles) -> Condensed:
        """The samples as they are, with a step size."""
        old: Any = m.student.module
        learn = ("x", "step_size") if self.step_size_lr else ("x",)
        return Condensed(old.x, old.y, step_size=self.step_size, learn=learn, info=old.info)

    def follow(self, experts: Trajectories, m: Roles, batch: Batch) -> Update:
        """One update of the samples and of their step size."""
        student: Any = m.student.module
        size = student.step_size.detach().clone()
        return Update("student", self.following.loss(m, experts, batch), logs={"step_size": size})

    def optimizer(self, m: Roles, role: str, optim: Optim) -> torch.optim.Optimizer:
        """The step size has a rate of its own."""
        own: Mapping[str, float] = {"step_size": self.step_size_lr / optim.lr, **optim.lr_multipliers}
        return replace(optim, lr_multipliers=own).build(m[role].module)

    def after_update(self, m: Roles, role: str) -> None:
        """A step size stays above 0."""
        student: Any = m.student.module
        student.step_size.data.clamp_(min=1e-6)
