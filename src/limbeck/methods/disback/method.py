"""Distribution matching along the way back: from where the student's samples are to where the teacher's are."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

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
from limbeck.diffusion.matching import bounded, matching_updates
from limbeck.diffusion.scores import check_denoisers, check_follower, denoising_loss
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class DisBack(Method):
    """Distribution backtracking distillation (Zhang et al. 2025), on distribution matching (DMD, Yin et al. 2024).

    A student that begins far from the data asks the teacher about samples that it never saw. So first a copy of the teacher,
    `fake`, learns the distribution of the student as it is, and copies are kept on the way: `target_0`, `target_1`, ... Then the
    student goes back along them: for `switch` steps each its aim is the last copy but one, then the one before, and so on to the
    teacher, which stays to the end, while `fake` goes on from where it is and follows the student.

    Args:
        nodes: Steps of `fake` after which a copy is kept, rising; most of the way lies in the first ones, so they are not at
            even distances. Without any it is distribution matching.
        switch: Steps towards each copy.
        guidance: Of the aim; `fake` is not guided.
        fake_steps: Steps of `fake` for one of the student, once both learn.
        times: Between which shares of the schedule the student is judged.
        fake_times: Between which `fake` learns.
        dropout: Share of samples for which `fake` is told nothing.
        ema: Decay of an average of the student in the last stage, the role `student_average`; 0 for none.

    Example:
        >>> from limbeck.diffusion import Denoiser, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8), RectifiedFlow(), "flow_prediction")
        >>> m = Roles(teacher=net(), student=net(), fake=net())
        >>> [update.role for update in DisBack().step("teacher", m, Batch(x=torch.randn(4, 2), id=torch.arange(4)))]
        ['student', 'fake']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()

    nodes: tuple[int, ...] = (4, 12, 30, 80, 250)
    switch: int = 100
    guidance: float = 1.0
    fake_steps: int = 1
    times: tuple[float, float] = (0.02, 0.98)
    fake_times: tuple[float, float] = (0.001, 1.0)
    dropout: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise((0, *self.nodes)))
        check_field("nodes", self.nodes, rising, "rising numbers of steps above 0")
        for name in ("switch", "fake_steps"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("times", "fake_times"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 < low < high <= 1, "0 < from < to <= 1")
        for name in ("dropout", "ema"):
            check_field(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student are denoisers of one schedule and of samples of one shape."""
        check_denoisers(m, "teacher", "student", "fake")
        check_follower(m)
        with torch.no_grad():
            found = self.generate(m, batch).shape
        if found != batch.x.shape:
            raise UsageError(
                "the student makes other samples than noise is given", where="roles.student", found=list(found),
                expected=list(batch.x.shape),
            )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Down to the student's distribution, and back."""
        if "fake" not in m:
            yield Convert("fake", Slice({}), of="teacher", name="copy the teacher")
        still, targets = ("teacher", "student"), list[str]()
        for i, (start, end) in enumerate(pairwise((0, *self.nodes))):
            frozen = (*still, *targets)
            yield Train(
                self.record,
                roles={"fake": None},
                frozen=(*still, *targets),
                data=data.train,
                steps=end - start,
                name="record",
            )
            if i < len(self.nodes) - 1:  # the last one is `fake` itself
                targets.append(f"target_{i}")
                yield Convert(targets[-1], Slice({}), of="fake", name="keep a copy")
        both = dict.fromkeys(("student", "fake"))
        for name in reversed(targets):
            step = partial(self.step, name)
            yield Train(
                step, roles=both, frozen=("teacher", *targets), data=data.train, steps=self.switch, name=f"to {name}"
            )
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        last = partial(self.step, "teacher")
        yield Train(last, roles=both, frozen=("teacher", *targets), data=data.train, ema=average, name="to the teacher")

    def record(self, m: Roles, batch: Batch) -> Update:
        """One update of `fake` on samples of the student as it was given."""
        with torch.no_grad():
            x = self.generate(m, batch)
        how: Any = {"times": self.fake_times, "dropout": self.dropout, "weight": bounded}
        return Update("fake", denoising_loss(m, "fake", Draws(m, batch), x, batch.get("y"), **how))

    def step(self, aim: str, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student towards a role, and one of what follows it."""
        yield from matching_updates(
            m, batch, self.generate(m, batch), teacher=aim, guidance=self.guidance, times=self.times,
            fake_times=self.fake_times, dropout=self.dropout, every=self.fake_steps,
        )  # fmt: skip

    def generate(self, m: Roles, batch: Batch) -> Tensor:
        """The student's samples for the noise `batch.x` and the conditions `batch.y`."""
        return m.student(batch.x, condition=batch.get("y"))
