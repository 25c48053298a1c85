"""Plackett-Luce distillation: the label first, then the teacher's order of the other classes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.update import Update
from limbeck.losses import plackett_luce
from limbeck.methods.checks import check_classes, check_field


@dataclass(frozen=True)
class PLD(Method):
    """One list-wise loss in place of cross-entropy and distillation, with no weight between them.

    `sum_k a_k [logsumexp_{l >= k} s_{pi_l} - s_{pi_k}]`, pi the label and then the other classes by falling teacher logit,
    `a_k = softmax(t / tau)_{pi_k}` (Bassam, Zhu and Bian 2025, section 4). The log `trust` is the mean weight of the label's
    own term, `a_1`: near 0, the teacher is against the labels and they hardly count.

    Args:
        temperature: `tau > 0` of the weights; the student's logits are never tempered.
        top_k: Keep the first k choices only, where C is as large as a vocabulary (an extension). None keeps all.

    Example:
        >>> m = Roles(teacher=torch.nn.Linear(4, 3), student=torch.nn.Linear(4, 3))
        >>> batch = Batch(x=torch.ones(2, 4), y=torch.tensor([0, 2]))
        >>> [update.role for update in PLD().step(m, batch)]
        ['student']
    """

    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_field("temperature", self.temperature, self.temperature > 0, "above 0")
        check_field("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more, or none")

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher, student and labels have the same classes."""
        classes = check_classes(m, batch, labels=True)
        check_field("top_k", self.top_k, self.top_k is None or self.top_k <= classes, f"1 to {classes} classes")

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student."""
        with torch.no_grad():
            teacher = m.teacher(batch)  # [B, C]
            label = (teacher / self.temperature).softmax(-1).gather(-1, batch.y.unsqueeze(-1).long())
        loss = plackett_luce(m.student(batch), teacher, batch.y, temperature=self.temperature, top_k=self.top_k)
        yield Update("student", loss, logs={"trust": label.mean()})
