"""One generator of one step for each part of the conditions, all from one teacher."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.convert.steps import ToExperts
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.matching import adversarial, bounded, check_discriminator, matching_updates
from limbeck.diffusion.objectives import per_sample
from limbeck.diffusion.scores import check_denoisers, check_follower, noisy, predicted, schedule_of
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class MSD(Method):
    """Multi-student distillation (Song et al. 2025), on distribution matching (DMD and DMD2, Yin et al. 2024).

    The classes are shared out, in order, among K students, each with a `fake` of its own: both roles become `Experts`, in which
    each sample reaches the student of its class alone. So one training of all is K trainings: with Adam, which knows no scale,
    each student's updates are those it would have alone on its part of the batch; clipping, if any, is of all together.

    Args:
        students: K; each class `c` of C goes to student `c K // C`. One is plain distribution matching.
        guidance: Of the teacher.
        fake_steps: Steps of `fake` for one of the students.
        match_steps: Steps of a first stage in which students learn the teacher's predictions at real samples with noise (teacher
            score matching, for students of another architecture); 0 for none.
        gan_weight: Of the adversarial term for the students, 3e-3 in the code of DMD2; 0 for none.
        discriminator_weight: Of that for `fake`.
        discriminator: Path of a part of each `fake`: the mean over its channels is the discriminator, in the place of DMD2's
            head of convolutions.
        times: Between which shares of the schedule students are judged.
        fake_times: Between which `fake` learns.

    With `match_steps` or `gan_weight` the data are real samples, and noise is drawn for them; else they are noise.

    Example:
        >>> from limbeck.diffusion import Denoiser, Experts, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8, classes=2), RectifiedFlow(), "flow_prediction", null=2)
        >>> two = lambda: Experts([net(), net()], owners=(0, 1))
        >>> m, y = Roles(teacher=net(), student=two(), fake=two()), torch.tensor([0, 1, 1])
        >>> [update.role for update in MSD().step(m, Batch(x=torch.randn(3, 2), y=y, id=torch.arange(3)))]
        ['student', 'fake']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()

    students: int = 4
    guidance: float = 1.0
    fake_steps: int = 1
    match_steps: int = 0
    gan_weight: float = 0.0
    discriminator_weight: float = 1e-2
    discriminator: str = ""
    times: tuple[float, float] = (0.02, 0.98)
    fake_times: tuple[float, float] = (0.001, 1.0)

    def __post_init__(self) -> None:
        for name in ("students", "fake_steps"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("match_steps", "gan_weight", "discriminator_weight"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("times", "fake_times"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 < low < high <= 1, "0 < from < to <= 1")

    @property
    def real(self) -> bool:
        """Whether the data are real samples."""
        return bool(self.match_steps or self.gan_weight)

    def check(self, m: Roles, batch: Batch) -> None:
        """Denoisers of one schedule, and class numbers to share out."""
        check_denoisers(m, "teacher", "student", "fake")
        check_follower(m)
        y = batch.get("y")
        if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point():
            raise UsageError(
                "there are no classes to share out among students", where="data.train.y",
                found="none" if y is None else f"{y.dtype} {list(y.shape)}", expected="a class number for each sample",
            )  # fmt: skip
        if self.gan_weight:
            told = bool(self.discriminator)
            check_field("discriminator", self.discriminator, told, "the path of a part of fake, for gan_weight above 0")
            check_discriminator(m, self.discriminator)

    def check_data(self, data: Any) -> None:
        """There are at least as many classes as students."""
        classes = data.num_classes if hasattr(data, "num_classes") else None
        fits = classes is None or classes >= self.students
        check_field("students", self.students, fits, f"at most {classes}, the classes of the data")

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Students and what follows each, then both in turns."""
        owners = share_out(data.num_classes or 1, self.students)
        if "fake" not in m:
            yield Convert("fake", ToExperts(owners=owners), of="teacher", name="a copy of the teacher for each student")
        yield Convert("student", ToExperts(owners=owners), name=f"{self.students} students")
        if self.match_steps:
            yield Train(
                self.match, roles={"student": None}, frozen=("teacher", "fake"), data=data.train, steps=self.match_steps,
                name="match the teacher",
            )  # fmt: skip
        yield Train(self.step, roles={"student": None, "fake": None}, frozen=self.frozen, data=data.train)

    def match(self, m: Roles, batch: Batch) -> Update:
        """One update of the students by the teacher's predictions."""
        schedule, y = schedule_of(m.teacher), batch.get("y")
        x_t, t = noisy(schedule, Draws(m, batch), "match", batch.x, *self.fake_times)
        with torch.no_grad():
            target = predicted(m.teacher, x_t, t, y)
        weight = bounded(*schedule.factors(t, x_t))
        return Update("student", per_sample(weight * (predicted(m.student, x_t, t, y) - target).square()).mean())

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the students, and one of what follows each."""
        draws, y = Draws(m, batch), batch.get("y")
        z = draws.normal("noise", batch.x) if self.real else batch.x
        x, more = m.student(z, condition=y), None
        if self.gan_weight:
            fooled, told = adversarial(m, draws, self.discriminator, batch.x, x, y, times=self.times)
            more = (self.gan_weight * fooled, self.discriminator_weight * told)
        yield from matching_updates(
            m, batch, x, guidance=self.guidance, times=self.times, fake_times=self.fake_times, every=self.fake_steps,
            more=more,
        )  # fmt: skip


def share_out(classes: int, students: int) -> tuple[int, ...]:
    """The student of each class: consecutive classes, numbers that differ by one at most.

    Example:
        >>> share_out(5, 2)
        (0, 0, 0, 1, 1)
    """
    return tuple(c * students // classes for c in range(classes))
