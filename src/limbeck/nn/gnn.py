"""Small graph networks by torch_geometric, for graphs with labels on their nodes."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import require

Kind = Literal["gin", "sage", "gat", "gcn"]


class GNN(nn.Module):
    """Layers of message passing over one-hot labels, the mean or sum of nodes, and a linear classifier.

    Args:
        kind: `gin` (sums), `sage` (means), `gat` (attention, one head), `gcn` (by degrees).
        labels: Labels of nodes.
        classes: Outputs.
        width: Units.
        layers: Of message passing.
        readout: `mean` or `sum` over the nodes that count.

    Example:
        >>> net = GNN("sage", labels=3, classes=2, width=8)
        >>> x = {"nodes": torch.tensor([0, 1, 2]), "edges": torch.tensor([[0, 1], [1, 2]]), "graph": torch.tensor([0, 0, 1])}
        >>> net(**x).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, kind: Kind, labels: int, classes: int, width: int = 32, layers: int = 2, readout: str = "mean"
    ) -> None:
        super().__init__()
        library = require("torch_geometric.nn", extra="graph")
        self.labels, self.readout = labels, readout

        def layer(size: int) -> nn.Module:
            if kind == "gin":
                return library.GINConv(nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width)))
            if kind == "gat":
                return library.GATConv(size, width, add_self_loops=False)
            return library.SAGEConv(size, width) if kind == "sage" else library.GCNConv(size, width)

        self.layers = nn.ModuleList(layer(width if k else labels) for k in range(layers))
        self.classifier = nn.Linear(width, classes)

    def embed(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """Each node's representation `[V, width]`."""
        h: Any = F.one_hot(nodes, self.labels).to(self.classifier.weight.dtype)
        for layer in self.layers:
            h = layer(h, edges).relu()
        return h

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        graph: Tensor,
        edge_labels: Tensor | None = None,
        roots: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, K]` of graphs.

        Args:
            nodes: Labels `[V]`.
            edges: From and to `[2, E]`.
            graph: The graph of each node `[V]`, from 0.
            edge_labels: Not looked at.
            roots: Which nodes are read `[V]` bool; None for all.
        """
        h = self.embed(nodes, edges)
        if roots is not None:
            h, graph_of = h[roots], graph[roots]
        else:
            graph_of = graph
        size = int(graph.max()) + 1
        total = torch.zeros(size, h.shape[1], dtype=h.dtype, device=h.device).index_add(0, graph_of, h)
        if self.readout == "mean":
            total = total / torch.bincount(graph_of, minlength=size).clamp_min(1)[:, None]
        return self.classifier(total)
