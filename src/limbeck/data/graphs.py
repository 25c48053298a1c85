"""Graphs with discrete labels on their nodes and edges, and a class each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.ids import digest
from limbeck.data.sources import Rows


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph; messages go both ways along an edge that is listed both ways.

    Args:
        nodes: Label of each node `[V]` int64.
        edges: From and to `[2, E]` int64.
        edge_labels: `[E]` int64; None for edges without labels.
    """

    nodes: Tensor
    edges: Tensor
    edge_labels: Tensor | None = None


class Graphs(Rows):
    """A source of graphs; `batch.x` is a disjoint union: `nodes`, `edges`, `edge_labels`, and the graph of each node, `graph`.

    Args:
        graphs: N of them.
        y: Class numbers `[N]`.
        ids: Unique whole numbers `[N]`. Default: positions.

    Raises:
        UsageError: There are no graphs, no classes, a graph without nodes, labels that are no whole numbers from 0, or an edge
            that leads nowhere.

    Example:
        >>> pair = Graph(torch.tensor([0, 1]), torch.tensor([[0, 1], [1, 0]]))
        >>> source = Graphs([pair, pair], torch.tensor([0, 1]))
        >>> source.batch(torch.tensor([1, 0]), 0).x["graph"].tolist(), source.node_labels
        ([0, 0, 1, 1], 2)
    """

    views = 1
    labels: Tensor

    def __init__(self, graphs: Sequence[Graph], y: Tensor | Sequence[int] | None, ids: Tensor | None = None) -> None:
        if y is None:
            raise UsageError("these graphs have no labels", where="data.y", expected="a class for each graph")
        if not graphs or len(graphs) != len(y):
            raise UsageError("graphs and labels differ in number", where="data", found=f"{len(graphs)} and {len(y)}")
        for i, graph in enumerate(graphs):
            kinds = (graph.nodes, *(() if graph.edge_labels is None else (graph.edge_labels,)))
            if any(t.is_floating_point() or t.ndim != 1 for t in kinds):
                raise UsageError(
                    "nodes and edges need labels that can be told apart", where=f"graph {i}", found="numbers or vectors",
                    expected="one whole number each", fix="put continuous features into bins",
                )  # fmt: skip
            if not len(graph.nodes) or any(bool((t < 0).any()) for t in kinds):
                raise UsageError(
                    "a graph has no nodes, or labels below 0", where=f"graph {i}", found=f"{len(graph.nodes)} nodes",
                    expected="nodes and labels from 0",
                )  # fmt: skip
            if graph.edges.numel() and not 0 <= int(graph.edges.min()) <= int(graph.edges.max()) < len(graph.nodes):
                raise UsageError("an edge leads to a node that there is not", where=f"graph {i}")
        self.graphs, self.labels = list(graphs), torch.as_tensor(y).to(torch.int64)
        self.ids = torch.arange(len(graphs)) if ids is None else ids

    @property
    def node_labels(self) -> int:
        """Labels of nodes, from 0."""
        return max(int(g.nodes.max()) for g in self.graphs) + 1

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The graphs at positions `rows` `[B]`, side by side."""
        x = union([self.graphs[row] for row in rows.tolist()])
        return Batch(id=self.ids[rows], view=torch.full_like(rows, view), y=self.labels[rows], x=x)

    def subset(self, rows: Tensor | Sequence[int]) -> Graphs:
        """The graphs at positions `rows`, with their ids."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return Graphs([self.graphs[row] for row in rows.tolist()], self.labels[rows], self.ids[rows])

    def fingerprint(self) -> str:
        """Of all graphs and labels."""
        parts = [t for g in self.graphs for t in (g.nodes, g.edges, g.edge_labels) if t is not None]
        return digest("graphs", *parts, self.labels)


def union(graphs: Sequence[Graph]) -> dict[str, Tensor]:
    """Graphs side by side as one: `nodes`, `edges`, `graph`, and `edge_labels` where there are some."""
    offsets = [0]
    for g in graphs:
        offsets.append(offsets[-1] + len(g.nodes))
    found = {
        "nodes": torch.cat([g.nodes for g in graphs]),
        "edges": torch.cat([g.edges + at for g, at in zip(graphs, offsets, strict=False)], 1),
        "graph": torch.repeat_interleave(torch.tensor([len(g.nodes) for g in graphs])),
    }
    if all(g.edge_labels is not None for g in graphs):
        found["edge_labels"] = torch.cat([g.edge_labels for g in graphs if g.edge_labels is not None])
    return found


def from_pyg(dataset: Any, one_hot: bool = True) -> Graphs:
    """Graphs of torch_geometric, such as a `TUDataset`: `x` one-hot or whole numbers, `edge_attr` the same.

    Args:
        dataset: An iterable of `Data` with `x`, `edge_index`, `y`, and `edge_attr` where edges have labels.
        one_hot: Whether a row of several numbers is one label; more ones than one are refused.

    Raises:
        UsageError: Features are continuous, or a graph has no label.
    """
    graphs, labels = [], []
    for i, data in enumerate(dataset):
        if getattr(data, "y", None) is None:
            raise UsageError("this graph has no label", where=f"graph {i}", expected="y")
        given = getattr(data, "x", None)
        x = torch.zeros(data.num_nodes, dtype=torch.int64) if given is None else _label(given, i, one_hot)
        attr = getattr(data, "edge_attr", None)
        graphs.append(Graph(x, data.edge_index, None if attr is None else _label(attr, i, one_hot)))
        labels.append(int(data.y.view(-1)[0]))
    return Graphs(graphs, labels)


