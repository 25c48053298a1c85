"""A diffusion model of many steps made a generator of a few, phase by phase, with an expert for each."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.convert.lora import AddLora, MergeLora
from limbeck.convert.slicing import Slice
from limbeck.convert.steps import Focus, ToExperts, ToSampler
from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.intervals import Target, add_more_noise, interval_gradient, interval_loss
from limbeck.diffusion.objectives import Elements, check_elements, dmd_gradient, per_sample, surrogate
from limbeck.diffusion.schedule import Schedule, shifted
from limbeck.diffusion.scores import check_denoisers, check_follower, check_samples, predicted, schedule_of
from limbeck.diffusion.signs import FOLLOWER_LIMITS, note_signs
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class Phase:
    """A part of the steps.

    Args:
        index: Of the phase, and of its expert.
        times: Of all steps up to its own last.
        first: The first step that is its own.
        end: The time at which its samples lie; 0 for clean ones.
        judged: Between which shares of the schedule they are judged, before the shift.
    """

    index: int
    times: tuple[float, ...]
    first: int
    end: float
    judged: tuple[float, float]


@dataclass(frozen=True)
class PhasedDMD(Method):
    """Few-step distribution matching, one phase of the steps after the other (Fan et al. 2025).

    Expert k takes the steps of phase k, from `t_{k-1}` to `t_k`, and is trained alone, by what its samples are at `t_k` and not
    at 0: they get noise up to a time t above `t_k`, and move by `alpha_t alpha_{t|t_k} / sigma_t^2 (D_fake - D_teacher)`, the
    gradient of the reverse KL. `fake`, made from the teacher anew in each phase, learns the score of samples that hold noise from
    the unbiased targets of `limbeck.diffusion.intervals`. In a phase of several steps a number of them is drawn, the last of
    which goes on to `t_k` and alone has a gradient. Each phase takes the run's steps.

    Args:
        steps: Of the student, a multiple of `phases`.
        phases: And experts.
        shift: Moves the times of steps and noise towards noise: 5 for Wan, 3 for Qwen-Image.
        guidance: Of the teacher; the paper does not tell what it trained with, and samples its teacher with 4.
        fake_steps: Updates of `fake` for one of the student.
        weight: Of the gradient: `kl`, as above, or `dmd`, over the distance to the teacher's
            prediction (inferred for `t_k` above 0).
        target: Of `fake`; `biased` takes samples at `t_k` for clean ones, to compare with.
        clamp: The most that the loss of `fake` is divided by `sigma_{t|t_k}^2`.
        nested: Whether phase k is judged from `t_k` up to the end; False: up to `t_{k-1}`, which the paper found worse.
        margin: Share of the schedule between `t_k` and the least noise.
        elements: Whether a sample's elements are averaged or add up, in both losses.
        rank: Of the experts' adapters, LoRA that is merged at the end; 0 to train whole experts.
        lora_alpha: Of the adapters.

    Example:
        >>> from limbeck.diffusion import Denoiser, RectifiedFlow
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8), RectifiedFlow(), "flow_prediction")
        >>> method, m = PhasedDMD(guidance=1.0), Roles(teacher=net(), student=net(), fake=net())
        >>> for conversion in method.experts(m):
        ...     _ = m.convert("student", conversion.how)
        >>> batch = Batch(x=torch.randn(4, 2), id=torch.arange(4))
        >>> [update.role for update in method.step(m, batch, method.plan(RectifiedFlow())[0])]
        ['fake', 'student']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    makes: ClassVar[tuple[str, ...]] = ("fake",)
    logits: ClassVar[tuple[str, ...]] = ()
    limits = FOLLOWER_LIMITS

    steps: int = 4
    phases: int = 2
    shift: float = 1.0
    guidance: float = 4.0
    fake_steps: int = 5
    weight: Literal["kl", "dmd"] = "kl"
    target: Target = "unbiased"
    clamp: float = 10.0
    nested: bool = True
    margin: float = 0.02
    elements: Elements = "mean"
    rank: int = 0
    lora_alpha: float = 8.0

    def __post_init__(self) -> None:
        check_field("phases", self.phases, self.phases >= 1, "1 or more")
        whole = self.steps >= 1 and self.steps % self.phases == 0
        check_field("steps", self.steps, whole, f"a multiple of the {self.phases} phases")
        check_field("fake_steps", self.fake_steps, self.fake_steps >= 1, "1 or more")
        check_field("weight", self.weight, self.weight in ("kl", "dmd"), "kl | dmd")
        check_field("target", self.target, self.target in ("unbiased", "biased"), "unbiased | biased")
        for name in ("shift", "clamp", "lora_alpha"):
            check_field(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        check_field("margin", self.margin, 0 < self.margin < 1 / self.phases, f"in (0, {1 / self.phases:.2g})")
        check_elements(self.elements)
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")
        check_field("rank", self.rank, self.rank >= 0, "0 or more")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student are denoisers of one schedule and of samples of one shape."""
        check_denoisers(m, "teacher", "student", "fake", batch=batch)
        check_follower(m)
        with torch.no_grad():
            check_samples(m.student(batch.x, condition=batch.get("y")), batch.x)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Experts out of the student, then each phase: `fake` from the start, and one expert that learns."""
        origin = "teacher"
        if "fake" in m:
            origin = "fake_at_first"
            yield Convert(origin, Slice({}), of="fake", name="keep what follows as it was")
        phases = self.plan(schedule_of(m.student))
        for conversion in self.experts(m):  # noqa: UP028  the engine sends answers
            yield conversion
        for phase in phases:
            yield Convert("student", Focus(phase.index), name=f"expert {phase.index + 1} learns")
            yield Convert("fake", Slice({}), of=origin, name="what follows begins anew")
            yield Train(
                partial(self.step, phase=phase), roles={"student": None, "fake": None}, frozen=self.frozen,
                data=data.train, name=f"phase {phase.index + 1}",
            )  # fmt: skip
        if self.rank:
            yield Convert("student", MergeLora(), name="merge the adapters")

    def plan(self, schedule: Schedule) -> list[Phase]:
        """The phases under a schedule."""
        shares = 1 - torch.arange(self.steps) / self.steps
        times = schedule.at(shifted(shares, self.shift)).tolist()
        each, found = self.steps // self.phases, []
        for k in range(self.phases):
            last = (k + 1) * each
            judged = (1 - (k + 1) / self.phases + self.margin, 1.0 if self.nested else 1 - k / self.phases)
            end = times[last] if last < self.steps else 0.0
            found.append(Phase(k, tuple(times[:last]), k * each, end, judged))
        return found

    def experts(self, m: Roles) -> list[Convert]:
        """What makes the student a sampler in steps, with an expert for each phase."""
        phases = self.plan(schedule_of(m.student))
        bounds = [(phase.times[-1] + phase.end) / 2 for phase in phases[:-1]]
        how: list[Any] = [AddLora(self.rank, self.lora_alpha)] if self.rank else []
        how += [ToExperts(bounds), ToSampler(phases[-1].times, "ddim")]
        return [Convert("student", each, name=f"{self.phases} experts, {self.steps} steps") for each in how]

    def step(self, m: Roles, batch: Batch, phase: Phase) -> Iterator[Update]:  # type: ignore[override]
        """One update of what follows the student, and in one of `fake_steps` steps one of the phase's expert."""
        draws, condition, schedule = Draws(m, batch), batch.get("y"), schedule_of(m.teacher)
        with torch.no_grad():
            x = self.generate(m, draws, batch, phase, "fake")[0]
            x_t, t, noise = self.renoise(schedule, draws, x, phase, "fake")
        found = predicted(m.fake, x_t, t, condition)
        loss = interval_loss(
            schedule, found, x, noise, phase.end, t, target=self.target, clamp=self.clamp, elements=self.elements
        )
        yield Update("fake", loss)
        if not m.every(self.fake_steps):
            return
        x, clean = self.generate(m, draws, batch, phase, "student")
        with torch.no_grad():
            x_t, t, _ = self.renoise(schedule, draws, x, phase, "student")
            real, fake = predicted(m.teacher, x_t, t, condition, self.guidance), predicted(m.fake, x_t, t, condition)
            if self.weight == "kl":
                gradient = interval_gradient(schedule, real, fake, phase.end, t)
            else:
                gradient = dmd_gradient(clean, real, fake)
        logs = {"gap": per_sample((real - fake).square()).sqrt().mean()}
        note_signs(logs, clean, real, fake)
        yield Update("student", surrogate(x, gradient, self.elements), logs=logs)

    def generate(self, m: Roles, draws: Draws, batch: Batch, phase: Phase, name: str) -> tuple[Tensor, Tensor]:
        """Samples at the end of a phase after a drawn number of its steps, and `x_0` as predicted in the last of them."""
        schedule, condition = schedule_of(m.student), batch.get("y")
        each = len(phase.times) - phase.first
        last = phase.first + int(each * draws.once(f"{name} steps"))
        z = draws.normal(f"noise of phase {phase.index}", batch.x) if name == "fake" else batch.x
        x, x_0 = z, z
        for i, time in enumerate(phase.times[: last + 1]):
            t = torch.full((len(z),), time, device=z.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
                x = schedule.begin(z, t) if i == 0 else x
                x_0 = m.student(x, t=t, condition=condition, expert=i // each)
                then = phase.end if i == last else phase.times[i + 1]
                x = schedule.step(x_0, x, t, torch.full_like(t, then)).to(z.dtype) if then else x_0
        return x, x_0

    def renoise(
        self, schedule: Schedule, draws: Draws, x: Tensor, phase: Phase, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of a phase with noise at a time of its interval, these times `[B]`, and the noise."""
        low, high = phase.judged
        share = low + (high - low) * draws.uniform(f"{name} time of phase {phase.index}")
        t = schedule.at(shifted(share, self.shift)).to(x.device)
        noise = draws.normal(f"{name} noise of phase {phase.index}", x)
        return add_more_noise(schedule, x.detach(), noise, phase.end, t), t, noise
