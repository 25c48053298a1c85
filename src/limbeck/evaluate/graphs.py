"""What condensed graphs are judged by: a graph network trained on them, and tested on whole graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data.condensed_graphs import train_on_sets
from limbeck.data.graphs import Graphs
from limbeck.nn.gnn import GNN, Kind


def auc(scores: Tensor, labels: Tensor) -> float:
    """The area under the curve of true over false positives: how often a positive is above a negative, equal ones half.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        0.75
    """
    positive, negative = scores[labels == 1], scores[labels == 0]
    gaps = positive[:, None] - negative[None]
    return float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean())


def train_on_graphs(
    network: nn.Module,
    source: Graphs,
    steps: int = 300,
    batch_size: int = 32,
    optim: Optim | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train a graph network on whole graphs: what condensed ones are compared with."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = (optim or Optim("adam", lr=0.01)).build(network)
    network.train()
    for _ in range(steps):
        batch = source.batch(torch.randint(len(source), (batch_size,), generator=generator), 0)
        loss = F.cross_entropy(network(**batch.x), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@torch.no_grad()
def judge_graphs(network: nn.Module, source: Graphs) -> dict[str, float]:
    """Accuracy `top1` on graphs and, of two classes, `auc`."""
    batch = source.batch(torch.arange(len(source)), 0)
    logits = network(**batch.x)
    found = {"top1": float((logits.argmax(1) == batch.y).double().mean())}
    return found | ({"auc": auc(logits[:, 1] - logits[:, 0], batch.y)} if logits.shape[1] == 2 else {})


class GraphCondensation:
    """Judges condensed graphs by graph networks of the kind `kind`, trained from scratch on them; `top1` and `auc`.

    Args:
        source: Held-out graphs.
        kind: Of the networks.
        steps: Of each training.
        trainings: How many.
    """

    task, primary = "graph condensation", "top1"

    def __init__(self, source: Graphs, kind: Kind = "gin", steps: int = 300, trainings: int = 3) -> None:
        self.source, self.kind, self.steps, self.trainings = source, kind, steps, trainings

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of condensed graphs; none of a network that is given beside them, or of no sets."""
        condensed: Any = m[role].module
        if role != "student" or not len(condensed):
            return {}
        labels = max(self.source.node_labels, int(condensed.nodes.max()) + 1)
        found = []
        with torch.enable_grad():
            for k in range(self.trainings):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(k)
                    depth = condensed.info.get("depth", 2)
                    network = GNN(self.kind, labels, self.source.num_classes or 2, layers=depth)
                found.append(judge_graphs(train_on_sets(condensed, network, self.steps, seed=k), self.source))
        return {name: sum(row[name] for row in found) / len(found) for name in found[0]}
