"""One generator of one step for each part of the classes, all from one teacher."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
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
from limbeck.diffusion.matching import check_discriminator, follower_weight, fooling, matching_updates, telling
from limbeck.diffusion.objectives import Elements, check_elements, per_sample
from limbeck.diffusion.scores import check_denoisers, check_follower, noisy, predicted, schedule_of
from limbeck.diffusion.signs import FOLLOWER_LIMITS
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class MSD(Method):
    """Multi-student distillation (Song et al. 2025), on distribution matching (DMD and DMD2, Yin et al. 2024).

    The classes are shared out among K students, each with a `fake` of its own: both roles become `Experts`, in which a sample
    reaches the student of its class alone. Losses are K times the mean over the batch, so that each student's are means over
    its own part, if the batch has equal parts; then one training is K trainings, each with a K-th of the batch. Only clipping,
    if any, sees all students together.

    Args:
        students: K; class `c` of C goes to student `c K // C`. One is plain distribution matching.
        owners: Other parts: the student of each class, as many classes for each, give or take one.
        guidance: Of the teacher; `fake` is not guided.
        fake_steps: Steps of `fake` for one of the students: 5 for class labels, 10 for prompts in the code of DMD2.
        match_steps: Steps of a first stage in which students learn the teacher's predictions at real samples with noise (teacher
            score matching, for students of another architecture); 0 for none.
        match_factor: The students' rate in that stage, as a multiple.
        gan_weight: Of the adversarial term for the students, 3e-3 for class labels in the code of DMD2; 0 for none.
        discriminator_weight: Of that for `fake`.
        gan_start: Share of the last stage after which both come in: without them first, as in the paper.
        discriminator: Path of a part of each `fake`: the mean over its channels is the discriminator, in the place of DMD2's
            head of convolutions.
        times: Between which shares of the schedule students are judged.
        fake_times: Between which `fake` learns.
        elements: Whether a sample's elements are averaged, as in the code of DMD2, or add up, in all losses of predictions.

    With `match_steps` or `gan_weight` the data are real samples, and noise is drawn for them; else they are noise.

    Example:
        >>> from limbeck.diffusion import Denoiser, Experts, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8, classes=2), RectifiedFlow(), "flow_prediction", null=2)
        >>> two = lambda: Experts([net(), net()], owners=(0, 1))
        >>> m, y = Roles(teacher=net(), student=two(), fake=two()), torch.tensor([0, 1, 1])
        >>> [update.role for update in MSD(2).step(m, Batch(x=torch.randn(3, 2), y=y, id=torch.arange(3)))]
        ['student', 'fake']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()
    limits = FOLLOWER_LIMITS

    students: int = 4
    owners: tuple[int, ...] = ()
    guidance: float = 1.0
    fake_steps: int = 1
    match_steps: int = 0
    match_factor: float = 1.0
    gan_weight: float = 0.0
    discriminator_weight: float = 1e-2
    gan_start: float = 0.0
    discriminator: str = ""
    times: tuple[float, float] = (0.02, 0.98)
    fake_times: tuple[float, float] = (0.001, 1.0)
    elements: Elements = "mean"

    def __post_init__(self) -> None:
        for name in ("students", "fake_steps"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("match_steps", "gan_weight", "discriminator_weight"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("times", "fake_times"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 < low < high <= 1, "0 < from < to <= 1")
        check_elements(self.elements)
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")
        told = not self.discriminator or self.gan_weight > 0
        check_field("discriminator", self.discriminator, told, "none without gan_weight")
        check_field("match_factor", self.match_factor, self.match_factor > 0, "above 0")
        check_field("gan_start", self.gan_start, 0 <= self.gan_start < 1, "in [0, 1)")
        if self.owners:
            sizes = [self.owners.count(k) for k in range(self.students)]
            fits = sum(sizes) == len(self.owners) and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
            expected = f"students 0 to {self.students - 1}, each as many times, give or take one"
            check_field("owners", self.owners, fits, expected)

    @property
    def real(self) -> bool:
        """Whether the data are real samples."""
        return bool(self.match_steps or self.gan_weight)

    def parts(self, classes: int) -> tuple[int, ...]:
        """The student of each of so many classes: consecutive ones, if nothing else is given.

        Example:
            >>> MSD(2).parts(5)
            (0, 0, 0, 1, 1)
        """
        return self.owners or tuple(c * self.students // classes for c in range(classes))

    def check(self, m: Roles, batch: Batch) -> None:
        """Denoisers of one schedule, and class numbers to share out."""
        check_denoisers(m, "teacher", "student", "fake", batch=batch)
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
        """There are as many classes as `owners` names, or at least as many as students."""
        if classes := data.num_classes:
            check_field(
                "students", self.students, classes >= self.students, f"at most {classes}, the classes of the data"
            )
            fits = len(self.owners) in (0, classes)
            check_field("owners", len(self.owners), fits, f"a student for each of the {classes} classes of the data")

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Students and what follows each; those of another architecture learn from the teacher; then both in turns."""
        owners = self.parts(data.num_classes or self.students)
        if "fake" not in m:
            yield Convert("fake", ToExperts(owners=owners), of="teacher", name="a copy of the teacher for each student")
        yield Convert("student", ToExperts(owners=owners), name=f"{self.students} students")
        if self.match_steps:
            yield Train(
                self.match, roles={"student": None}, frozen=("teacher",), data=data.train, steps=self.match_steps,
                lr_factor=self.match_factor, name="match the teacher",
            )  # fmt: skip
        yield Train(
            self.step, roles={"student": None, "fake": None}, frozen=self.frozen, data=data.train, name="distil"
        )

    def match(self, m: Roles, batch: Batch) -> Update:
        """One update of the students by the teacher's predictions."""
        schedule, y = schedule_of(m.teacher), batch.get("y")
        x_t, t = noisy(schedule, Draws(m, batch), "match", batch.x, *self.fake_times)
        with torch.no_grad():
            target = predicted(m.teacher, x_t, t, y)
        weight = follower_weight(schedule)(*schedule.factors(t, x_t))
        gap = predicted(m.student, x_t, t, y) - target
        return Update("student", self.students * per_sample(weight * gap.square(), self.elements).mean())

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the students, and one of what follows each."""
        draws, y, learns = Draws(m, batch), batch.get("y"), m.every(self.fake_steps)
        with torch.set_grad_enabled(learns):
            x = m.student(draws.normal("noise", batch.x) if self.real else batch.x, condition=y)
        more = {}
        if self.gan_weight and m.progress >= self.gan_start:
            more = {
                "student": lambda: self.gan_weight * fooling(m, draws, self.discriminator, x, y, times=self.times),
                "fake": lambda: (
                    self.discriminator_weight * telling(m, draws, self.discriminator, batch.x, x, y, times=self.times)
                ),
            }
        for update in matching_updates(
            m, batch, x, guidance=self.guidance, times=self.times, fake_times=self.fake_times, every=self.fake_steps,
            elements=self.elements, more=more,
        ):  # fmt: skip
            assert update.loss is not None
            yield replace(update, loss=self.students * update.loss)
