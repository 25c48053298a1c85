"""How well a training on a small data set follows a piece of an expert's trajectory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.data.augment import augment
from limbeck.data.condensed import Condensed
from limbeck.data.ids import mix, numbers
from limbeck.diffusion.draws import Draws
from limbeck.evaluate.condensation import whole
from limbeck.losses.trajectory import trajectory_matching
from limbeck.optim.unroll import Form, Variant, call_flat, unroll
from limbeck.teachers.trajectories import Trajectories


@dataclass(frozen=True)
class Following:
    """A student's training that is to end where an expert's epochs end.

    Args:
        student_steps: N, steps of the student.
        expert_epochs: M, epochs of the expert.
        batch_size: Samples of a step, drawn without replacement until all are used; None for the whole set.
        operations: Augmentations, one draw for all samples of a step (siamese).
        momentum: Of the student.
        form: How the training is differentiated, see `limbeck.optim.unroll`.
        variant: Of the form `tesla`, as there.
    """

    student_steps: int = 20
    expert_epochs: int = 2
    batch_size: int | None = None
    operations: tuple[str, ...] = ()
    momentum: float = 0.0
    form: Form = "constant"
    variant: Variant = "paper"

    def loss(
        self,
        m: Roles,
        experts: Trajectories,
        batch: Batch,
        *,
        scale: Callable[[int], float] = lambda start: 1.0,
        begin: Callable[[Tensor, Tensor], Tensor] = lambda weights, key: weights,
        weights: Sequence[float] = (),
    ) -> Tensor:
        """The mean over the segments of a batch of `trajectory_matching`, differentiable by the student's samples.

        Args:
            m: `student`, a condensed set with a step size; `teacher`, the network.
            experts: Their trajectories.
            batch: Segments.
            scale: Of the inner loss, by the epoch that a segment starts from.
            begin: What is done to the weights `[P]` that a segment starts from, with a key `[1]` for draws.
            weights: Of the same distance to the expert after 1, ..., M - 1 epochs, where the student has done as large a
                share of its steps; empty for the end alone.
        """
        condensed = m.student.module
        assert isinstance(condensed, Condensed)
        if len(batch.expert) >= 32:  # as many as a batch of samples usually has: nobody has thought about it
            warnings.warn(
                f"{len(batch.expert)} segments in a batch are as many trainings of {self.student_steps} steps for each update; "
                "the papers have one: engine.batch_size=1", stacklevel=2,
            )  # fmt: skip
        images, network = m.student(None), whole(m.teacher, m.teacher.module)
        size = condensed.step_size
        assert size is not None
        marks = (
            [k * (self.student_steps // self.expert_epochs) for k in range(1, self.expert_epochs)] if weights else []
        )
        losses = []
        keys = Draws(m, batch).keys("inner").cpu()
        for expert, epoch, key in zip(numbers(batch.expert), numbers(batch.start), keys.split(1), strict=True):
            start = begin(experts(expert, epoch), key)
            inner = self.inner(network, condensed.y, key, scale(epoch))
            ends = unroll(inner, start, images, size, self.student_steps, self.momentum, self.form, marks, self.variant)
            loss = trajectory_matching(ends[-1], start, experts(expert, epoch + self.expert_epochs))
            for k, weight in enumerate(weights, 1):
                loss = loss + weight * trajectory_matching(ends[k - 1], start, experts(expert, epoch + k))
            losses.append(loss)
        return torch.stack(losses).mean()

    def inner(
        self, network: nn.Module, y: Tensor, key: Tensor, scale: float = 1.0
    ) -> Callable[[Tensor, int, Tensor], Tensor]:
        """The student's loss at step i, a function of weights `[P]`, i and the samples; draws follow from `key` `[1]`."""
        rows = self._rows(len(y), numbers(key)[0])

        def loss(w: Tensor, i: int, images: Tensor) -> Tensor:
            x = augment(images[rows[i]], mix(key + i), self.operations)
            return scale * F.cross_entropy(call_flat(network, w, x), y[rows[i]])

        return loss

    def _rows(self, count: int, key: int) -> list[Any]:
        """Which samples each step sees."""
        size = self.batch_size or count
        if size >= count:
            return [slice(None)] * self.student_steps
        rng = np.random.default_rng(key & 0xFFFFFFFF)
        rows: list[Any] = []
        while len(rows) < self.student_steps:
            rows += torch.from_numpy(rng.permutation(count)).split(size)
        return rows[: self.student_steps]


def check_following(m: Roles, following: Following, epochs: int, starts: int) -> None:
    """The student is a condensed set, and experts are long enough.

    Raises:
        UsageError: They are not.
    """
    if not isinstance(m.student.module, Condensed):
        raise UsageError(
            "the student is no condensed set", where="student", found=type(m.student.module).__name__,
            expected="condensed:N, N samples of each class",
        )  # fmt: skip
    if starts < 1 or starts - 1 + following.expert_epochs > epochs:
        raise UsageError(
            "experts are trained for too few epochs", where="method.epochs", found=epochs,
            expected=f"at least starts - 1 + expert_epochs = {starts - 1 + following.expert_epochs}",
        )  # fmt: skip
