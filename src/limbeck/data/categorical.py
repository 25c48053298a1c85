"""Tables as rows of categories, side by side as one-hot vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.sources import TensorSource


@dataclass(frozen=True)
class Columns:
    """How the columns of a table become categories: numbers of many values by quantiles, all others by value.

    Args:
        names: Of the columns.
        values: The categories of each, in order; of numbers in bins the upper ends of all but the last.
        binned: Which columns are numbers in bins.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    binned: tuple[bool, ...]

    @classmethod
    def of(cls, table: Mapping[str, Sequence[Any]], bins: int = 4) -> Columns:
        """From the rows to learn from.

        Args:
            table: Values by column.
            bins: Of columns of numbers with more than twice as many different values.

        Raises:
            UsageError: A value is missing.

        Example:
            >>> columns = Columns.of({"age": [20.5, 30.1, 41.7, 50.2, 55.9], "sex": ["f", "m", "f", "m", "f"]}, bins=2)
            >>> columns.sizes, columns.codes({"age": [60.0], "sex": ["m"]}).tolist()
            ((2, 2), [[1, 1]])
        """
        values, binned = [], []
        for name, column in table.items():
            missing = [i for i, v in enumerate(column) if v is None or v != v or v == ""]
            if missing:
                raise UsageError(
                    "a value is missing", where=f"column '{name}'", found=f"{len(missing)} rows, the first is {missing[0]}",
                    fix="fill or drop these rows",
                )  # fmt: skip
            different = sorted(set(column))
            numbers = all(isinstance(v, int | float) for v in different) and len(different) > 2 * bins
            binned.append(numbers)
            if numbers:
                quantiles = torch.quantile(
                    torch.tensor([float(v) for v in column]), torch.linspace(0, 1, bins + 1)[1:-1]
                )
                values.append(tuple(dict.fromkeys(float(q) for q in quantiles)))
            else:
                values.append(tuple(different))
        return cls(tuple(table), tuple(values), tuple(binned))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Categories of each column."""
        return tuple(len(v) + b for v, b in zip(self.values, self.binned, strict=True))

    def codes(self, table: Mapping[str, Sequence[Any]]) -> Tensor:
        """Category numbers `[N, F]`.

        Raises:
            UsageError: A column is missing, or a value is none of the categories.
        """
        found = []
        for name, values, binned in zip(self.names, self.values, self.binned, strict=True):
            if name not in table:
                raise UsageError("a column is missing", where="table", found=", ".join(table), expected=name)
            if binned:
                x = torch.tensor([float(v) for v in table[name]])
                found.append(torch.bucketize(x, torch.tensor(values), right=False))
                continue
            unknown = set(table[name]) - set(values)
            if unknown:
                raise UsageError(
                    "this value is none of the categories", where=f"column '{name}'", found=sorted(map(str, unknown))[0],
                    expected=", ".join(map(str, values[:8])),
                )  # fmt: skip
            found.append(torch.tensor([values.index(v) for v in table[name]]))
        return torch.stack(found, 1)

    def source(self, table: Mapping[str, Sequence[Any]], groups: Sequence[Any]) -> TensorSource:
        """Rows as one-hot vectors side by side, the protected attribute as their label.

        Args:
            table: Values by column.
            groups: The protected attribute of each row.
        """
        codes, kinds = self.codes(table), sorted(set(groups))
        x = torch.cat([F.one_hot(c, n) for c, n in zip(codes.unbind(1), self.sizes, strict=True)], 1).float()
        y = torch.tensor([kinds.index(g) for g in groups])
        return TensorSource(x, y, torch.arange(len(x)), classes=[str(k) for k in kinds])


def biased_table(count: int = 2000, bias: float = 3.0, seed: int = 0) -> tuple[dict[str, list[float]], list[int]]:
    """A drawn table with a known bias: three merits, two stand-ins for the group, two columns of noise, and a decision that is
    the sum of the merits, moved by the group.

    Args:
        count: Rows.
        bias: How far the two groups' decisions are moved apart.
        seed: Of everything.

    Returns:
        The columns, `y` last, and the group of each row.
    """
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(2, (count,), generator=g)
    merits, proxies, noise = (torch.randn(count, k, generator=g) for k in (3, 2, 2))
    proxies = proxies + 1.5 * (group[:, None] - 0.5)
    y = merits.sum(1) + bias * (group - 0.5) + 0.5 * torch.randn(count, generator=g) > 0
    columns = {f"merit_{k}": merits[:, k].tolist() for k in range(3)}
    columns |= {f"proxy_{k}": proxies[:, k].tolist() for k in range(2)}
    columns |= {f"noise_{k}": noise[:, k].tolist() for k in range(2)}
    return columns | {"y": y.int().tolist()}, group.tolist()
