"""A condensed set in slots: one sample of each class, whose batch statistics belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.condensed import Condensed


@dataclass(frozen=True, eq=False)
class Slots:
    """All slots as the data of a stage: each step sees every one, whatever the batch size, so that none waits for others.

    Micro-batches and processes share them out.

    Args:
        rows: The samples of each slot `[b]`.
        units: Things that learn in each slot, such as compensators; a batch has slots times units.
    """

    rows: tuple[Tensor, ...]
    units: int = 1

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        """One number for each unit of each slot, as `x` and `id`."""
        ids = torch.arange(len(self))
        return Batch(x=ids, id=ids, view=torch.zeros_like(ids))

    def __len__(self) -> int:
        return len(self.rows) * self.units


def slots_of(condensed: Condensed, classes_at_once: int | None = None, units: int = 1) -> Slots:
    """Slot j: the j-th sample of each class; or of each of some classes, then slot j of the next ones follows it.

    Args:
        condensed: A set with equally many samples of each class.
        classes_at_once: Classes of a slot at most; None for all.
        units: As for `Slots`.

    Raises:
        UsageError: The classes have different numbers of samples.

    Example:
        >>> small = Condensed(torch.zeros(6, 1), torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> [rows.tolist() for rows in slots_of(small, 2).rows]
        [[0, 2], [4], [1, 3], [5]]
    """
    y = condensed.y
    if type(y) is not Tensor:  # fake tensors have no values
        y = torch.arange(len(y)) // condensed.info["images_per_class"]
    own = [(y == c).nonzero()[:, 0] for c in y.unique()]
    counts = [len(rows) for rows in own]
    if len(set(counts)) > 1:
        raise UsageError(
            "the classes have different numbers of samples", where="student", found=counts, expected="equally many",
            fix="condensed:N takes N of each class",
        )  # fmt: skip
    table = torch.stack(own)  # [C, n]
    parts = [part.cpu() for rows in table.T for part in rows.split(classes_at_once or len(own))]
    return Slots(tuple(parts), units)
