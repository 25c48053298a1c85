"""Something that can be differentiated, made to look like samples of a diffusion model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from limbeck.convert.slicing import Slice
from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.objectives import Elements, check_elements, per_sample, surrogate, vsd_gradient
from limbeck.diffusion.scores import check_denoisers, check_follower, denoising_loss, noisy, predicted, schedule_of
from limbeck.diffusion.signs import FOLLOWER_LIMITS, note_signs
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class VSD(Method):
    """Variational score distillation: particles, or a generator, under the gap of two scores (Wang et al. 2023).

    `g = w(t) (e_teacher^k(x_t, y) - e_fake(x_t, c))`, `w = sigma_t^2`, is the gradient on `x = student(batch)`: the teacher says
    where samples are likely, guided by k, and `fake`, a denoiser that learns from the student's own samples, where they are
    already. Steps alternate: one update of the student, one of `fake` on the same samples.

    The student is called with the batch; the teacher is told `batch.y`, `fake` `batch.camera` where there is one, else `batch.y`.

    Args:
        guidance: `k` of the teacher; `fake` is not guided.
        score: `learned`, or `noise`: the noise that was drawn stands in for the score of the samples, which is score
            distillation sampling (SDS, Poole et al. 2023) and ends in one point per mode.
        late: From `anneal` of the training on, times end at this share of the schedule in the place of `times[1]`.
        anneal: In [0, 1]; 1 for no change.
        times: Between which shares of the schedule.
        dropout: Share of samples for which `fake` is told nothing.
        elements: Whether a sample's elements add up, as in the authors' code, or are averaged.

    Example:
        >>> from limbeck.diffusion import ring
        >>> m, batch = Roles(teacher=ring(5), student=torch.nn.Linear(2, 2)), Batch(x=torch.zeros(3, 2), id=torch.arange(3))
        >>> [update.role for update in VSD(score="noise").step(m, batch)]
        ['student']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...] | None] = ("student",)
    limits = FOLLOWER_LIMITS

    guidance: float = 7.5
    score: Literal["learned", "noise"] = "learned"
    late: float = 0.5
    anneal: float = 0.2
    times: tuple[float, float] = (0.02, 0.98)
    dropout: float = 0.1
    elements: Elements = "sum"

    def __post_init__(self) -> None:
        low, high = self.times
        check_field("times", self.times, 0 < low < high <= 1, "0 < from < to <= 1")
        check_field("late", self.late, low < self.late <= 1, f"in ({low}, 1]")
        check_field("anneal", self.anneal, 0 <= self.anneal <= 1, "in [0, 1]")
        check_field("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        check_field("score", self.score, self.score in ("learned", "noise"), "learned | noise")
        check_elements(self.elements)
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")

    def check(self, m: Roles, batch: Batch) -> None:
        """The teacher is a denoiser that can be copied, or there is a `fake` already."""
        check_denoisers(m, "teacher", "fake", batch=batch if self.score == "learned" else None)
        if self.score == "learned":
            check_follower(m)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """A copy of the teacher that follows the student, then both in turns."""
        if self.score == "learned" and "fake" not in m:
            yield Convert("fake", Slice({}), of="teacher", name="copy the teacher")
        roles = {"student": None} | ({"fake": None} if self.score == "learned" else {})
        yield Train(self.step, roles=roles, frozen=self.frozen, data=data.train)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student and one of what follows it."""
        draws, schedule = Draws(m, batch), schedule_of(m.teacher)
        x = m.student(batch)
        condition = batch.get("y")
        camera = batch.get("camera", condition)
        low, high = self.times
        x_t, t = noisy(schedule, draws, "student", x.detach(), low, self.late if m.progress >= self.anneal else high)
        with torch.no_grad():
            real = predicted(m.teacher, x_t, t, condition, self.guidance)
            own = x if self.score == "noise" else predicted(m.fake, x_t, t, camera)
            gap = vsd_gradient(real, own, *schedule.factors(t, x))
        logs = {"gap": per_sample(gap.square()).sqrt().mean()}
        note_signs(logs, x, real, own)
        yield Update("student", surrogate(x, gap, self.elements), logs=logs)
        if self.score == "learned":
            loss = denoising_loss(
                m, "fake", draws, x, camera, times=self.times, dropout=self.dropout, elements=self.elements
            )
            yield Update("fake", loss)
