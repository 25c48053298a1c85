"""Tables as rows of categories, side by side as one-hot vectors, with a protected attribute beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.data import Data
from limbeck.data.ids import fractions
from limbeck.data.sources import TensorSource
from limbeck.data.tables import plain_table, read_delimited


@dataclass(frozen=True)
class Columns:
    """How the columns of a table become categories, and back: numbers of many values by quantiles, all others by value.

    Args:
        names: Of the columns without the protected one, the target last.
        values: The categories of each, in order; of numbers in bins one number for each bin.
        ends: Of numbers in bins the upper ends of all but the last; None for other columns.
        protected: The name of the protected attribute.
        groups: Its values.

    Example:
        >>> table = {"age": [20.5, 30.1, 41.7, 50.2], "sex": ["f", "m", "f", "m"], "paid": ["no", "no", "yes", "yes"]}
        >>> columns = Columns.of(table, "sex", "paid", bins=1)
        >>> columns.names, columns.sizes, columns.groups
        (('age', 'paid'), (1, 2), ('f', 'm'))
        >>> columns.table(columns.codes(table), columns.group_codes(table))["sex"]
        ['f', 'm', 'f', 'm']
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    ends: tuple[tuple[float, ...] | None, ...]
    protected: str
    groups: tuple[Any, ...]

    @classmethod
    def of(
        cls, table: Mapping[str, Sequence[Any]], protected: str, target: str, bins: int = 4,
        rows: Sequence[int] | None = None,
    ) -> Columns:  # fmt: skip
        """From a table.

        Args:
            table: Values by column; a data frame will do.
            protected: The column of the protected attribute.
            target: The column that classifiers are to predict.
            bins: Columns of numbers with more than twice as many values are put into so many bins, equally many rows in each.
            rows: Those that bins are made from. Default: all.

        Raises:
            UsageError: A column or value is missing, or a column holds both words and numbers; the protected attribute or the
                target has one value, or is a number with many.
        """
        found = _read(table)
        values: list[tuple[Any, ...]] = []
        ends: list[tuple[float, ...] | None] = []
        for name in (protected, target):
            _few(found, name, bins)
        names = [name for name in found if name not in (protected, target)] + [target]
        for name in names:
            different = _different(name, found[name])
            if not _continuous(different, bins):
                values.append(tuple(different))
                ends.append(None)
                continue
            seen = found[name] if rows is None else [found[name][row] for row in rows]
            middles, upper = _bins(torch.tensor(seen, dtype=torch.float64), bins)
            values.append(middles)
            ends.append(upper)
        groups = tuple(_different(protected, found[protected]))
        return cls(tuple(names), tuple(values), tuple(ends), protected, groups)

    @classmethod
    def numbered(cls, sizes: Sequence[int], groups: int) -> Columns:
        """Of rows that no table was given for: numbers for names and categories.

        Example:
            >>> Columns.numbered((2, 3), 2).values
            ((0, 1), (0, 1, 2))
        """
        values = tuple(tuple(range(size)) for size in sizes)
        return cls(
            tuple(f"column_{k}" for k in range(len(sizes))), values, (None,) * len(sizes), "group", tuple(range(groups))
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Categories of each column."""
        return tuple(map(len, self.values))

    def codes(self, table: Mapping[str, Sequence[Any]]) -> Tensor:
        """Category numbers `[N, F]`.

        Raises:
            UsageError: A column or value is missing, or a value is none of the categories.
        """
        found = _read(table, self.names)
        coded = []
        for name, values, ends in zip(self.names, self.values, self.ends, strict=True):
            if ends is None:
                coded.append(_numbered(name, found[name], values))
            else:
                x = torch.tensor([_number(name, v) for v in found[name]], dtype=torch.float64)
                coded.append(torch.bucketize(x, torch.tensor(ends, dtype=torch.float64)))
        return torch.stack(coded, 1)

    def group_codes(self, table: Mapping[str, Sequence[Any]]) -> Tensor:
        """The number of each row's group `[N]`.

        Raises:
            UsageError: The column or a value is missing, or a value is none of the groups.
        """
        return _numbered(self.protected, _read(table, (self.protected,))[self.protected], self.groups)

    def source(self, table: Mapping[str, Sequence[Any]]) -> RowSource:
        """The rows of a table, to train on."""
        return RowSource(self, self.codes(table), self.group_codes(table))

    def table(self, codes: Tensor, groups: Tensor) -> dict[str, list[Any]]:
        """Values by column, the protected attribute last; numbers in bins are the medians of their bins.

        Args:
            codes: Category numbers `[N, F]`.
            groups: Group numbers `[N]`.
        """
        named = zip(self.names, self.values, codes.T.tolist(), strict=True)
        columns = {name: [values[c] for c in column] for name, values, column in named}
        return columns | {self.protected: [self.groups[g] for g in groups.tolist()]}

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Columns:
        """From what `as_dict` gave."""
        values = tuple(map(tuple, tree["values"]))
        ends = tuple(None if e is None else tuple(e) for e in tree["ends"])
        return cls(tuple(tree["names"]), values, ends, tree["protected"], tuple(tree["groups"]))


class RowSource(TensorSource):
    """Rows as one-hot vectors side by side `[N, D]`, the number of the group as label.

    Args:
        columns: What they are.
        codes: Category numbers `[N, F]`.
        groups: Group numbers `[N]`.
        ids: Unique numbers. Default: the rows' positions.
    """

    def __init__(self, columns: Columns, codes: Tensor, groups: Tensor, ids: Tensor | None = None) -> None:
        parts = [F.one_hot(c, n) for c, n in zip(codes.unbind(1), columns.sizes, strict=True)]
        ids = torch.arange(len(codes)) if ids is None else ids
        super().__init__(torch.cat(parts, 1).float(), groups, ids, classes=[str(g) for g in columns.groups])
        self.columns = columns

    def classified(self) -> TensorSource:
        """The rows as classifiers are to read them: the target as label, `x` without it, and without the group.

        Example:
            >>> columns = Columns.numbered((2, 3), 2)
            >>> rows = RowSource(columns, torch.tensor([[0, 2], [1, 1]]), torch.tensor([1, 0])).classified()
            >>> rows.x.tolist(), rows.labels.tolist()
            ([[1.0, 0.0], [0.0, 1.0]], [2, 1])
        """
        width, values = self.columns.sizes[-1], self.columns.values[-1]
        return TensorSource(
            self.x[:, :-width], self.x[:, -width:].argmax(1), self.ids, classes=[str(v) for v in values]
        )


def columns_of(source: Any) -> Columns | None:
    """The columns of a source of rows, or of one that it is a part of; None where they are not known."""
    while source is not None and not isinstance(source, RowSource):
        source = getattr(source, "source", None)
    return None if source is None else source.columns


def table_data(
    table: Mapping[str, Sequence[Any]], protected: str, target: str, bins: int = 4, validation: float = 0.2,
    test: float = 0.2, seed: int = 0,
) -> Data:  # fmt: skip
    """The rows of a table in three parts; bins are made from those to train on.

    Args:
        table: As in `Columns.of`.
        protected: The column of the protected attribute.
        target: The column that classifiers are to predict.
        bins: Of columns of numbers.
        validation: Share of the rows to choose by.
        test: Share of the rows to report.
        seed: Of the division.

    Raises:
        UsageError: As `Columns.of`; or a part is empty or has one group.

    Example:
        >>> data = table_data(biased_table(500), "group", "y")
        >>> list(data), data.train.columns.sizes
        (['train', 'validation', 'test'], (4, 4, 4, 4, 4, 4, 4, 2))
    """
    u = fractions(torch.arange(len(next(iter(_read(table).values())))), seed)
    masks = {
        "train": u >= validation + test,
        "validation": u < validation,
        "test": (u >= validation) & (u < validation + test),
    }
    rows = {name: mask.nonzero()[:, 0] for name, mask in masks.items() if mask.any()}
    if "train" not in rows:
        raise UsageError(
            "there are no rows to learn from", where="data.train", found=f"{len(u)} rows", fix="smaller shares"
        )
    columns = Columns.of(table, protected, target, bins, rows["train"].tolist())
    codes, groups = columns.codes(table), columns.group_codes(table)
    for name, own in rows.items():
        if len(groups[own].unique()) < 2:
            raise UsageError(
                "a part of the table has one group", where=f"data.{name}", found=columns.groups[int(groups[own[0]])],
                fix="more rows, another seed, or larger shares",
            )  # fmt: skip
    return Data(**{name: RowSource(columns, codes[own], groups[own], own) for name, own in rows.items()})


def read_table(path: Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Values by column of a `.csv` or `.tsv` file, numbers as numbers.

    Args:
        path: The file.
        columns: Names, for a file without a line of names.

    Raises:
        UsageError: It is no table.
    """
    values, named = read_delimited(Path(path), columns)
    table = plain_table(values, str(path), named)
    return {name: [v.strip() if isinstance(v, str) else v for v in _plain(table.read(name))] for name in table.kinds}


def biased_table(count: int = 2000, bias: float = 3.0, seed: int = 0) -> dict[str, list[Any]]:
    """A drawn table with a known bias: three merits, two stand-ins for the group, two columns of noise, and a decision that is
    the sum of the merits, moved by the group.

    Args:
        count: Rows.
        bias: How far the two groups' decisions are moved apart; with 0 all else is the same.
        seed: Of everything.

    Returns:
        Values by column: the decision is `y`, the protected attribute `group`.
    """
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(2, (count,), generator=g)
    merits, proxies, noise = (torch.randn(count, k, generator=g) for k in (3, 2, 2))
    proxies = proxies + 1.5 * (group[:, None] - 0.5)
    y = merits.sum(1) + bias * (group - 0.5) + 0.5 * torch.randn(count, generator=g) > 0
    table: dict[str, list[Any]] = {f"merit_{k}": merits[:, k].tolist() for k in range(3)}
    table |= {f"proxy_{k}": proxies[:, k].tolist() for k in range(2)}
    table |= {f"noise_{k}": noise[:, k].tolist() for k in range(2)}
    return table | {"y": y.int().tolist(), "group": group.tolist()}


def _read(table: Mapping[str, Sequence[Any]], names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Columns as lists of plain values, all there and of one length."""
    names = list(table) if names is None else names
    for name in names:
        if name not in table:
            raise UsageError("a column is missing", where="table", found=", ".join(map(str, table)), expected=name)
    found = {}
    for name in names:
        found[name] = _plain(table[name])
        missing = [i for i, v in enumerate(found[name]) if v is None or v != v or v == ""]
        if missing:
            raise UsageError(
                "a value is missing", where=f"column '{name}'", found=f"{len(missing)} rows, the first is {missing[0]}",
                fix="fill or drop these rows, or give them a category of their own",
            )  # fmt: skip
    lengths = {name: len(column) for name, column in found.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise UsageError("columns differ in length, or there are no rows", where="table", found=lengths)
    return found


def _plain(column: Any) -> list[Any]:
    """Values of Python, also where a column is an array or holds numbers of numpy."""
    column = column.tolist() if hasattr(column, "tolist") else column
    return [v.item() if hasattr(v, "item") else v for v in column]


def _different(name: str, column: list[Any]) -> list[Any]:
    kinds = {isinstance(v, int | float) for v in column}
    if len(kinds) > 1:
        raise UsageError("a column holds words and numbers", where=f"column '{name}'", fix="make all of them words")
    different = sorted(set(column))
    if kinds == {True} and not all(math.isfinite(v) for v in different):
        raise UsageError("a value is not finite", where=f"column '{name}'", fix="mend or drop these rows")
    return different


def _continuous(different: list[Any], bins: int) -> bool:
    return isinstance(different[0], int | float) and len(different) > 2 * bins


def _few(table: Mapping[str, list[Any]], name: str, bins: int) -> None:
    """The column is there, and has a few values."""
    if name not in table:
        raise UsageError("a column is missing", where="table", found=", ".join(table), expected=name)
    different = _different(name, table[name])
    if len(different) < 2 or _continuous(different, bins):
        raise UsageError(
            "this column cannot be protected or predicted", where=f"column '{name}'",
            found=f"one value, {different[0]}" if len(different) < 2 else f"{len(different)} different numbers",
            expected="two values, or a few", fix="choose another column, or cut the numbers into a few classes",
        )  # fmt: skip


def _bins(x: Tensor, bins: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The median of each bin, and the upper ends of all but the last."""
    quantiles = torch.quantile(x, torch.linspace(0, 1, bins + 1, dtype=x.dtype)[1:-1]).unique()
    ends = quantiles[quantiles < x.max()]
    codes = torch.bucketize(x, ends)
    middles = tuple(float(x[codes == k].median()) for k in range(len(ends) + 1))
    return middles, tuple(ends.tolist())


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError("a value is no number", where=f"column '{name}'", found=value, expected="a number")
    return float(value)


def _numbered(name: str, column: list[Any], values: tuple[Any, ...]) -> Tensor:
    position = {v: k for k, v in enumerate(values)}
    unknown = next((v for v in column if v not in position), None)
    if unknown is not None:
        raise UsageError(
            "this value is none of the categories", where=f"column '{name}'", found=unknown,
            expected=", ".join(map(str, values[:8])),
        )  # fmt: skip
    return torch.tensor([position[v] for v in column])
