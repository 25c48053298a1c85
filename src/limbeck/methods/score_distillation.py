"""What SwiftBrush and SNOOPI share: a generator of one step that follows the gap of two scores, and what follows it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.convert.lora import AddLora
from limbeck.convert.slicing import Slice
from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.optim import Ema
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.objectives import Elements, per_sample, surrogate
from limbeck.diffusion.score_gap import alpha_weight
from limbeck.diffusion.scores import check_denoisers, check_follower, check_samples, denoising_loss
from limbeck.diffusion.signs import FOLLOWER_LIMITS
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class ScoreDistillation(Method):
    """Base of the methods of variational score distillation to one step: samples, two updates, and a `fake` of either form.

    Args:
        times: Between which shares of the schedule the student is judged.
        fake_times: Between which `fake` learns.
        dropout: Share of samples for which `fake` is told nothing, without which its guidance means nothing.
        elements: Whether a sample's elements are averaged, as in SwiftBrush's code, or add up.
        ema: Decay of an average of the student, the role `student_average`; 0 for none.
        fake_rank: Of adapters on the teacher's own weights, by which alone `fake` learns (LoRA, 64 in the papers); the default,
            0, is a whole copy, with which the proofs were made.
        fake_alpha: Of the adapters, over their rank: 108 with 64 in the authors' runs.
        fake_targets: Ends of the paths of the layers that get one, such as `to_q`; empty for all linear and convolution layers.
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()
    limits = FOLLOWER_LIMITS

    times: tuple[float, float] = (0.02, 0.98)
    fake_times: tuple[float, float] = (0.001, 1.0)
    dropout: float = 0.1
    elements: Elements = "mean"
    ema: float = 0.0
    fake_rank: int = 0
    fake_alpha: float = 108.0
    fake_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("times", "fake_times"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 < low < high <= 1, "0 < from < to <= 1")
        check_field("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        check_field("elements", self.elements, self.elements in ("sum", "mean"), "sum | mean")
        check_field("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        check_field("fake_rank", self.fake_rank, self.fake_rank >= 0, "0 or more")
        check_field("fake_alpha", self.fake_alpha, self.fake_alpha > 0, "above 0")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student are denoisers of one schedule and of samples of one shape."""
        check_denoisers(m, "teacher", "student", "fake", batch=batch)
        check_follower(m)
        with torch.no_grad():
            check_samples(self.generate(m, batch), batch.x)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """A copy of the teacher that follows the student, or the teacher with adapters, then both in turns."""
        if "fake" not in m:
            how = AddLora(self.fake_rank, self.fake_alpha, self.fake_targets) if self.fake_rank else Slice({})
            yield Convert("fake", how, of="teacher", name="add adapters" if self.fake_rank else "copy the teacher")
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        yield Train(self.step, roles={"student": None, "fake": None}, frozen=self.frozen, data=data.train, ema=average)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student and one of what follows it."""
        draws, logs = Draws(m, batch), dict[str, Tensor]()
        x = self.generate(m, batch)
        gap = self.gap(m, draws, batch, x, logs)
        logs["gap"] = per_sample(gap.square()).sqrt().mean()
        yield Update("student", surrogate(x, gap, self.elements), logs=logs)
        loss = denoising_loss(
            m, "fake", draws, x, batch.get("y"), times=self.fake_times, dropout=self.dropout, weight=alpha_weight,
            elements=self.elements,
        )  # fmt: skip
        yield Update("fake", loss)

    def generate(self, m: Roles, batch: Batch) -> Tensor:
        """The student's samples for the noise `batch.x` and the conditions `batch.y`."""
        return m.student(batch.x, condition=batch.get("y"))

    def gap(self, m: Roles, draws: Draws, batch: Batch, x: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """The gap of the two scores on generated samples `[B, ...]`, as `limbeck.diffusion.score_gap` gives it."""
        raise NotImplementedError
