"""A video diffusion model made a generator of few steps: motion from the teacher, appearance from images."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.convert.fresh import Fresh
from limbeck.convert.lora import AddLora, MergeLora
from limbeck.convert.steps import ToSampler
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Ema
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.combine import Paired
from limbeck.diffusion.consistency import consistency_pair, pure_noise, sampling_times
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.scores import check_denoisers, schedule_of
from limbeck.losses.adversarial import discriminator_loss, generator_loss, gradient_penalty
from limbeck.losses.huber import pseudo_huber
from limbeck.methods.checks import check_field
from limbeck.nn.discriminator import feature_widths
from limbeck.nn.motion import MOTIONS, Motion, frames_at, motion_of

HEAD, DISCRIMINATOR = "limbeck.nn.motion:SpatialHead", "limbeck.nn.discriminator:FeatureDiscriminator"


@dataclass(frozen=True)
class MCM(Method):
    """The motion consistency model (Zhai et al. 2024).

    `L = huber(M(f(x_t, t)), sg M^-(f^-(x_s, s)))`: consistency distillation, `x_s` one guided step of the teacher before `x_t`,
    in a representation M of the motion, so that a discriminator of single frames may pull their appearance elsewhere: to
    `data.unlabelled`, images that look better than the clips' own frames. A share of the batches starts from clips that the
    student makes in one step. With adapters the target `f^-` is the student itself, else an average of it.

    Roles beside teacher and student: `features`, frozen, gives what a discriminator sees of frames, a tensor or a list of them
    (an attribute `features` of the teacher counts too; without either it sees the frames); `discriminator` takes it.

    Args:
        motion: M: `learn`, a small network on each frame (its average is `M^-`); `raw`, the clip itself, which is LCM; `diff`,
            each frame less the one before; `freql` or `freqh`, low or high frequencies.
        steps: Of the student that comes out.
        frames: The axis of time: 2 of videos `[B, C, T, H, W]`, 1 of `[B, T, D]`.
        guidance: The ends of the range of w, each sample its own; the teacher's scale is 1 + w, as in LCM.
        solver_steps: Of the teacher's whole flow, of which it takes one.
        scaling: Of the time in the boundary condition.
        huber: `c` of the loss.
        mixed: Share of the batches that start from the student's own clips.
        adversarial_weight: Of the frame discriminator; 0 for none.
        images: Frames of a clip that it sees, one from each of as many equal parts.
        penalty: Of its slope on the features.
        lora: Rank of the adapters that learn; 0 trains all weights.
        ema: Decay of the average that gives the targets where all weights learn.
        head_ema: Decay of the average of the motion head.

    Example:
        >>> from limbeck.diffusion import Cosine, Denoiser
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(12, 8), Cosine(), "v_prediction")
        >>> m = Roles(teacher=net(), student=net())
        >>> batch = Batch(x=torch.randn(2, 4, 3), id=torch.arange(2))
        >>> [update.role for update in MCM(motion="diff", frames=1, adversarial_weight=0.0).step(m, batch)]
        ['student']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("head", "discriminator")
    logits: ClassVar[tuple[str, ...]] = ()

    motion: Motion = "learn"
    steps: int = 4
    frames: int = 2
    guidance: tuple[float, float] = (5.0, 15.0)
    solver_steps: int = 50
    scaling: float = 4.0
    huber: float = 1e-3
    mixed: float = 0.5
    adversarial_weight: float = 1.0
    images: int = 2
    penalty: float = 1e-5
    lora: int = 64
    ema: float = 0.95
    head_ema: float = 0.95

    def __post_init__(self) -> None:
        check_field("motion", self.motion, self.motion in MOTIONS, " | ".join(MOTIONS))
        low, high = self.guidance
        check_field("guidance", (low, high), -1 <= low <= high, "-1 <= from <= to")
        check_field("solver_steps", self.solver_steps, 1 <= self.solver_steps < 1000, "1 to 999")
        check_field("steps", self.steps, 1 <= self.steps <= self.solver_steps, "1 to solver_steps")
        for name in ("frames", "images"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("scaling", "huber"):
            check_field(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("adversarial_weight", "penalty", "lora"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_field("mixed", self.mixed, 0 <= self.mixed <= 1, "in [0, 1]")
        for name in ("ema", "head_ema"):
            check_field(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")

    def check(self, m: Roles, batch: Batch) -> None:
        """Denoisers of one schedule and of clips of one shape, with frames."""
        check_denoisers(m, "teacher", "student")
        x = batch.x
        if not isinstance(x, Tensor) or x.ndim <= max(2, self.frames) or x.shape[self.frames] < 2:
            raise UsageError(
                "these are no clips", where="batch.x", found=repr(batch),
                expected=f"two frames or more along axis {self.frames}", fix="set method.frames to the axis of time",
            )  # fmt: skip
        with torch.no_grad():
            t = torch.full((len(x),), schedule_of(m.student).last, device=x.device)
            found = m.student(x, t=t, condition=batch.get("y")).shape
        if found != x.shape:
            raise UsageError(
                "the student makes other clips than the data's", where="roles.student", found=list(found),
                expected=list(x.shape),
            )  # fmt: skip

    def check_data(self, data: Any) -> None:
        """Images have the shape of a frame."""
        if not self.adversarial_weight or "unlabelled" not in data:
            return
        one = torch.zeros(1, dtype=torch.int64)
        clip, image = data.train.batch(one, 0).x, data.unlabelled.batch(one, 0).x
        if clip.ndim > self.frames and clip.select(self.frames, 0).shape != image.shape:
            raise UsageError(
                "the images are not like frames", where="data.unlabelled", found=list(image.shape[1:]),
                expected=list(clip.select(self.frames, 0).shape[1:]),
            )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Steps and adapters for the student, a head and a discriminator, then all in turns."""
        times = sampling_times(schedule_of(m.student), self.steps, self.solver_steps).tolist()
        yield Convert("student", ToSampler(times), name=f"{self.steps} steps")
        if self.lora:
            yield Convert("student", AddLora(self.lora), name="add adapters")
        first, source = data.train.batch(torch.arange(2), 0).x, data.train
        roles, ema = {"student": None}, {}
        if not self.lora:
            ema["student_average"] = Ema("student", self.ema)
        if self.motion == "learn":
            if "head" not in m:
                channels = first.movedim(self.frames, 1).shape[2]
                arguments = {"channels": channels, "frames": self.frames}
                yield Convert("head", Fresh(HEAD, arguments), of="student", name="make a motion head")
            roles["head"], ema["head_average"] = None, Ema("head", self.head_ema)
        if self.adversarial_weight:
            if "unlabelled" in data:
                source = Paired(data.train, data.unlabelled)
            if "discriminator" not in m:
                device = next((p.device for p in m.student.parameters()), first.device)
                with torch.no_grad():
                    seen = self.seen(m, first.select(self.frames, 0).to(device))
                make = Fresh(DISCRIMINATOR, {"widths": feature_widths(seen)}, seed=m.seed)
                yield Convert("discriminator", make, of="student", name="make a discriminator")
            roles["discriminator"] = None
        frozen = ["teacher", *(["features"] if "features" in m else [])]
        yield Train(self.step, roles=roles, frozen=frozen, data=source, ema=ema)
        if self.lora:
            yield Convert("student", MergeLora(), name="merge adapters")

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student, of its motion head, and of the discriminator of frames."""
        draws, condition = Draws(m, batch), batch.get("y")
        made, target = self.pair(m, draws, self.clean(m, draws, batch), condition)
        learns = self.motion == "learn" and "head" in m
        with torch.no_grad():
            goal = m.head_average(target) if learns else motion_of(target, self.motion, self.frames)
        found = m.head(made) if learns else motion_of(made, self.motion, self.frames)
        loss = pseudo_huber(found, goal, self.huber)
        logs = {"motion": loss.detach(), "magnitude": found.detach().square().mean()}
        if self.adversarial_weight:
            shown = frames_at(made, self.places(draws, made), self.frames)
            fooled = generator_loss(m.discriminator(*self.seen(m, shown)), "wgan")
            loss, logs["fooled"] = loss + self.adversarial_weight * fooled, fooled.detach()
        yield Update("student", loss, logs=logs)
        if learns:
            yield Update("head", pseudo_huber(m.head(made.detach()), goal, self.huber))
        if self.adversarial_weight:
            yield Update("discriminator", self.discriminate(m, draws, batch, shown.detach()))

    def clean(self, m: Roles, draws: Draws, batch: Batch) -> Tensor:
        """The clips that get noise: the data's, or, in a share of the batches, what the student makes of noise in one step."""
        if draws.once("mixed") >= self.mixed:
            return batch.x
        z, t = pure_noise(schedule_of(m.student), draws.normal("mixed noise", batch.x))
        with torch.no_grad():
            return m.student(z, t=t, condition=batch.get("y"))

    def pair(self, m: Roles, draws: Draws, x_0: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the student predicts, and what it should (LCM)."""
        low, high = self.guidance
        index = (draws.uniform("index") * self.solver_steps).long().to(x_0.device)
        scale = 1 + low + (high - low) * draws.uniform("guidance")
        target = m.student_average if "student_average" in m else m.student
        return consistency_pair(
            m.teacher, m.student, target, x_0, draws.normal("noise", x_0), index, condition, scale=scale,
            count=self.solver_steps, scaling=self.scaling,
        )  # fmt: skip

    def places(self, draws: Draws, x: Tensor) -> Tensor:
        """Which frames of each clip the discriminator sees `[B, images]`, one of each of as many parts."""
        parts = torch.stack([k + draws.uniform(f"frame {k}") for k in range(self.images)], 1)
        return (parts * (x.shape[self.frames] / self.images)).long()

    def seen(self, m: Roles, frames: Tensor) -> list[Tensor]:
        """What the discriminator sees of frames `[N, ...]`, with the way back to them."""
        own: Any = getattr(m.teacher.module, "features", None)
        if own is None and "features" not in m:
            return [frames]
        found = m.features.raw(frames) if "features" in m else own(frames)
        return [found] if isinstance(found, Tensor) else list(found)

    def discriminate(self, m: Roles, draws: Draws, batch: Batch, made: Tensor) -> Tensor:
        """Frames of the student told from images, with a penalty of the slope between them."""
        real, fake = self.real(draws, batch), made
        high, low = (m.discriminator(*self.seen(m, frames)) for frames in (real, fake))
        times = len(fake) // len(real)  # each image stands beside several frames
        loss = discriminator_loss(high.repeat_interleave(times, 0), low, "wgan")
        if not self.penalty:
            return loss
        share = draws.uniform("between").to(fake).repeat_interleave(self.images).view(-1, *(1,) * (fake.ndim - 1))
        with torch.no_grad():
            between = self.seen(m, torch.lerp(fake, real.repeat_interleave(times, 0), share))
        between = [f.detach().requires_grad_().clone() for f in between]  # no leaves, which a plan's hooks cannot count
        scores = m.discriminator(*between)
        return loss + self.penalty * torch.stack([gradient_penalty(scores, f) for f in between]).sum()

    def real(self, draws: Draws, batch: Batch) -> Tensor:
        """Images, or frames of the clips where there are none `[N, ...]`."""
        if "unlabelled" in batch:
            return batch.unlabelled["x"]
        return frames_at(batch.x, self.places(draws, batch.x), self.frames)
