"""What each model of an arm was made to compute, so that arms can be shown to have the same budget."""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from limbeck.core.roles import Roles


@dataclass
class Passes:
    """Passes through one model.

    Args:
        forward: Calls.
        backward: Calls whose output then received a gradient.
        examples: Samples over all calls, by the first dimension of the first tensor.
    """

    forward: int = 0
    backward: int = 0
    examples: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        """Those of both."""
        return Passes(self.forward + other.forward, self.backward + other.backward, self.examples + other.examples)


@contextmanager
def count_passes(*, learning: bool = False, **modules: nn.Module) -> Iterator[dict[str, Passes]]:
    """Count the passes through each module while the block runs; arms with equal counts had the same budget.

    Calls that go round `module(...)`, such as `module.forward(...)` or a sub-module called alone, are not seen.

    Args:
        learning: Count only calls in training mode, and so not what a program looks at to choose its next step.
        **modules: Models by name.

    Returns:
        Counts by name, filled as the block runs.

    Example:
        >>> import torch
        >>> student, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> with count_passes(student=student, teacher=teacher) as budget:
        ...     x = torch.ones(8, 2)
        ...     (student(x) - teacher(x).detach()).square().mean().backward()
        >>> budget["student"]
        Passes(forward=1, backward=1, examples=8)
        >>> budget["teacher"].backward
        0
    """
    counts = {name: Passes() for name in modules}
    handles = [
        m.register_forward_hook(
            _hook(counts[name], learning), with_kwargs=True, always_call=True
        )  # also if one stops early
        for name, m in modules.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def count_role_passes(roles: Roles, learning: Container[str] = ()) -> Iterator[dict[str, Passes]]:
    """As `count_passes`, of whatever module each role has at the time: also of roles that are converted or made meanwhile.

    Args:
        roles: The roles.
        learning: Names of roles of which only calls in training mode count.

    Returns:
        Counts by role, filled as the block runs.

    Example:
        >>> import torch
        >>> m = Roles(teacher=nn.Linear(2, 1))
        >>> with count_role_passes(m) as budget:
        ...     m.fake = nn.Linear(2, 1)
        ...     m.fake(torch.ones(8, 2)).sum().backward()
        >>> budget
        {'teacher': Passes(forward=0, backward=0, examples=0), 'fake': Passes(forward=1, backward=1, examples=8)}
    """
    counts = {name: Passes() for name in roles}

    def after_forward(module: nn.Module, *call: Any) -> None:
        for name, role in roles.items():
            if role.module is module:
                _counted(counts.setdefault(name, Passes()), name in learning, module, *call)

    handle = register_module_forward_hook(after_forward, with_kwargs=True, always_call=True)
    try:
        yield counts
    finally:
        handle.remove()


def total_passes(budgets: Iterable[Mapping[str, Passes]]) -> dict[str, Passes]:
    """The sums by name, of models that several trainings had.

    Example:
        >>> total_passes([{"student": Passes(1, 1, 8)}, {"student": Passes(2, 1, 16), "fake": Passes(4, 4, 32)}])["student"]
        Passes(forward=3, backward=2, examples=24)
    """
    total: dict[str, Passes] = {}
    for budget in budgets:
        for name, passes in budget.items():
            total[name] = total.get(name, Passes()) + passes
    return total


def as_dict(budget: dict[str, Passes]) -> dict[str, dict[str, int]]:
    """Plain data, for a proof's or a run's JSON."""
    return {name: asdict(passes) for name, passes in budget.items()}


def _hook(passes: Passes, learning: bool) -> Any:
    def after_forward(module: nn.Module, *call: Any) -> None:
        _counted(passes, learning, module, *call)

    return after_forward


def _counted(passes: Passes, learning: bool, module: nn.Module, args: Any, *rest: Any) -> None:
    """Add a call, and its backward pass when that comes; torch leaves the keywords out where a pass stops early."""
    kwargs, output = rest if len(rest) == 2 else ({}, *rest)
    if learning and not module.training:
        return
    passes.forward += 1
    passes.examples += next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim), 0)
    seen: list[None] = []

    def after_backward(_: Tensor) -> None:
        passes.backward += not seen  # several outputs of one call are one backward pass
        seen.append(None)

    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(after_backward)
