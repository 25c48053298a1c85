"""A diffusion model of many steps made a generator of one, under random guidance, which may be told what not to draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.score_gap import drawn_scale, score_gap
from limbeck.methods.checks import check_field
from limbeck.methods.score_distillation import ScoreDistillation
from limbeck.nn.nasa import away


@dataclass(frozen=True)
class SNOOPI(ScoreDistillation):
    """Variational score distillation under a random scale of guidance, with negative prompts (Nguyen et al. 2024).

    PG-SB: the student's gradient on `x = D_student(sigma_T z, T, y)` is `sigma_t^2 (e_teacher^k - e_fake^k)`, both guided by the
    same k, drawn from a range. NASA-T: the student draws with `y` and a negative prompt `y_-`, which its cross-attention leads
    away from by a scale drawn for each step; the teacher is guided away from `y_-` in the place of nothing, `fake` is not.

    Args:
        guidance: The ends of the range of k; that each sample draws its own is inferred.
        nasa: Whether it is trained with negative prompts, `batch.negative`.
        nasa_scale: The ends of the range of the scale by which cross-attention leads away from them.

    Example:
        >>> import torch
        >>> from limbeck.diffusion import Denoiser, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8, classes=3), RectifiedFlow(), "flow_prediction", null=3)
        >>> m = Roles(teacher=net(), student=net(), fake=net())
        >>> batch = Batch(x=torch.randn(4, 2), y=torch.tensor([0, 1, 2, 0]), id=torch.arange(4))
        >>> [update.role for update in SNOOPI().step(m, batch)]
        ['student', 'fake']
    """

    guidance: tuple[float, float] = (0.5, 4.0)
    nasa: bool = False
    nasa_scale: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance", "nasa_scale"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 <= low <= high, "0 <= from <= to")

    def check(self, m: Roles, batch: Batch) -> None:
        """Denoisers of one schedule and of samples of one shape; for NASA negative prompts and a student that attends to them."""
        if "y" not in batch:
            raise UsageError(
                "guidance needs conditions", where="batch.y", found=repr(batch), fix="Noise(..., classes=C)"
            )
        if self.nasa and ("negative" not in batch or batch.negative.shape != batch.y.shape):
            raise UsageError(
                "nasa needs a negative prompt for each sample", where="batch.negative", found=repr(batch),
                expected="in the form of batch.y", fix="Noise(..., conditions=prompts, negatives=negative_prompts)",
            )  # fmt: skip
        super().check(m, batch)

    def gap(self, m: Roles, draws: Draws, batch: Batch, x: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """Of two networks under a drawn scale of guidance, the teacher's away from the negative prompts."""
        scale, negative = drawn_scale(self.guidance, draws), batch.negative if self.nasa else None
        return score_gap(
            m, draws, x, batch.y, scale=scale, fake_scale=scale, times=self.times, negative=negative, logs=logs
        )

    def generate(self, m: Roles, batch: Batch) -> Tensor:
        """The student's samples for the noise `batch.x` and the conditions `batch.y`, away from `batch.negative`."""
        if not self.nasa:
            return m.student(batch.x, condition=batch.y)
        low, high = self.nasa_scale
        scale = low + (high - low) * Draws(m, batch).once("nasa")
        with away(m.student.module, states(m.student, batch.negative), scale):
            return m.student(batch.x, condition=batch.y)


def states(role: Role, condition: Tensor) -> Tensor:
    """What the cross-attention of a role sees of conditions `[B, L, C]`: what its network's `states` makes of them.

    Raises:
        UsageError: The network has no such function, and the conditions are not states themselves.
    """
    module: Any = role.module
    make = getattr(getattr(module, "net", None), "states", None)
    if make is not None:
        return make(condition)
    if condition.ndim == 3 and condition.is_floating_point():
        return condition
    raise UsageError(
        "it is not known what attention sees of a negative prompt", where=f"roles.{role.name}.net.states",
        found=f"conditions {list(condition.shape)}", expected="a method `states(condition)` of the network that gives [B, L, C]",
        fix="add it, or give embeddings [B, L, C] as conditions",
    )  # fmt: skip
