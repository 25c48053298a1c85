"""The one thing a step yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from limbeck.core.roles import Roles


@dataclass(frozen=True, eq=False)
class Update:
    """Ask for the gradient of `loss` in the parameters of one role, and for its optimizer step.

    Args:
        role: The role whose parameters receive the gradient; no other role does.
        loss: Scalar tensor, a mean over `count` items; None adds nothing, and applies what has accumulated.
        apply: False accumulates only: the gradient stays and adds to the role's next update.
        count: Items the mean was taken over, such as unmasked tokens; a number or a 0-d tensor. Default: the samples of the
            batch. Micro-batches and processes are weighted by it, so that together they equal one big batch.
        logs: Further scalars to record, as tensors; they are read only when the log is written.

    Example:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> update = Update("student", (w**2).mean(), logs={"norm": w.norm()})
        >>> update.backward(); w.grad
        tensor([1., 1.])
    """

    role: str
    loss: Tensor | None = None
    apply: bool = True
    count: int | Tensor | None = None
    logs: Mapping[str, Tensor] = field(default_factory=dict)

    def backward(self, m: Roles | None = None) -> None:
        """Backpropagate the loss, if there is one: for a loop of one's own.

        Args:
            m: The roles. With them the gradient reaches the parameters of the update's role alone, as it does in the engine,
                also where the loss passes through another role that learns.
        """
        if self.loss is not None:
            inputs = None if m is None else [p for p in m[self.role].parameters() if p.requires_grad]
            self.loss.backward(inputs=inputs)
