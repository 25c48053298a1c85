"""Distillation of embeddings: where each sample lies, and which samples lie near it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.update import Update
from limbeck.losses import cosine_distance, embedding_mse, similarity_kl
from limbeck.methods.checks import check_field, outputs


@dataclass(frozen=True)
class Embedding(Method):
    """The student's embeddings take the direction of the teacher's and the same neighbours; no labels are used.

    `w_c [1 - cos(s, t)] + w_s KL(softmax_j(cos(t_i, t_j) / tau) || softmax_j(cos(s_i, s_j) / tau)) + w_m |s - t|^2 / D`: the
    cosine loss of DistilBERT (Sanh et al. 2019), the similarity distributions of CompRess (Koohpayegani, Tejankar and
    Pirsiavash 2020) over the batch, and the squared error of Reimers and Gurevych (2020).

    Args:
        cosine_weight: `w_c >= 0`; needs a student as wide as the teacher.
        similarity_weight: `w_s >= 0`; the student may have any width.
        similarity_temperature: `tau > 0`; lower looks at the nearest neighbours only.
        mse_weight: `w_m >= 0`, for embeddings whose length counts; needs a student as wide as the teacher.

    Example:
        >>> m = Roles(teacher=torch.nn.Linear(4, 3), student=torch.nn.Linear(4, 3))
        >>> [update.role for update in Embedding().step(m, Batch(x=torch.eye(4)))]
        ['student']
    """

    logits: ClassVar[tuple[str, ...]] = ()

    cosine_weight: float = 1.0
    similarity_weight: float = 1.0
    similarity_temperature: float = 0.05
    mse_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cosine_weight", "similarity_weight", "mse_weight"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check_field("similarity_temperature", self.similarity_temperature, self.similarity_temperature > 0, "above 0")
        if not (self.cosine_weight or self.similarity_weight or self.mse_weight):
            raise UsageError(
                "there is nothing to learn", where="method", found="all weights are 0", expected="one above 0"
            )

    def check(self, m: Roles, batch: Batch) -> None:
        """Both give one vector per sample, of one width where vectors are compared with each other."""
        teacher, student = outputs(m, batch, "teacher", "student")
        free = not (self.cosine_weight or self.mse_weight)
        if student.ndim != 2 or teacher.ndim != 2 or (student.shape != teacher.shape and not free):
            raise UsageError(
                "the embeddings of teacher and student cannot be compared",
                where="roles.student",
                found=f"student {list(student.shape)}, teacher {list(teacher.shape)}",
                expected="[B, D]" if free else "[B, D], with one width D",
                fix=f"let the student end in a projection to {teacher.shape[-1]} numbers"
                + (", or set cosine_weight and mse_weight to 0" if student.ndim == teacher.ndim == 2 else ""),
            )

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student."""
        with torch.no_grad():
            teacher = m.teacher(batch)  # [B, D]
        student = m.student(batch)  # [B, D']
        terms = {}
        if self.cosine_weight:
            terms["cosine"] = self.cosine_weight * cosine_distance(student, teacher)
        if self.similarity_weight:
            temperature = self.similarity_temperature
            terms["similarity"] = self.similarity_weight * similarity_kl(student, teacher, temperature=temperature)
        if self.mse_weight:
            terms["mse"] = self.mse_weight * embedding_mse(student, teacher)
        yield Update("student", torch.stack(list(terms.values())).sum(), logs=terms)
