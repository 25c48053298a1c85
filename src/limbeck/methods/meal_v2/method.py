"""MEAL V2: an ensemble's averaged probabilities, into a student that starts from good weights."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Stage, Train
from limbeck.core.update import Update
from limbeck.losses import soft_cross_entropy
from limbeck.methods.checks import check_classes, check_field, outputs
from limbeck.nn.discriminator import LogitDiscriminator, discrimination
from limbeck.teachers import Cached, Ensemble


@dataclass(frozen=True)
class MEALV2(Method):
    r"""The student learns the mean of its teachers' probabilities; a discriminator of logits is optional.

    $L = -\frac{1}{B} \sum_i \sum_c \bar q_{ic} \log \mathrm{softmax}(s_i)_c \pm w L_D$ with
    $\bar q = \frac{1}{M} \sum_m \mathrm{softmax}(t^m)$ (Shen and Savvides 2020). $L_D$ is the cross-entropy of a discriminator
    that tells the student's logits s from the teachers' mean logits. Weight decay can be 0, and the student should start from
    weights trained with labels: `pretrained: true` in a recipe, or `NAME@weights.safetensors`.

    Args:
        variant: "off", the default, has no discriminator: in the official code it soon saturates, and no ablation of it is
            known. "code": student and discriminator both lower $L_D$, so it does not oppose them, and its last layer ends in
            a ReLU. "paper": the student raises what the discriminator lowers (read from the text; without the last ReLU,
            inferred).
        discriminator_weight: `w > 0`.
        label_weight: Share of the cross-entropy with the labels, in [0, 1]; 0 in the paper.

    Example:
        >>> teachers = Ensemble([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)])
        >>> m = Roles(teacher=teachers, student=torch.nn.Linear(4, 3), discriminator=LogitDiscriminator(3))
        >>> [update.role for update in MEALV2(variant="code").step(m, Batch(x=torch.ones(2, 4)))]
        ['student', 'discriminator']
    """

    makes: ClassVar[tuple[str, ...]] = ("discriminator",)

    variant: Literal["off", "code", "paper"] = "off"
    discriminator_weight: float = 1.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        check_field("variant", self.variant, self.variant in ("off", "code", "paper"), "off, code or paper")
        check_field("discriminator_weight", self.discriminator_weight, self.discriminator_weight > 0, "above 0")
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "a share in [0, 1]")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teachers and student have the same classes, and the teachers' logits can be had where a discriminator reads them."""
        check_classes(m, batch, labels=self.label_weight > 0)
        self._check_logits(m)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """One training stage, with a discriminator as a role of its own where there is one."""
        if self.variant == "off":
            yield from super().stages(m, data)
            return
        self._check_logits(m)
        (logits,) = outputs(m, data.train.batch(torch.arange(2), 0), "student")
        m.discriminator = LogitDiscriminator(logits.shape[-1], self.variant == "code", m.rng("discriminator")).to(
            logits.device
        )
        yield Train(self.step, {"student": None, "discriminator": None}, self.frozen, data.train)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student, and one of the discriminator, each from the other's weights of before."""
        with torch.no_grad():
            mean, logits = teachers_of(m.teacher, batch) if self.variant != "off" else (m.teacher(batch), None)
        student = m.student(batch)  # [B, C]
        soft = soft_cross_entropy(student, mean.softmax(-1))
        loss, logs = soft, {"soft": soft.detach()}
        if self.label_weight > 0:
            loss = (1 - self.label_weight) * soft + self.label_weight * F.cross_entropy(student, batch.y)
        if logits is None:
            yield Update("student", loss, logs=logs)
            return
        told = discrimination(m.discriminator.raw(torch.cat([student, logits])), len(batch))
        sign = 1 if self.variant == "code" else -1
        yield Update("student", loss + sign * self.discriminator_weight * told, logs=logs)
        both = torch.cat([student.detach(), logits])
        told = discrimination(m.discriminator.raw(both), len(batch))
        yield Update("discriminator", self.discriminator_weight * told, logs={"told_apart": told.detach()})

    def _check_logits(self, m: Roles) -> None:
        if self.variant != "off" and isinstance(m.teacher.module, Cached):
            raise UsageError(
                "the discriminator needs the teachers' logits, and stored outputs are logarithms of mean probabilities",
                where="cache",
                found=f"variant={self.variant}, and stored outputs",
                fix="leave the cache out, or set variant=off",
            )


def teachers_of(role: Role, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of one or more teachers, the logarithm of their mean probabilities and their mean logits, both `[B, C]`."""
    if not isinstance(role.module, Ensemble):
        return (logits := role(batch)), logits
    each = role.raw(batch, apart=True)  # [M, B, C]
    return role.module.mean(each), each.mean(0)
