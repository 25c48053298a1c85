"""A small data set on which networks are trained to where real data would have taken them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from limbeck.convert.slicing import Slice
from limbeck.core.batch import Batch
from limbeck.core.optim import Ema
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.condensed import Become
from limbeck.methods.checks import check_field
from limbeck.methods.trajectory_matching import TrajectoryMatching
from limbeck.optim.unroll import Variant
from limbeck.teachers.following import Following
from limbeck.teachers.trajectories import ExpertTraining, Segments, Trajectories


@dataclass(frozen=True)
class FTD(TrajectoryMatching):
    """Flat trajectory distillation (Du et al. 2023); `radius=0` is its base, MTT (Cazenavette et al. 2022).

    Experts are trained on the real data, along flat valleys: descent along GSAM's direction within `radius`. Then the samples
    and their step size learn so that N steps on them, from an expert's weights `w_s`, end where the expert is M epochs later:
    `||w_N - w_{s+M}||^2 / ||w_s - w_{s+M}||^2`. A batch is a batch of such segments, one each in the paper.

    Args:
        radius: `rho` of the experts' perturbation.
        gsam_alpha: `a` of GSAM in the variant `code`, 0.4 there; 0 is SAM.
        adaptive: Whether, in the variant `code`, the perturbation is in proportion to the squared weights, as there.
        ema: Decay of the average of the samples that is delivered; 0 delivers the last ones.
        variant: `code`: experts descend along GSAM's direction, and the form `tesla` gives samples half of its gradient, as the
            published programs do; their tables and rates belong to it. `paper`: experts descend on the loss plus its
            sharpness with the text's weight of 1, which is SAM in a ball, and `tesla` is what its formula says.

    Example:
        >>> import torch
        >>> from limbeck import Roles
        >>> from limbeck.data.condensed import Condensed
        >>> from limbeck.teachers.trajectories import Segments
        >>> net = torch.nn.Linear(4, 3)
        >>> m = Roles(teacher=net, student=Condensed(torch.randn(3, 4), torch.arange(3), step_size=0.1))
        >>> experts = Trajectories(None, net, ExpertTraining())
        >>> FTD().follow(experts, m, Segments(2, 5).batch(torch.tensor([3]), 0)).role
        'student'
    """

    radius: float = 0.01
    gsam_alpha: float = 0.4
    adaptive: bool = True
    ema: float = 0.999
    variant: Variant = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("radius", "gsam_alpha"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_field("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")

    @property
    def expert_training(self) -> ExpertTraining:
        """How experts are trained."""
        alpha, adaptive = (self.gsam_alpha, self.adaptive) if self.variant == "code" else (0.0, False)
        return replace(super().expert_training, radius=self.radius, gsam_alpha=alpha, adaptive=adaptive)

    @property
    def following(self) -> Following:
        """How the student follows them."""
        return replace(super().following, variant=self.variant)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Experts, then the samples."""
        experts = yield from self.trained(m, data)
        yield Convert("student", Become(self.begun(m)), name="give a step size")
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        segments = Segments(self.experts, self.starts)
        step = partial(self.follow, experts)
        yield Train(step, roles={"student": None}, frozen=self.frozen, data=segments, ema=average)
        if average:
            yield Convert("student", Slice({}), of="student_average", name="deliver the average")

    def follow(self, experts: Trajectories, m: Roles, batch: Batch) -> Update:
        """One update of the samples and of their step size."""
        student: Any = m.student.module
        size = student.step_size.detach().clone()
        return Update("student", self.following.loss(m, experts, batch), logs={"step_size": size})
