"""Knowledge distillation by softened class probabilities."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.update import Update
from limbeck.losses import kl
from limbeck.methods.checks import check_classes, check_field


@dataclass(frozen=True)
class KD(Method):
    """The student learns the teacher's softened probabilities, and a little of the labels.

    `(1 - w) tau^2 KL(softmax(t / tau) || softmax(s / tau)) + w CE(s, y)` (Hinton, Vinyals and Dean 2015, section 2).

    Args:
        temperature: `tau > 0`; higher shows more of how the teacher ranks the wrong classes.
        label_weight: `w` in [0, 1], the share of the labels; 0 wherever a batch has no labels.

    Example:
        >>> m = Roles(teacher=torch.nn.Linear(4, 3), student=torch.nn.Linear(4, 3))
        >>> batch = Batch(x=torch.ones(2, 4), y=torch.tensor([0, 2]))
        >>> [update.role for update in KD(temperature=2.0).step(m, batch)]
        ['student']
    """

    temperature: float = 4.0
    label_weight: float = 0.1

    def __post_init__(self) -> None:
        check_field("temperature", self.temperature, self.temperature > 0, "above 0")
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "a share in [0, 1]")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student have the same classes, and so have the labels."""
        check_classes(m, batch, labels=self.label_weight > 0 and "y" in batch)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student."""
        with torch.no_grad():
            teacher = m.teacher(batch)  # [B, C]
        student = m.student(batch)  # [B, C]
        soft = kl(student, teacher, temperature=self.temperature)
        if self.label_weight == 0 or "y" not in batch:
            yield Update("student", soft)
            return
        hard = F.cross_entropy(student.flatten(0, -2), batch.y.flatten())
        loss = (1 - self.label_weight) * soft + self.label_weight * hard
        yield Update("student", loss, logs={"soft": soft, "hard": hard})
