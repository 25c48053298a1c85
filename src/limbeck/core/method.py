"""A method is a program that yields stages; a step yields updates."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.limits import Limit
from limbeck.core.optim import Optim
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Stage, Step, Train
from limbeck.core.update import Update


class Method:
    """Base of all methods: a frozen dataclass whose fields are hyper-parameters only; it holds no state.

    A loss between a student and a teacher needs `step` alone. A chain of stages overrides `stages`. The hooks are called by
    the engine; in a loop of one's own one calls them where they are needed.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> @dataclass(frozen=True)
        ... class Mimic(Method):
        ...     weight: float = 1.0
        ...     def step(self, m, batch):
        ...         with torch.no_grad():
        ...             t = m.teacher(batch)
        ...         return self.weight * (m.student(batch) - t).square().mean()
        >>> m = Roles(teacher=torch.nn.Linear(2, 1), student=torch.nn.Linear(2, 1))
        >>> [u.role for u in updates(Mimic().step, m, Batch(x=torch.ones(3, 2)), "student")]
        ['student']
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    makes: ClassVar[tuple[str, ...]] = ()  # roles that the program makes itself and that may be given an optimizer
    logits: ClassVar[tuple[str, ...]] = ("teacher", "student")  # roles whose outputs are over the classes of the data
    reads: ClassVar[tuple[str, ...] | None] = None  # roles that are called with batches as they are; None: all
    limits: ClassVar[tuple[Limit, ...]] = ()  # of what it logs; the engine warns beyond them
    averages: ClassVar[bool] = True  # several teachers are one ensemble; False keeps them apart, see `Roles.teachers`

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """The program; by default one training stage on `data.train`."""
        yield Train(self.step, roles=dict.fromkeys(self.trains), frozen=self.frozen, data=data.train)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update] | Tensor | Update:
        """One step on one batch."""
        raise TypeError(f"{type(self).__name__} defines neither step nor stages")

    def check(self, m: Roles, batch: Batch) -> None:
        """Raise a `UsageError` for models and data that this method cannot work with; runs before the first step."""

    def check_data(self, data: Any) -> None:
        """Raise a `UsageError` for splits that are missing or do not fit together; runs before the first step."""

    def stores(self, role: Role, batch: Batch) -> Sequence[str]:
        """The layers of a teacher whose outputs are kept beside its logits where stored outputs stand in for it."""
        return ()

    def optimizer(self, m: Roles, role: str, optim: Optim) -> torch.optim.Optimizer:
        """The optimizer of a role, where a method brings its own; rate, schedule and clipping stay with `optim`."""
        return optim.build(m[role].module)

    def select(self, m: Roles, epoch: int) -> Tensor | None:
        """The sample ids to train on in this epoch `[N]`; None for all of them."""
        return None

    def after_update(self, m: Roles, role: str) -> None:
        """After the optimizer of `role` has stepped: clip a head, put a mask back."""

    def after_epoch(self, m: Roles, epoch: int) -> None:
        """After an epoch; may convert a role with `engine`-tracked surgery."""

    def after_stage(self, m: Roles, stage: Stage) -> None:
        """After a stage has ended."""

    def before_evaluate(self, m: Roles) -> None:
        """Before roles are evaluated: recalibrate statistics, say."""


def updates(step: Step, m: Roles, batch: Batch, role: str | None = None) -> Generator[Update, None, None]:
    """The updates of one step, whichever form the step has.

    Args:
        step: A generator function, or a function that returns an update or a loss.
        m: The roles.
        batch: The batch.
        role: The role that a bare loss belongs to.

    Yields:
        The updates, in program order.
    """
    result = step(m, batch)
    if isinstance(result, Tensor):
        if role is None:
            raise TypeError("a step that returns a bare loss needs exactly one training role")
        yield Update(role, result)
    elif isinstance(result, Update):
        yield result
    else:
        yield from result
