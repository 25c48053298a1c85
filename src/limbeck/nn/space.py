"""Search spaces of sub-networks: for each named dimension the sizes it may have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from random import Random

from torch import nn

from limbeck.convert.structure import structure
from limbeck.core.errors import UsageError

Arch = Mapping[str, int]  # a sub-network: the size of each dimension of a space


@dataclass(frozen=True)
class Space:
    """The sub-networks of a model: each named dimension or list of layers has one of some sizes.

    Args:
        choices: Sizes by name (see `limbeck.convert.structure`), each ascending.
        together: Groups of names that take their sizes together: all the first, or all the second, and so on.

    Raises:
        UsageError: Sizes are missing or not ascending, or names that go together have not equally many.

    Example:
        >>> from random import Random
        >>> space = Space({"blocks": (2, 3), "width": (8, 12, 16)})
        >>> space.count(), space.smallest(), space.sample(Random(0))
        (6, {'blocks': 2, 'width': 8}, {'blocks': 3, 'width': 16})
    """

    choices: Mapping[str, Sequence[int]]
    together: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        for name, sizes in self.choices.items():
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UsageError(
                    "sizes must ascend", where=f"choices['{name}']", found=sizes, expected="such as (2, 3, 4)"
                )
        grouped = [name for group in self.together for name in group]
        counts = [{len(self.choices.get(name, ())) for name in group} for group in self.together]
        if len(set(grouped)) < len(grouped) or any(len(c) != 1 or 0 in c for c in counts):
            raise UsageError(
                "these dimensions cannot go together", where="together", found=list(self.together),
                expected="names of this space, each once, with equally many sizes",
            )  # fmt: skip

    @classmethod
    def of(
        cls,
        module: nn.Module,
        sizes: Mapping[str, Sequence[float]],
        *,
        divisor: int = 1,
        together: Sequence[Sequence[str]] = (),
    ) -> Space:
        """The space of a model whose dimensions are named by globs, and their sizes as numbers or shares.

        Args:
            module: The model.
            sizes: By glob: numbers of units, or shares in (0, 1] written as floats. Sizes above that of a dimension become it;
                lists of layers keep the layers that must stay.
            divisor: Shares of units are rounded to a multiple of it.
            together: As in `Space`, by globs; one group for all that they match.

        Raises:
            UsageError: A glob matches nothing.

        Example:
            >>> from limbeck.nn.mlp import mlp
            >>> Space.of(mlp(4, 30, 3), {"*.channels": (0.25, 0.5, 1.0)}, divisor=8).choices
            {'0.channels': (8, 16, 30)}
        """
        parts = structure(module)
        all_sizes = parts.sizes()
        choices: dict[str, tuple[int, ...]] = {}
        for glob, wanted in sizes.items():
            names = [name for name in all_sizes if fnmatchcase(name, glob)]
            if not names:
                expected = ", ".join(list(all_sizes)[:5]) or "none is known"
                raise UsageError("the model has no such dimension", where="space", found=glob, expected=expected)
            for name in names:
                size = all_sizes[name]
                depth = parts.depths.get(name)
                least = 1 if depth is None or not depth.fixed else max(depth.fixed) + 1
                step = divisor if depth is None and size >= divisor else 1
                found = {min(size, max(least, _rounded(w, size, step))) for w in wanted}
                choices[name] = tuple(sorted(found))
        groups = [[name for name in choices if any(fnmatchcase(name, glob) for glob in group)] for group in together]
        return cls(choices, groups)

    def largest(self) -> dict[str, int]:
        """The sub-network with the last size of everything."""
        return {name: sizes[-1] for name, sizes in self.choices.items()}

    def smallest(self) -> dict[str, int]:
        """The sub-network with the first size of everything."""
        return {name: sizes[0] for name, sizes in self.choices.items()}

    def sample(self, generator: Random) -> dict[str, int]:
        """A sub-network with each size drawn alone, or with its group; processes with equal generators draw the same."""
        places = {name: generator.random() for name in self.choices}
        for group in self.together:
            places |= dict.fromkeys(group, places[group[0]])
        return {name: sizes[int(places[name] * len(sizes))] for name, sizes in self.choices.items()}

    def sandwich(self, generator: Random, count: int = 4) -> list[dict[str, int]]:
        """The largest, the smallest, and `count - 2` others drawn at random (Yu and Huang 2019)."""
        return [self.largest(), self.smallest(), *(self.sample(generator) for _ in range(count - 2))]

    def count(self) -> int:
        """How many sub-networks there are."""
        grouped = {name for group in self.together for name in group[1:]}
        return math.prod(len(sizes) for name, sizes in self.choices.items() if name not in grouped)

    def within(self, choices: Mapping[str, Sequence[int]]) -> Space:
        """A part of the space, for training in stages: fewer sizes of some dimensions.

        Raises:
            UsageError: A size is not in the space.
        """
        for name, sizes in choices.items():
            if not set(sizes) <= set(self.choices.get(name, ())):
                raise _outside(name, sizes, self.choices.get(name, list(self.choices)))
        return Space({**self.choices, **choices}, self.together)

    def check(self, arch: Arch) -> None:
        """Raise a `UsageError` for what is no sub-network of this space."""
        for name, size in arch.items():
            if name not in self.choices:
                raise _outside(name, size, list(self.choices))
            if size not in self.choices[name]:
                raise _outside(name, size, self.choices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)


def _rounded(wanted: float, size: int, step: int) -> int:
    if not isinstance(wanted, float):
        return int(wanted)
    return max(step, round(wanted * size / step) * step) if wanted < 1 else size


def _outside(name: str, found: object, expected: object) -> UsageError:
    return UsageError("this is no sub-network of the space", where=name, found=found, expected=expected)
