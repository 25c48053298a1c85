"""Graph data sets condensed to sets of computation trees."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.core.files import aside
from limbeck.core.optim import Optim
from limbeck.data.condensed import told
from limbeck.data.graphs import Graph
from limbeck.data.trees import Frequent, Trees, offsets, renumbered

GRAPHS = "condensed:graphs"  # what stands for them as a student's spec
_DATA, _NOTES = "graphs.safetensors", "graphs.json"
_PARTS = ("nodes", "parents", "edge_labels", "tree_ends", "items", "set_ends", "counts", "labels")
Sampling = Literal["frequency", "uniform"]


class CondensedGraphs(nn.Module):
    """Sets of trees, each with its class and how many graphs held it: what Mirage makes of a graph data set.

    Args:
        parts: Tensors by name, as `of` makes them: trees one after another, and sets as lists of their numbers.
        info: Plain data: `depth`, `classes`, how it was made.

    Example:
        >>> empty().bytes()
        {}
        >>> len(empty())
        0
    """

    nodes: Tensor
    parents: Tensor
    edge_labels: Tensor
    tree_ends: Tensor
    items: Tensor
    set_ends: Tensor
    counts: Tensor
    labels: Tensor

    def __init__(self, parts: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        for name in _PARTS:
            self.register_buffer(name, parts.get(name, torch.zeros(0, dtype=torch.int32)))
        self.info = dict(info or {})

    @classmethod
    def of(cls, found: Mapping[int, Sequence[Frequent]], trees: Trees, info: Mapping[str, Any]) -> CondensedGraphs:
        """From the frequent sets of each class; the same whatever the order in which graphs were looked at."""
        codes, place = renumbered((c for sets in found.values() for s in sets for c in s.items), trees)
        expanded = [trees.expand(code) for code in codes]
        sets = [(c, sorted(place(i) for i in s.items), s.count) for c, many in sorted(found.items()) for s in many]
        sets.sort(key=lambda row: (row[0], -row[2], row[1]))
        parents = [torch.cat([torch.zeros(1, dtype=torch.int64), tree.edges[1]]) for tree in expanded]
        marks = [torch.cat([torch.zeros(1, dtype=torch.int64), _marks(tree)]) for tree in expanded]
        parts = {
            "nodes": torch.cat([t.nodes for t in expanded]),
            "parents": torch.cat(parents),
            "edge_labels": torch.cat(marks),
            "tree_ends": offsets([len(t.nodes) for t in expanded]),
            "items": torch.tensor([i for _, items, _ in sets for i in items]),
            "set_ends": offsets([len(items) for _, items, _ in sets]),
            "counts": torch.tensor([count for _, _, count in sets]),
            "labels": torch.tensor([c for c, _, _ in sets]),
        }
        return cls({name: _narrow(t) for name, t in parts.items()}, info)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        classes = len(self.labels.unique())
        return f"CondensedGraphs({len(self)} sets of {max(0, len(self.tree_ends) - 1)} trees, {classes} classes{told(self.info)})"

    def bytes(self) -> dict[str, int]:
        """The true size of each part as it is stored."""
        return {name: t.numel() * t.element_size() for name in _PARTS if (t := getattr(self, name)).numel()}

    def tree(self, number: int) -> Graph:
        """One of the different trees: node 0 is the root, edges go from children to parents."""
        first, last = (int(v) for v in self.tree_ends[number : number + 2])
        children = torch.arange(1, last - first)
        edges = torch.stack([children, self.parents[first + 1 : last].long()])
        return Graph(self.nodes[first:last].long(), edges, self.edge_labels[first + 1 : last].long())

    def set(self, number: int) -> list[Graph]:
        """The trees of a set."""
        first, last = (int(v) for v in self.set_ends[number : number + 2])
        return [self.tree(int(k)) for k in self.items[first:last]]

    def examples(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Sets side by side, as `Graphs` gives graphs, with `roots`, the nodes that are read."""
        which = torch.as_tensor(rows, dtype=torch.int64)
        entries, owner = _spans(self.set_ends, which)
        places, tree = _spans(self.tree_ends, self.items[entries].long())  # [V], [V]
        starts = torch.cat([tree.new_ones(1, dtype=torch.bool), tree[1:] != tree[:-1]])  # the root of each tree
        at = starts.nonzero().flatten()[tree]
        children = (~starts).nonzero().flatten()  # [E]
        return {
            "nodes": self.nodes[places].long(),
            "edges": torch.stack([children, (self.parents[places].long() + at)[children]]),
            "graph": owner[tree],
            "edge_labels": self.edge_labels[places[children]].long(),
            "roots": starts,
        }

    def batches(
        self, steps: int, batch_size: int = 32, sampling: Sampling = "frequency", seed: int = 0
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Sets and their classes for a training.

        Args:
            steps: Batches.
            batch_size: Sets of each.
            sampling: By `frequency`, as in the paper, or `uniform`, as the authors' code does after all.
            seed: Of the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = self.counts.double() if sampling == "frequency" else torch.ones(len(self)).double()
        for _ in range(steps):
            rows = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
            yield self.examples(rows.tolist()), self.labels[rows].long()

    def train(self, mode: bool | nn.Module = True, **training: Any) -> Any:
        """`condensed.train(network, steps=300)` trains a graph network on the sets and returns it; see `train_on_sets`."""
        if not isinstance(mode, nn.Module):
            return super().train(mode)
        return train_on_sets(self, mode, **training)

    def forward(self, rows: Any = None) -> Tensor:
        """The number of graphs behind each set."""
        return self.counts

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `graphs.safetensors` and `graphs.json` into a folder, whole or not at all."""
        with aside(Path(path) / _NOTES) as scratch:
            save_file({name: getattr(self, name).contiguous() for name in _PARTS}, scratch.with_name(_DATA))
            notes = {"format": 1, "info": self.info, "bytes": self.bytes()}
            scratch.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CondensedGraphs:
        """Read the folder that `save` wrote, or that of the run which made it.

        Raises:
            UsageError: There are no condensed graphs in the folder, or they are damaged.
        """
        folder = graphs_folder(path)
        if folder is None:
            raise UsageError("this folder holds no condensed graphs", where=path, expected=f"{_DATA} and {_NOTES}")
        try:
            notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
            return cls(load_file(folder / _DATA), notes["info"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UsageError("these condensed graphs are damaged", where=folder, found=error) from None


def train_on_sets(
    condensed: CondensedGraphs,
    network: nn.Module,
    steps: int = 300,
    batch_size: int = 32,
    sampling: Sampling | None = None,
    optim: Optim | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train a graph network on condensed graphs, as it is, in place.

    Args:
        condensed: The sets.
        network: Called as `network(nodes, edges, graph, edge_labels=None, roots=None)`.
        steps: Updates.
        batch_size: Sets of each.
        sampling: By `frequency` or `uniform`; default what `info["sampling"]` says, else by frequency.
        optim: The optimizer; default Adam at 0.01.
        seed: Of the draws.

    Returns:
        The network, in evaluation mode.

    Raises:
        UsageError: There are no sets.
    """
    if not len(condensed):
        raise UsageError("there is nothing to train on", where="condensed graphs", found="no sets")
    check_readout(network)
    drawn: Sampling = sampling or condensed.info.get("sampling", "frequency")
    network.train()
    how = optim or Optim("adam", lr=0.01)
    optimizer = how.build(network)
    for step, (x, y) in enumerate(condensed.batches(steps, batch_size, drawn, seed)):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * how.factor(step, steps)
        loss = F.cross_entropy(network(**x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def check_readout(network: nn.Module) -> None:
    """Warn of a network that sums nodes (`readout="sum"`): sets have a handful of roots, graphs have every node."""
    if getattr(network, "readout", None) == "sum":
        told = (
            "sums over the roots of sets and over all nodes of graphs have different scales: take the mean as readout"
        )
        warnings.warn(told, stacklevel=3)


def empty() -> CondensedGraphs:
    """No sets: where a student begins."""
    return CondensedGraphs({})


class FillGraphs:
    """Condensed graphs in the place of others, as a conversion.

    Args:
        condensed: The others.
    """

    def __init__(self, condensed: CondensedGraphs) -> None:
        self.condensed = condensed

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The sets, and the record that makes room for as many."""
        parts = {name: getattr(self.condensed, name) for name in _PARTS}
        forms = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in parts.items()}
        record = {"kind": f"{__name__}:fill_graphs", "parts": forms, "info": self.condensed.info}
        return CondensedGraphs({n: t.clone() for n, t in parts.items()}, self.condensed.info), record


def fill_graphs(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Sets of the sizes that a record tells, of zeros."""
    parts = {n: torch.zeros(shape, dtype=getattr(torch, kind)) for n, (shape, kind) in record["parts"].items()}
    return CondensedGraphs(parts, record["info"])


def graphs_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of condensed graphs: this one, or the student of this run; None for others."""
    return next((p for p in (Path(path), Path(path) / "student") if (p / _NOTES).is_file()), None)


def _marks(tree: Graph) -> Tensor:
    return torch.zeros(tree.edges.shape[1], dtype=torch.int64) if tree.edge_labels is None else tree.edge_labels


def _spans(ends: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of some pieces, one piece after another, and for each position the number of its piece."""
    first = ends[which].long()
    sizes = ends[which + 1].long() - first
    owner = torch.repeat_interleave(sizes)
    return torch.arange(len(owner)) + (first - (sizes.cumsum(0) - sizes))[owner], owner


def _narrow(t: Tensor) -> Tensor:
    high = int(t.max()) if t.numel() else 0
    low = int(t.min()) if t.numel() else 0
    if low >= 0 and high < 256:
        return t.to(torch.uint8)
    return t.to(torch.int16 if low >= -(2**15) and high < 2**15 else torch.int32)