def _label(x: Tensor, i: int, one_hot: bool) -> Tensor:
    if x.ndim == 1 or x.shape[1] == 1:
        values = x.view(-1)
        if not bool((values == values.round()).all()):
            raise UsageError(
                "these features are continuous", where=f"graph {i}", found=values[:3].tolist(),
                expected="labels that can be told apart", fix="put them into bins",
            )  # fmt: skip
        return values.to(torch.int64)
    if not one_hot or not bool(((x == 0) | (x == 1)).all() & (x.sum(1) == 1).all()):
        raise UsageError(
            "these features are no labels", where=f"graph {i}", found=f"{list(x.shape)}",
            expected="one-hot rows", fix="put continuous features into bins",
        )  # fmt: skip
    return x.argmax(1)


def read_tu(folder: str | Path) -> Graphs:
    """The text files of a data set in the TU Dortmund form: `NAME_A.txt`, `NAME_graph_indicator.txt`, `NAME_graph_labels.txt`
    and, where there are some, `NAME_node_labels.txt` and `NAME_edge_labels.txt`.

    Raises:
        UsageError: A file is missing or damaged, or nodes have continuous attributes and no labels.
    """
    folder = Path(folder)
    first = next(iter(sorted(folder.glob("*_A.txt"))), None)
    if first is None:
        raise UsageError("there are no graphs in this folder", where=folder, expected="NAME_A.txt and its companions")
    name = first.name.removesuffix("_A.txt")

    def read(kind: str) -> Tensor | None:
        file = folder / f"{name}_{kind}.txt"
        if not file.is_file():
            return None
        try:
            rows = [[int(v) for v in line.split(",")] for line in file.read_text().splitlines() if line.strip()]
            found = torch.tensor(rows, dtype=torch.int64)
            return found.view(-1, 2 if kind == "A" else found[:1].numel())
        except ValueError as error:
            raise UsageError("this file is damaged", where=file, found=error, expected="whole numbers") from None

    edges, owner, y = read("A"), read("graph_indicator"), read("graph_labels")
    if edges is None or owner is None or y is None:
        raise UsageError("a file of this data set is missing", where=folder, expected=f"{name}_graph_labels.txt, ...")
    labels, marks = read("node_labels"), read("edge_labels")
    if labels is None and (folder / f"{name}_node_attributes.txt").is_file():
        raise UsageError(
            "these nodes have continuous attributes and no labels", where=folder / f"{name}_node_attributes.txt",
            expected=f"{name}_node_labels.txt", fix="put the attributes into bins, and write those as labels",
        )  # fmt: skip
    owner, edges = owner[:, 0] - 1, edges.T - 1
    _check_tu(folder, owner, edges, len(y), labels, marks)
    nodes = torch.zeros(len(owner), dtype=torch.int64) if labels is None else labels[:, 0]
    sizes = torch.bincount(owner, minlength=len(y))  # nodes of each graph, which stand together
    order = owner[edges[0]].argsort(stable=True)
    counts = torch.bincount(owner[edges[0]], minlength=len(y)).tolist()
    starts = (sizes.cumsum(0) - sizes).tolist()
    of_nodes, of_edges = nodes.split(sizes.tolist()), edges[:, order].split(counts, 1)
    of_marks = [None] * len(y) if marks is None else marks[order, 0].split(counts)
    graphs = [Graph(n, e - at, k) for n, e, k, at in zip(of_nodes, of_edges, of_marks, starts, strict=True)]
    return Graphs(graphs, torch.unique(y[:, 0], return_inverse=True)[1])


def is_tu(folder: Path) -> bool:
    """Whether a folder holds graphs in that form."""
    return any(folder.glob("*_A.txt"))


def _check_tu(
    folder: Path, owner: Tensor, edges: Tensor, graphs: int, labels: Tensor | None, marks: Tensor | None
) -> None:
    inside = bool(((edges >= 0) & (edges < len(owner))).all())
    for ok, what in (
        (
            bool((owner[1:] >= owner[:-1]).all()) and 0 <= int(owner.min()) <= int(owner.max()) < graphs,
            "nodes do not stand graph by graph",
        ),
        (inside, "an edge leads to a node that there is not"),
        (inside and bool((owner[edges[0]] == owner[edges[1]]).all()), "an edge leads from one graph to another"),
        (labels is None or len(labels) == len(owner), "nodes and their labels differ in number"),
        (marks is None or len(marks) == edges.shape[1], "edges and their labels differ in number"),
    ):
        if not ok:
            raise UsageError("this data set is damaged", where=folder, found=what)


def motifs(count: int = 400, noise: float = 0.1, seed: int = 0) -> Graphs:
    """Drawn graphs: a chain of 10 to 20 nodes with some branches and three labels in turn, and a motif of its class hung on it, a
    labelled ring of six or two triangles that are bridged; a share of classes is wrong.

    Args:
        count: Graphs.
        noise: Share of them whose class is the other one.
        seed: Of everything.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    graphs, labels = [], []
    for i in range(count):
        size, kind = 10 + draw(11), i % 2
        nodes = 2 + torch.arange(size + 6) % 3
        pairs = [(k, draw(k) if draw(10) == 0 else k - 1) for k in range(1, size)]
        ring = [(k, (k + 1) % 6) for k in range(6)]
        triangles = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3), (2, 3)]
        nodes[size:] = torch.tensor([0, 1, 0, 1, 0, 1] if kind == 0 else [0, 1, 1, 0, 1, 1])
        pairs += [(size + a, size + b) for a, b in (ring if kind == 0 else triangles)] + [(size, draw(size))]
        edges = torch.tensor(pairs).T
        graphs.append(Graph(nodes, torch.cat([edges, edges.flip(0)], 1)))
        labels.append(kind if float(torch.rand((), generator=g)) >= noise else 1 - kind)
    return Graphs(graphs, labels)
