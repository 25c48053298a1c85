"""Steps that every method is compared with: no teacher, and plain distillation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.losses import kl


@dataclass(frozen=True)
class Supervised(Method):
    """A student that learns from labels alone, without a teacher.

    Args:
        smoothing: Share of the label's mass that is spread over all classes, in [0, 1].

    Example:
        >>> m = Roles(student=torch.nn.Identity())
        >>> Supervised().step(m, Batch(x=torch.zeros(2, 4), y=torch.tensor([0, 1])))
        tensor(1.3863)
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    logits: ClassVar[tuple[str, ...]] = ("student",)

    smoothing: float = 0.0

    def step(self, m: Roles, batch: Batch) -> Tensor:
        """Cross-entropy with the labels."""
        return supervised(m, batch, self.smoothing)


def supervised(m: Roles, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the student with the labels alone.

    Args:
        m: Roles with a `student` that gives logits `[B, C]`.
        batch: A batch with labels `y` `[B]`.
        smoothing: Share of the label's mass that is spread over all classes, in [0, 1].

    Example:
        >>> m = Roles(student=torch.nn.Identity())
        >>> supervised(m, Batch(x=torch.zeros(2, 4), y=torch.tensor([0, 1])))
        tensor(1.3863)
    """
    return F.cross_entropy(m.student(batch), batch.y, label_smoothing=smoothing)


def plain_kd(m: Roles, batch: Batch, temperature: float = 4.0, label_weight: float = 0.1) -> Tensor:
    """Distillation by softened probabilities and a little of the labels (Hinton, Vinyals and Dean 2015).

    Args:
        m: Roles with a `student` and a `teacher` that give logits `[B, C]`.
        batch: A batch with labels `y` `[B]`.
        temperature: `tau > 0`.
        label_weight: The share of the labels, in [0, 1].

    Example:
        >>> m = Roles(student=torch.nn.Identity(), teacher=torch.nn.Identity())
        >>> plain_kd(m, Batch(x=torch.zeros(2, 4), y=torch.tensor([0, 1])))
        tensor(0.1386)
    """
    with torch.no_grad():
        teacher = m.teacher(batch)
    student = m.student(batch)
    soft = kl(student, teacher, temperature=temperature)
    return (1 - label_weight) * soft + label_weight * F.cross_entropy(student, batch.y)
