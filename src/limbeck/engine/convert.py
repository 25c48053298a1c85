"""What a conversion stage does to a role, and how far it moved the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.core.stages import Convert

if TYPE_CHECKING:
    from limbeck.engine.run import Run


def convert(run: Run, stage: Convert) -> dict[str, Any]:
    """Convert a role; where the stage says on what, write into the history how far outputs and numbers moved."""
    before = _seen(run, stage, stage.of or stage.role)
    record = run.m.convert(stage.role, stage.how, stage.of)
    if before is not None:
        run.runtime.place(run.m[stage.role].module, shard=False)
        outputs, numbers = _seen(run, stage, stage.role) or before
        row = {f"convert/{name}": value for name, value in difference(before[0], outputs).items()}
        row |= {f"before/{name}": value for name, value in before[1].items()}
        row |= {f"after/{name}": value for name, value in numbers.items()}
        run.history.emit(stage.name, 0, 0, **row)
    return record


def difference(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far apart the outputs of a module before and after a conversion are.

    Args:
        before: `[B, ...]`.
        after: `[B, ...]`, of the same shape.

    Returns:
        The largest difference, the norm of the difference over that of the outputs, and the share of equal answers (largest
        output along the last dimension); nothing where the shapes differ.

    Example:
        >>> difference(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]]))
        {'max_abs_difference': 0.5, 'relative_difference': 0.1, 'agreement': 1.0}
    """
    if before.shape != after.shape:
        return {}
    before, after = before.double(), after.double()
    gap = after - before
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    relative = gap.norm() / before.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "max_abs_difference": gap.abs().max().item(),
        "relative_difference": relative.item(),
        "agreement": same.item(),
    }


@torch.no_grad()
def _seen(run: Run, stage: Convert, role: str) -> tuple[Tensor, Mapping[str, float]] | None:
    """A role's outputs on the first samples of what a conversion is compared on, and its evaluation."""
    if stage.compare is None or role not in run.m:
        return None
    frozen = run.m[role].frozen
    run.m[role].freeze()
    rows = torch.arange(min(run.engine.batch_size, len(stage.compare)))
    batch = stage.compare.batch(rows, 0).to(run.runtime.device)
    numbers = dict(run.evaluate(run.m)) if run.evaluate is not None and role == stage.role else {}
    outputs = run.m[role](batch)
    if not frozen:
        run.m[role].unfreeze()
    return outputs, numbers
