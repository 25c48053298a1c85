"""Distribution matching along the way back: from where the student's samples are to where the teacher's are."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.convert.slicing import Slice
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Ema
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.matching import follower_weight, matching_updates
from limbeck.diffusion.objectives import Elements, check_elements
from limbeck.diffusion.scores import (
    Gradient,
    check_denoisers,
    check_follower,
    check_samples,
    denoising_loss,
    schedule_of,
)
from limbeck.diffusion.signs import FOLLOWER_LIMITS
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class DisBack(Method):
    """Distribution backtracking distillation (Zhang et al. 2025), on distribution matching (DMD, Yin et al. 2024).

    A student that begins far from the data asks the teacher about samples that it never saw. So first a copy of the teacher,
    `fake`, learns the distribution of the student as it is, and copies are kept on the way: `target_0`, `target_1`, ... Then the
    student goes back along them: for `switch` steps each its aim is the last copy but one, the one before, and so on to the
    teacher, which stays to the end of the run, while `fake` goes on from where it is and follows the student.

    Args:
        nodes: Steps of `fake` at which the way is marked, rising; the last is their end, and `fake` itself the copy. Most of
            the way lies in the first steps, so marks at even distances waste steps. With none it is distribution matching;
            with one it is that with a `fake` that has learned before.
        switch: Steps of the run towards each copy.
        guidance: Of the aim; `fake` is not guided.
        gradient: The gap over `mean|x - D_teacher|` of each sample, as in the authors' code, or `sigma^2` times the gap of the
            noise predictions (`vsd`), as in the paper.
        fake_steps: Steps of `fake` for one of the student, once both learn.
        times: Between which shares of the schedule the student is judged.
        fake_times: Between which `fake` learns.
        dropout: Share of samples for which `fake` is told nothing.
        elements: Whether a sample's elements are averaged, as in the code of DMD, or add up.
        variant: `paper`; or `code`, where the aim is the teacher from the beginning: the released program loads a copy under
            other names than the network has, so that its switch changes nothing (inferred by reading, not by running it).
        ema: Decay of an average of the student, the role `student_average`; 0 for none.

    Example:
        >>> from limbeck.diffusion import Denoiser, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8), RectifiedFlow(), "flow_prediction")
        >>> m, batch = Roles(teacher=net(), student=net(), fake=net()), Batch(x=torch.randn(4, 2), id=torch.arange(4))
        >>> [update.role for update in DisBack(nodes=()).step(m, batch)]
        ['student', 'fake']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()
    limits = FOLLOWER_LIMITS

    nodes: tuple[int, ...] = (4, 12, 30, 80, 250)
    switch: int = 100
    guidance: float = 1.0
    gradient: Gradient = "dmd"
    fake_steps: int = 1
    times: tuple[float, float] = (0.02, 0.98)
    fake_times: tuple[float, float] = (0.001, 1.0)
    dropout: float = 0.0
    elements: Elements = "mean"
    variant: Literal["paper", "code"] = "paper"
    ema: float = 0.0

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise((0, *self.nodes)))
        check_field("nodes", self.nodes, rising, "rising numbers of steps above 0")
        check_field("gradient", self.gradient, self.gradient in ("dmd", "vsd"), "dmd | vsd")
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")
        check_elements(self.elements)
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")
        for name in ("switch", "fake_steps"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("times", "fake_times"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 < low < high <= 1, "0 < from < to <= 1")
        for name in ("dropout", "ema"):
            check_field(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")

    @property
    def aims(self) -> tuple[str, ...]:
        """The roles that the student is led to, in this order."""
        copies = len(self.nodes) - 1 if self.variant == "paper" else 0
        return (*(f"target_{i}" for i in reversed(range(copies))), "teacher")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student are denoisers of one schedule and of samples of one shape."""
        check_denoisers(m, "teacher", "student", "fake", batch=batch)
        check_follower(m)
        with torch.no_grad():
            check_samples(self.generate(m, batch), batch.x)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """To the student's distribution, with copies on the way, and back."""
        if "fake" not in m:
            yield Convert("fake", Slice({}), of="teacher", name="copy the teacher")
        if self.nodes:
            marks = {f"target_{i}": step for i, step in enumerate(self.nodes[:-1])}
            copies = {name: Ema("fake", 0.0, until=marks[name]) for name in self.aims if name in marks}
            yield Train(
                self.record, roles={"fake": None}, frozen=("teacher", "student"), data=data.train, steps=self.nodes[-1],
                ema=copies, name="record",
            )  # fmt: skip
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        roles = dict.fromkeys(("student", "fake"))
        yield Train(self.step, roles=roles, frozen=self.aims, data=data.train, ema=average, name="backtrack")

    def record(self, m: Roles, batch: Batch) -> Update:
        """One update of `fake` on samples of the student as it was given."""
        with torch.no_grad():
            x = self.generate(m, batch)
        loss = denoising_loss(
            m, "fake", Draws(m, batch), x, batch.get("y"), times=self.fake_times, dropout=self.dropout,
            weight=follower_weight(schedule_of(m.fake)), elements=self.elements,
        )  # fmt: skip
        return Update("fake", loss)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student towards its present aim, and one of what follows it."""
        if 0 < m.total <= (before := self.switch * (len(self.aims) - 1)):
            raise UsageError(
                "the run ends before the student is led to the teacher", where="method.switch, engine.steps",
                found=f"{m.total} steps", expected=f"more than {before}, {self.switch} for each of {len(self.aims) - 1} copies",
            )  # fmt: skip
        aim = self.aims[min(m.step // self.switch, len(self.aims) - 1)]
        with torch.set_grad_enabled(m.every(self.fake_steps)):
            x = self.generate(m, batch)
        yield from matching_updates(
            m, batch, x, teacher=aim, guidance=self.guidance, gradient=self.gradient, times=self.times,
            fake_times=self.fake_times, dropout=self.dropout, every=self.fake_steps, elements=self.elements,
        )  # fmt: skip

    def generate(self, m: Roles, batch: Batch) -> Tensor:
        """The student's samples for the noise `batch.x` and the conditions `batch.y`."""
        return m.student(batch.x, condition=batch.get("y"))
