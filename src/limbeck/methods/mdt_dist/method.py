"""A flow of many steps made one of one or two, by a network that learns the average velocity down to the data."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.convert.steps import ToSampler
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Ema
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.diffusion.derivative import Derivative, bounded, total_derivative
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.guidance import Scale
from limbeck.diffusion.objectives import Elements, check_elements, per_sample, surrogate, velocity_gradient
from limbeck.diffusion.schedule import RectifiedFlow
from limbeck.diffusion.scores import check_denoisers, predicted, schedule_of
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class MDTDist(Method):
    """Marginal-data transport distillation of rectified flows (Zhou et al. 2025).

    The student's velocity `phi(x_t, t)` is the average one from t to 0, `x_0 = x_t - t phi`; what it says of the velocity at t
    is `u = phi + t dphi/dt`, along the teacher's path. Velocity matching: `||phi + t sg(dphi/dt) - v||^2` at real samples with
    noise. Velocity distillation: the student's samples `x' = z' - phi(z', 1)` move by `(1 - t) (u - v)`, both of `x'` with noise
    and without gradient: its own u stands where other methods train a second network. Never use the second alone: before the
    first has taught it, u is wrong.

    Args:
        steps: Of the student: 1 or 2, or more.
        vd_weight: `lambda`, of velocity distillation; 0 for velocity matching alone.
        vd_start: The share of the training after which it joins.
        guidance: Of the teacher in velocity matching, `1 + w` where w is the scale of TRELLIS: there 41.
        vd_guidance: Of the teacher in velocity distillation; there 101. None for `guidance`.
        time: `logit_normal`, `sigmoid(N(1, 1))` as in the authors' code, or `uniform`, as in the paper's algorithm.
        derivative: `difference`, as published, or `jvp`, exact.
        dt: Of the difference, and the least time.
        normalise_derivative: Whether `dphi/dt` is divided by its norm plus 0.1, as in the authors' code and not in the paper.
        variant: Of velocity distillation: `paper`, or `code`, with 2 in the place of `1 - t`.
        elements: Whether a sample's elements are averaged or add up.
        ema: Decay of an average of the student, the role `student_average`; 0 for none.

    Example:
        >>> from limbeck.diffusion import Denoiser
        >>> from limbeck.nn.time_mlp import TimeMLP
        >>> net = lambda: Denoiser(TimeMLP(2, 8), RectifiedFlow(), "flow_prediction")
        >>> m = Roles(teacher=net(), student=net())
        >>> [(*u.logs, u.apply) for u in MDTDist().step(m, Batch(x=torch.randn(4, 2), id=torch.arange(4)))]
        [('matching', False), ('gap', True)]
    """

    logits: ClassVar[tuple[str, ...]] = ()

    steps: int = 1
    vd_weight: float = 1.0
    vd_start: float = 0.0
    guidance: float = 1.0
    vd_guidance: float | None = None
    time: Literal["logit_normal", "uniform"] = "logit_normal"
    derivative: Derivative = "difference"
    dt: float = 0.01
    normalise_derivative: bool = False
    variant: Literal["paper", "code"] = "paper"
    elements: Elements = "mean"
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_field("steps", self.steps, self.steps >= 1, "1 or more")
        check_field("vd_weight", self.vd_weight, self.vd_weight >= 0, "0 or more")
        check_field("time", self.time, self.time in ("logit_normal", "uniform"), "logit_normal | uniform")
        known = self.derivative in ("difference", "jvp")
        check_field("derivative", self.derivative, known, "difference | jvp")
        check_field("dt", self.dt, 0 < self.dt < 0.5, "in (0, 0.5)")
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")
        check_elements(self.elements)
        check_field("guidance", self.guidance, self.guidance >= 0, "0 or more; 1 is without")
        for name in ("vd_start", "ema"):
            check_field(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student are rectified flows of samples like those of the data."""
        check_denoisers(m, "teacher", "student", batch=batch)
        if not isinstance(schedule_of(m.teacher), RectifiedFlow):
            raise UsageError(
                "average velocities are defined for rectified flows", where="roles.teacher",
                found=type(schedule_of(m.teacher)).__name__, expected="RectifiedFlow",
            )  # fmt: skip
        with torch.no_grad():
            found = m.student(torch.zeros_like(batch.x), condition=batch.get("y")).shape
        if found != batch.x.shape:
            raise UsageError(
                "the student makes other samples than the data hold", where="roles.student", found=list(found),
                expected=list(batch.x.shape),
            )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Steps for the student, then one training; a step from a to b goes `(a - b) phi(x_a, a)`, which is DDIM's."""
        times = schedule_of(m.student).grid(self.steps)[:-1].tolist()
        yield Convert("student", ToSampler(times, "ddim"), name=f"{self.steps} steps")
        average = {"student_average": Ema("student", self.ema)} if self.ema else {}
        yield Train(self.step, roles={"student": None}, frozen=self.frozen, data=data.train, ema=average)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student, by both losses at the same times and with the same noise, one graph after the other."""
        draws, condition = Draws(m, batch), batch.get("y")
        t, noise = self.times(draws).to(batch.x.device), draws.normal("noise", batch.x)
        both = bool(self.vd_weight) and m.progress >= self.vd_start
        matching = self.match(m, batch.x, noise, t, condition)
        yield Update("student", matching, apply=not both, logs={"matching": matching.detach()})
        if both:
            x = m.student(draws.normal("generator noise", batch.x), condition=condition, t=torch.ones_like(t))
            v, u = self.velocities(m, x.detach(), noise, t, condition)
            factor = 2.0 if self.variant == "code" else _like(1 - t, x)
            loss = self.vd_weight * surrogate(x, velocity_gradient(v, u, factor), self.elements)
            yield Update("student", loss, logs={"gap": per_sample((u - v).square()).sqrt().mean()})

    def match(self, m: Roles, x: Tensor, noise: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """`||phi + t sg(dphi/dt) - v||^2`, mean over the batch."""
        x_t = schedule_of(m.teacher).add_noise(x, noise, t)
        with torch.no_grad():
            v = velocity(m.teacher, x_t, t, condition, self.guidance)
        phi = velocity(m.student, x_t, t, condition)
        slope = self.slope(m, x_t, t, v, condition, phi)
        return per_sample((phi + _like(t, x) * slope - v).square(), self.elements).mean()

    @torch.no_grad()
    def velocities(
        self, m: Roles, x: Tensor, noise: Tensor, t: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`v` and `u` at samples with noise: what the teacher says of the velocity there, and what the student says."""
        x_t = schedule_of(m.teacher).add_noise(x, noise, t)
        v = velocity(m.teacher, x_t, t, condition, self.guidance if self.vd_guidance is None else self.vd_guidance)
        phi = velocity(m.student, x_t, t, condition)
        return v, phi + _like(t, x) * self.slope(m, x_t, t, v, condition, phi)

    def slope(self, m: Roles, x_t: Tensor, t: Tensor, v: Tensor, condition: Tensor | None, phi: Tensor) -> Tensor:
        """`dphi/dt` along the teacher's path, without gradient."""
        found = total_derivative(
            partial(velocity, m.student, condition=condition), x_t, t, v, how=self.derivative, dt=self.dt, value=phi
        )
        return bounded(found) if self.normalise_derivative else found

    def times(self, draws: Draws) -> Tensor:
        """A time for each sample `[B]`, from `dt` to 1."""
        share = draws.uniform("time")
        if self.time == "logit_normal":
            share = torch.sigmoid(1 + draws.normal("time", share[:, None])[:, 0])
        low = self.dt + 1e-5
        return low + (1 - low) * share


def velocity(role: Role, x_t: Tensor, t: Tensor, condition: Tensor | None = None, scale: Scale = 1.0) -> Tensor:
    """A role's prediction of `eps - x_0`, under guidance where there is a condition."""
    x_0 = predicted(role, x_t, t, condition, scale)
    return schedule_of(role).convert(x_0, x_t, t, "sample", "flow_prediction")


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (x.ndim - 1))
