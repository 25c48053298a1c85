"""The named splits of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.source import Source
from limbeck.data.ids import fractions
from limbeck.data.sources import Subset, check_labels

THREE = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Data:
    """Sources by name; `data.train` is what methods train on, `data.validation` chooses, `data.test` judges.

    Args:
        **sources: A source for each name; None is left out.

    Raises:
        UsageError: Something is not a source, or a split that is asked for is missing.

    Example:
        >>> from limbeck.data import TensorSource
        >>> data = Data(train=TensorSource(torch.zeros(8, 2)), test=TensorSource(torch.ones(2, 2)))
        >>> len(data.train), list(data), "validation" in data
        (8, ['train', 'test'], False)
    """

    _sources: dict[str, Any]

    def __init__(self, **sources: Any) -> None:
        self.__dict__["_sources"] = {name: s for name, s in sources.items() if s is not None}
        if not self._sources:
            raise UsageError("there are no data", where="data", fix="Data(train=TensorSource(x, y))")
        for name, source in self._sources.items():
            if not isinstance(source, Source):
                raise UsageError(
                    "a split is not a source",
                    where=f"data.{name}",
                    found=type(source).__name__,
                    expected="TensorSource, DatasetSource, TextSource, or your own with the methods of Source",
                    fix="load_data takes tensors and data sets of torch too",
                )

    @staticmethod
    def split(source: Any, fractions: Mapping[str, float] = THREE, seed: int = 0) -> Data:
        """Divide a source by its sample ids: a sample stays in its split when others come or go.

        Args:
            source: A source.
            fractions: Share of each split, above 0, together 1. The sizes follow them on average.
            seed: Another division for another seed.

        Raises:
            UsageError: The shares do not sum to 1, or a split would be empty.

        Example:
            >>> from limbeck.data import TensorSource
            >>> data = Data.split(TensorSource(torch.arange(1000.0)), {"train": 0.9, "test": 0.1})
            >>> len(data.train) + len(data.test), 70 < len(data.test) < 130
            (1000, True)
        """
        return Data(**divide(source, fractions, seed))

    @property
    def num_classes(self) -> int | None:
        """The largest number of classes that a split knows of; None where none does."""
        return max((n for s in self._sources.values() if (n := getattr(s, "num_classes", None))), default=None)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names, where a split knows them."""
        return next((c for s in self._sources.values() if (c := getattr(s, "classes", None))), None)

    def check(self, num_classes: int) -> None:
        """Raise a `UsageError` where a label that is known lies outside `0 .. num_classes - 1`."""
        for name, source in self._sources.items():
            if (labels := getattr(source, "labels", None)) is not None:
                check_labels(labels, num_classes, where=f"data.{name}.y")

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and sources."""
        return iter(self._sources.items())

    def get(self, name: str) -> Any:
        """The source of that name, or None."""
        return self._sources.get(name)

    def __getattr__(self, name: str) -> Any:
        if name in (sources := self.__dict__.get("_sources", {})):
            return sources[name]
        if name.startswith("_"):
            raise AttributeError(name)
        raise UsageError(
            f"the method needs data.{name}; there are: {', '.join(sources) or 'none'}",
            where=f"data.{name}",
            fix="give a pool: --set data.unlabelled=FOLDER, or Data(unlabelled=...)"
            if name == "unlabelled"
            else f"give the data a split of that name: Data({name}=...), or a file or folder '{name}'",
        )

    __getitem__ = __getattr__

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __repr__(self) -> str:
        return f"Data({', '.join(f'{name}={source!r}' for name, source in self._sources.items())})"


def divide(whole: Any, shares: Mapping[str, float], seed: int = 0) -> dict[str, Any]:
    """Parts of a source, or of anything with `ids` and `subset(rows)`, by the hash of each id.

    Args:
        whole: What is divided.
        shares: Share of each part, above 0, together 1.
        seed: Another division for another seed.

    Returns:
        The parts by name, each in the order of the whole.

    Raises:
        UsageError: The shares do not sum to 1, or a part would be empty.
    """
    if min(shares.values(), default=0) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError("the shares are not a division", where="split", found=dict(shares), expected="> 0, sum 1")
    ids: Tensor = whole.ids
    bounds = torch.tensor([0.0, *shares.values()], dtype=torch.float64).cumsum(0)
    part = torch.bucketize(fractions(ids, seed), bounds[1:-1], right=True)  # [N]
    rows = {name: (part == k).nonzero().flatten() for k, name in enumerate(shares)}
    if empty := [name for name, found in rows.items() if not len(found)]:
        raise UsageError(
            f"too few samples to divide: {', '.join(empty)} would be empty",
            where="split",
            found=f"{len(ids)} samples",
            expected=f"shares {dict(shares)}",
            fix="give more samples, or splits of your own",
        )
    take = getattr(whole, "subset", partial(Subset, whole))
    return {name: take(found) for name, found in rows.items()}
