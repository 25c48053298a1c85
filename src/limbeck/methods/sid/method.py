"""A diffusion model made a generator of one or a few steps, by the gap of two scores and the identity that ties them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.convert.slicing import Slice
from limbeck.convert.steps import ToSampler
from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.optim import Ema
from limbeck.core.roles import Roles, held
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.matching import bounded, check_discriminator, predicted_and_scored, telling
from limbeck.diffusion.objectives import Elements, check_elements, per_sample, sid_loss
from limbeck.diffusion.sampling import GradientSteps, Noise, few_step
from limbeck.diffusion.scores import (
    check_denoisers,
    check_follower,
    check_samples,
    denoising_loss,
    noisy,
    predicted,
    schedule_of,
)
from limbeck.diffusion.signs import FOLLOWER_LIMITS, note_signs
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class SiD(Method):
    """Few-step score identity distillation (Zhou et al. 2024; its form of several steps 2025).

    `L = w (D_teacher - D_fake) [(D_teacher - x) - alpha (D_teacher - D_fake)]` on the student's samples x with noise: with an
    exact `fake`, `1 - alpha` times the squared gap of the two, and for alpha = 1 a loss of 0 whose gradient is not. Gradients
    go through both networks. A number k of steps is drawn for every step of the training, gradients go through the k-th, and
    teacher and `fake` see the mixture of all of them, so that no step needs a `fake` of its own. `fake` is updated first.

    Args:
        steps: K, of the student.
        start: The share of the schedule at which its first step is; the others follow at even distances.
        noise: What a step adds to the sample of the one before: `fresh`, `fixed` or `ddim`.
        gradient_steps: `last`: through the k-th step alone, as in the code of SiD-DiT; `all`: through all of them, as in that
            of SiD-LSG, at k times the memory.
        alpha: 0 to 1.2; 0.5 to 1.2 in the papers.
        guidance: Of the teacher.
        fake_guidance: Of `fake` where the student learns; None for the teacher's, which is long guidance (LSG). With a teacher
            of 1, 0 is Zero-CFG and -1 Anti-CFG (the value is inferred).
        train_guidance: Of `fake` where it learns itself; None for `fake_guidance`.
        weight: Of the loss: `gap`, over the mean distance to the teacher's prediction of each sample, or `flow`, `1 - sigma`.
        times: Between which shares of the schedule the student is judged.
        fake_times: Between which `fake` learns.
        dropout: Share of samples for which `fake` is told nothing, where it is guided at all.
        gan_weight: Of an adversarial term; with it the data are real samples, and noise is drawn for them. The discriminator is
            the mean over channels of what a part of `fake` gives.
        elements: Whether a sample's elements add up in the student's losses, as in the authors' code, or are averaged. Those of
            `fake` are averaged, a factor that Adam does not feel.
        discriminator: Path of that part in `fake`, such as `net.mid_block`.
        gan_start: The share of the training after which the student sees the term.
        ema: Decay of an average of the student, the role `student_average`; 0 for none.

    Example:
        >>> from limbeck.diffusion import Denoiser, RectifiedFlow, Sampler
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8), RectifiedFlow(), "flow_prediction")
        >>> m = Roles(teacher=net(), student=Sampler(net(), (1.0, 0.5)), fake=net())
        >>> [update.role for update in SiD(steps=2).step(m, Batch(x=torch.randn(4, 2), id=torch.arange(4)))]
        ['fake', 'student']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()
    limits = FOLLOWER_LIMITS

    steps: int = 4
    start: float = 1.0
    noise: Noise = "fresh"
    gradient_steps: GradientSteps = "last"
    alpha: float = 1.0
    guidance: float = 1.0
    fake_guidance: float | None = None
    train_guidance: float | None = None
    weight: Literal["gap", "flow"] = "gap"
    times: tuple[float, float] = (0.02, 0.98)
    fake_times: tuple[float, float] = (0.001, 1.0)
    dropout: float = 0.1
    gan_weight: float = 0.0
    elements: Elements = "sum"
    discriminator: str = ""
    gan_start: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_field("steps", self.steps, self.steps >= 1, "1 or more")
        check_field("start", self.start, 0 < self.start <= 1, "in (0, 1]")
        check_field("noise", self.noise, self.noise in ("fresh", "fixed", "ddim"), "fresh | fixed | ddim")
        check_field("alpha", self.alpha, 0 <= self.alpha <= 1.2, "in [0, 1.2]")
        check_field("gradient_steps", self.gradient_steps, self.gradient_steps in ("last", "all"), "last | all")
        check_elements(self.elements)
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")
        told = not self.discriminator or self.gan_weight > 0
        check_field("discriminator", self.discriminator, told, "none without gan_weight")
        check_field("weight", self.weight, self.weight in ("gap", "flow"), "gap | flow")
        for name in ("times", "fake_times"):
            low, high = getattr(self, name)
            check_field(name, (low, high), 0 < low < high <= 1, "0 < from < to <= 1")
        for name in ("dropout", "gan_start", "ema"):
            check_field(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        check_field("gan_weight", self.gan_weight, self.gan_weight >= 0, "0 or more")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student are denoisers of one schedule and of samples of one shape."""
        check_denoisers(m, "teacher", "student", "fake", batch=batch)
        check_follower(m)
        with torch.no_grad():
            check_samples(m.student(batch.x, condition=batch.get("y")), batch.x)
        if self.gan_weight:
            told = bool(self.discriminator)
            check_field("discriminator", self.discriminator, told, "the path of a part of fake, for gan_weight above 0")
            check_discriminator(m, self.discriminator)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """A copy of the teacher that follows the student, steps for the student, then both in turns."""
        if "fake" not in m:
            yield Convert("fake", Slice({}), of="teacher", name="copy the teacher")
        schedule = schedule_of(m.student)
        times = schedule.step_at(self.start * (1 - torch.arange(self.steps) / self.steps))
        yield Convert("student", ToSampler(times.tolist(), self.noise), name=f"{self.steps} steps")
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        yield Train(self.step, roles={"student": None, "fake": None}, frozen=self.frozen, data=data.train, ema=average)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of what follows the student, and one of the student."""
        draws, condition = Draws(m, batch), batch.get("y")
        with torch.no_grad():
            x = self.generate(m, draws, batch, "fake")
        loss = denoising_loss(
            m, "fake", draws, x, condition, times=self.fake_times, dropout=self._dropout(), guidance=self._scale("train"),
            weight=_flow if self.weight == "flow" else bounded,
        )  # fmt: skip
        if self.gan_weight:
            loss = loss + telling(m, draws, self.discriminator, batch.x, x, condition, times=self.times) / 2
        yield Update("fake", loss)
        with held(m.fake):
            yield self.improve(m, draws, batch)

    def improve(self, m: Roles, draws: Draws, batch: Batch) -> Update:
        """The student's update."""
        schedule, condition = schedule_of(m.teacher), batch.get("y")
        x = self.generate(m, draws, batch, "student")
        x_t, t = noisy(schedule, draws, "student", x, *self.times)
        real = predicted(m.teacher, x_t, t, condition, self.guidance)
        adversarial = bool(self.gan_weight) and m.progress >= self.gan_start
        if adversarial:
            fake, scores = predicted_and_scored(m.fake, self.discriminator, x_t, t, condition, self._scale("fake"))
        else:
            fake = predicted(m.fake, x_t, t, condition, self._scale("fake"))
        weight = None if self.weight == "gap" else 1 - schedule.factors(t, x)[1].view(-1)
        loss = sid_loss(x, real, fake, self.alpha, weight, self.elements)
        logs = {"gap": per_sample((real - fake).detach().square()).sqrt().mean()}
        note_signs(logs, x, real, fake)
        if adversarial:
            share = 1 / per_sample((x - real).abs()).detach().clamp_min(1e-5) if weight is None else weight
            fooled = F.softplus(-scores) * (x[0].numel() if self.elements == "sum" else 1)
            loss = loss + self.gan_weight * (share * fooled.view(len(x), -1).mean(1)).mean()
        return Update("student", loss, logs=logs)

    def generate(self, m: Roles, draws: Draws, batch: Batch, name: str) -> Tensor:
        """The student's samples after k of its steps, k drawn for all."""
        z = draws.normal(f"{name} noise", batch.x) if self.gan_weight or name == "fake" else batch.x
        times: Any = getattr(m.student.module, "times", torch.tensor([schedule_of(m.student).last]))
        k = 1 + int(len(times) * draws.once("steps"))
        return few_step(
            m.student, z, schedule_of(m.student), times, batch.get("y"), self.noise,
            fresh=lambda i: draws.normal(f"{name} step {i}", z), upto=k, gradient_steps=self.gradient_steps,
        )  # fmt: skip

    def _scale(self, where: str) -> float:
        fake = self.guidance if self.fake_guidance is None else self.fake_guidance
        return fake if where == "fake" or self.train_guidance is None else self.train_guidance

    def _dropout(self) -> float:
        return self.dropout if any(self._scale(where) != 1 for where in ("fake", "train")) else 0.0


def _flow(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The error of the velocity, `(x_t - x_0) / sigma`."""
    return (1 / sigma**2).clamp(max=1e4)
