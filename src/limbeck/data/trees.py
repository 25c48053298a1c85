"""Computation trees of message passing, told apart by codes, and sets of them that are frequent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.graphs import Graph

Key = tuple[int, int, tuple[tuple[int, int], ...]]  # depth, own label, (edge label, code) of each child


class Trees:
    """Codes of computation trees: equal numbers are equal trees, whatever the order of nodes and neighbours.

    The tree of depth l of a node has all its neighbours as children, with their trees of depth l - 1; so codes are made level by
    level, in time proportional to depth times edges, and equal the colours of Weisfeiler and Leman with labels of edges.

    Example:
        >>> path = Graph(torch.tensor([0, 1, 0]), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> trees = Trees()
        >>> a, b, c = trees.codes(path, 2)
        >>> a == c, a == b, trees.size(b)
        (True, False, 5)
    """

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self._numbers: dict[Key, int] = {}

    def codes(self, graph: Graph, depth: int) -> list[int]:
        """The code of each node's tree."""
        labels = graph.nodes.tolist()
        marks = [0] * graph.edges.shape[1] if graph.edge_labels is None else graph.edge_labels.tolist()
        neighbours: list[list[tuple[int, int]]] = [[] for _ in labels]
        for source, target, mark in zip(*graph.edges.tolist(), marks, strict=True):
            neighbours[target].append((mark, source))  # messages go along the edge, to the target
        now = [self._number((0, label, ())) for label in labels]
        for level in range(1, depth + 1):
            now = [
                self._number((level, label, tuple(sorted((mark, now[u]) for mark, u in near))))
                for label, near in zip(labels, neighbours, strict=True)
            ]
        return now

    def size(self, code: int) -> int:
        """Nodes of a tree."""
        return 1 + sum(self.size(child) for _, child in self.keys[code][2])

    def expand(self, code: int) -> Graph:
        """The tree as a graph: node 0 is the root, edges go from children to parents."""
        nodes: list[int] = []
        edges: list[tuple[int, int]] = []
        marks: list[int] = []

        def visit(code: int) -> int:
            here, (_, label, children) = len(nodes), self.keys[code]
            nodes.append(label)
            for mark, child in sorted(children, key=lambda pair: (pair[0], canonical(pair[1], self))):
                at = visit(child)
                edges.append((at, here))
                marks.append(mark)
            return here

        visit(code)
        pairs = torch.tensor(edges, dtype=torch.int64).view(-1, 2).T
        return Graph(torch.tensor(nodes), pairs, torch.tensor(marks, dtype=torch.int64))

    def _number(self, key: Key) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.keys)
            self.keys.append(key)
        return found


@dataclass(frozen=True)
class Frequent:
    """Items that occur together, and in how many transactions."""

    items: tuple[int, ...]
    count: int


def frequent_sets(
    transactions: Sequence[Iterable[int]], threshold: int, limit: int = 10_000, maximal: bool = False
) -> list[Frequent]:
    """All sets of items that occur together in at least `threshold` transactions, most frequent first.

    Depth first over items, each set with the transactions that hold it as bits of a number (Eclat, Zaki 2000): the same sets as
    FP-growth finds.

    Args:
        transactions: Items of each; repetitions do not count.
        threshold: At least 1.
        limit: Of the number of sets.
        maximal: Only those that are no part of another one.

    Raises:
        UsageError: The threshold is below 1, or there are more sets than the limit.

    Example:
        >>> frequent_sets([{1, 2}, {1, 2, 3}, {1}], 2)
        [Frequent(items=(1,), count=3), Frequent(items=(1, 2), count=2), Frequent(items=(2,), count=2)]
    """
    if threshold < 1:
        raise UsageError("the threshold is out of range", where="threshold", found=threshold, expected=">= 1")
    holders: dict[int, int] = {}
    for i, items in enumerate(transactions):
        for item in set(items):
            holders[item] = holders.get(item, 0) | 1 << i
    singles = sorted((item, bits) for item, bits in holders.items() if bits.bit_count() >= threshold)
    found: list[Frequent] = []

    def grow(items: tuple[int, ...], candidates: list[tuple[int, int]]) -> None:
        for k, (item, bits) in enumerate(candidates):
            grown = (*items, item)
            found.append(Frequent(grown, bits.bit_count()))
            if len(found) > limit:
                raise UsageError(
                    "there are too many frequent sets", where="threshold", found=f"more than {limit}",
                    expected="fewer", fix="raise the threshold",
                )  # fmt: skip
            further = [(other, both) for other, b in candidates[k + 1 :] if (both := bits & b).bit_count() >= threshold]
            grow(grown, further)

    grow((), singles)
    if maximal:
        # A set is part of another frequent one just where it is one of them less an item.
        inner = {f.items[:k] + f.items[k + 1 :] for f in found for k in range(len(f.items))}
        found = [f for f in found if f.items not in inner]
    return sorted(found, key=lambda f: (-f.count, f.items))


def transactions(graphs: Sequence[Graph], depth: int, trees: Trees) -> list[frozenset[int]]:
    """The different trees of each graph."""
    return [frozenset(trees.codes(graph, depth)) for graph in graphs]


def renumbered(codes: Iterable[int], trees: Trees) -> tuple[list[int], Callable[[int], int]]:
    """Codes in an order that depends on the trees alone, not on which graph was met first; and the place of each."""
    order = sorted(set(codes), key=lambda code: canonical(code, trees))
    places: Mapping[int, int] = {code: k for k, code in enumerate(order)}
    return order, places.__getitem__


def canonical(code: int, trees: Trees) -> tuple[object, ...]:
    """A tree as nested tuples, comparable between any two collections of trees."""
    _, label, children = trees.keys[code]
    return (label, tuple(sorted((mark, canonical(child, trees)) for mark, child in children)))


def offsets(sizes: Sequence[int]) -> Tensor:
    """Where pieces of these sizes begin and end `[N + 1]`."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64).cumsum(0)])
