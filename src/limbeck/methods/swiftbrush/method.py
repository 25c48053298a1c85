"""A diffusion model of many steps made a generator of one, without data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.score_gap import score_gap
from limbeck.methods.checks import check_field
from limbeck.methods.score_distillation import ScoreDistillation


@dataclass(frozen=True)
class SwiftBrush(ScoreDistillation):
    """One-step generation by variational score distillation from conditions alone (Nguyen and Tran 2024).

    The student, a copy of the teacher, is called once: `x = D_student(sigma_T z, T, y)`, z = `batch.x`. Its gradient on x is
    `sigma_t^2 (e_teacher^k - e_fake^k)`, both guided by the same k, so that nothing moves once the student's distribution is
    the teacher's; `fake`, another copy, learns from the student's samples: `alpha_t^2 ||e_fake - eps||^2`.

    Args:
        guidance: `k`; the method `snoopi` draws it from a range.
        guide_fake: Whether `fake` is guided too; without, the student ends elsewhere than at the teacher's distribution.

    Example:
        >>> import torch
        >>> from limbeck.diffusion import Denoiser, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8, classes=3), RectifiedFlow(), "flow_prediction", null=3)
        >>> m = Roles(teacher=net(), student=net(), fake=net())
        >>> batch = Batch(x=torch.randn(4, 2), y=torch.tensor([0, 1, 2, 0]), id=torch.arange(4))
        >>> [update.role for update in SwiftBrush().step(m, batch)]
        ['student', 'fake']
    """

    guidance: float = 4.5
    guide_fake: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.guidance, float | int):
            raise UsageError(
                "guidance is one number", where="method.guidance", found=self.guidance,
                fix="the method snoopi draws each sample's scale from a range",
            )  # fmt: skip
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")

    def gap(self, m: Roles, draws: Draws, batch: Batch, x: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """Of two networks under one scale of guidance."""
        own = self.guidance if self.guide_fake else 1.0
        return score_gap(m, draws, x, batch.get("y"), scale=self.guidance, fake_scale=own, times=self.times, logs=logs)
