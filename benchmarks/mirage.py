"""Mirage on MUTAG (188 molecules, `LIMBECK_DATA/mutag/MUTAG.txt`): time of each part, true sizes, what networks learn.

    LIMBECK_DATA=path python benchmarks/mirage.py --out benchmarks/results/mirage.json

Times are of the process's CPU, the ways taking turns. `strings` is the way that the authors' scripts describe, written anew from
the description and not their program, which
`mirage_authors.py` times: the string of each node's tree by recursion from the root, for every node. `fpgrowth` is
FP-growth in Python as mlxtend has it. Areas are on held-out molecules, mean over GIN, GraphSAGE and GAT, equal steps, one rate
and one threshold for all, nothing chosen on the test: fifths in turn are held out.
"""

import os
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from measuring import machine, options, report, spread

from limbeck.core.optim import Optim
from limbeck.data.condensed_graphs import CondensedGraphs, train_on_sets
from limbeck.data.graphs import Graph, Graphs
from limbeck.data.trees import Trees, frequent_sets, transactions
from limbeck.evaluate.graphs import judge_graphs, train_on_graphs
from limbeck.methods.mirage.method import Mirage
from limbeck.nn.gnn import GNN, Kind
from limbeck.prove import seeded

KINDS: tuple[Kind, ...] = ("gin", "sage", "gat")
DEPTH, SHARE = 2, 0.5


def read(path: Path) -> Graphs:
    """The file's form: the number of graphs; for each its nodes and class; for each node its label, degree and neighbours."""
    lines = iter(path.read_text().splitlines())
    graphs, labels = [], []
    for _ in range(int(next(lines))):
        size, y = map(int, next(lines).split())
        rows = [list(map(int, next(lines).split())) for _ in range(size)]
        pairs = [(u, v) for v, row in enumerate(rows) for u in row[2:]]
        graphs.append(Graph(torch.tensor([row[0] for row in rows]), torch.tensor(pairs).T))
        labels.append(y)
    return Graphs(graphs, torch.unique(torch.tensor(labels), return_inverse=True)[1])


def strings(source: Graphs, depth: int) -> list[set[str]]:
    """The strings of each graph's trees, one node after another, nothing remembered."""
    found = []
    for graph in source.graphs:
        near: list[list[int]] = [[] for _ in graph.nodes]
        for a, b in graph.edges.T.tolist():
            near[b].append(a)
        labels = graph.nodes.tolist()

        def tree(v: int, depth: int, labels: list[int] = labels, near: list[list[int]] = near) -> str:
            children = sorted(tree(u, depth - 1) for u in near[v]) if depth else []
            return f"{labels[v]} {' '.join(children)} $"

        found.append({tree(v, depth) for v in range(len(labels))})
    return found


def timed(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: spread(values) for name, values in times.items()}


def extraction(source: Graphs, repeats: int) -> dict[str, Any]:
    """Codes level by level, and strings, by depth."""
    found = {}
    for depth in (1, 2, 3, 4):
        codes = transactions(source.graphs, depth, Trees())
        texts = strings(source, depth)
        assert [len(a) for a in codes] == [len(b) for b in texts]
        assert len(set().union(*codes)) == len(set().union(*texts))
        ways = {
            "codes": lambda depth=depth: transactions(source.graphs, depth, Trees()),
            "strings": lambda depth=depth: strings(source, depth),
        }
        found[f"depth {depth}"] = {"trees": len(set().union(*codes)), "ms": timed(ways, repeats)}
    return found


def mining(source: Graphs, repeats: int) -> dict[str, Any]:
    """Bit sets, and FP-growth of mlxtend, by threshold; both find the same."""
    pandas, fpgrowth = (
        import_module("pandas"),
        import_module("mlxtend.frequent_patterns").fpgrowth,
    )  # pip install mlxtend
    found: dict[str, Any] = {}
    seen = transactions(source.graphs, DEPTH, Trees())
    rows = [t for t, y in zip(seen, source.labels.tolist(), strict=True) if y == 1]
    items = sorted(set().union(*rows))
    table = pandas.DataFrame([[i in row for i in items] for row in rows], columns=items)
    for share in (0.05, 0.1, 0.25, 0.5):
        least = max(1, round(share * len(rows)))
        ours = {frozenset(f.items) for f in frequent_sets(rows, least, 10**6)}
        assert ours == set(fpgrowth(table, (least - 0.5) / len(rows), use_colnames=True)["itemsets"])
        ways = {
            "bit sets": lambda least=least: frequent_sets(rows, least, 10**6),
            "fpgrowth": lambda least=least: fpgrowth(table, (least - 0.5) / len(rows), use_colnames=True),
        }
        found[f"{share:.0%} of {len(rows)}"] = {"sets": len(ours), "ms": timed(ways, repeats)}
    return found


def stored(g: Graph) -> int:
    """Bytes of a whole graph in the form of the sets: one for a label, two for each edge, once; and for size and class."""
    return len(g.nodes) + g.edges.shape[1] + 2


def few(source: Graphs, budget: int, size: Callable[[Graph], int], seed: int) -> Graphs:
    """Random whole graphs up to a budget, at least one of each class."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [next(i for i in order if int(source.labels[i]) == c) for c in (0, 1)]
    left = budget - sum(size(source.graphs[i]) for i in rows)
    for i in order:
        if i not in rows and size(source.graphs[i]) <= left:
            rows.append(i)
            left -= size(source.graphs[i])
    return source.subset(rows)


def areas(source: Graphs, steps: int) -> dict[str, Any]:
    """Five held-out fifths; each arm's area, bytes and nodes."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    arms: dict[str, dict[str, list[float]]] = {}
    for seed, held in enumerate(order.chunk(5)):
        test = source.subset(held)
        train = source.subset([i for i in order.tolist() if i not in held])
        sets = {m: Mirage(depth=DEPTH, threshold=SHARE, maximal=m).condense(train) for m in (False, True)}
        size = sum(sets[False].bytes().values())
        things = {
            "all graphs": train,
            "random graphs, equal nodes": few(train, len(sets[False].nodes), lambda g: len(g.nodes), seed),
            "random graphs, equal bytes": few(train, size, stored, seed),
            "mirage": sets[False],
            "mirage, maximal sets": sets[True],
        }
        for name, thing in things.items():
            row = arms.setdefault(name, {"auc": [], "bytes": [], "nodes": []})
            row["auc"].append(mean(area(thing, test, kind, source.node_labels, seed, steps) for kind in KINDS))
            whole = isinstance(thing, Graphs)
            row["bytes"].append(sum(map(stored, thing.graphs)) if whole else sum(thing.bytes().values()))
            row["nodes"].append(_nodes(thing) if whole else len(thing.nodes))
    return {
        name: {"auc": round(mean(r["auc"]), 1), "sd": round(stdev(r["auc"]), 1), "each": [round(a, 1) for a in r["auc"]],
               "bytes": round(mean(r["bytes"])), "nodes": round(mean(r["nodes"]))}
        for name, r in arms.items()
    }  # fmt: skip


def area(thing: Graphs | CondensedGraphs, test: Graphs, kind: Kind, labels: int, seed: int, steps: int) -> float:
    network = seeded(seed, lambda: GNN(kind, labels, 2, layers=DEPTH))
    train: Callable[..., Any] = (
        train_on_graphs if isinstance(thing, Graphs) else (lambda n, t, s, **how: train_on_sets(t, n, s, **how))
    )
    train(network, thing, steps, optim=Optim("adam", lr=0.01), seed=seed)
    return 100 * judge_graphs(network, test)["auc"]


def _nodes(source: Graphs) -> int:
    return sum(len(g.nodes) for g in source.graphs)


def main() -> None:
    given = options(__doc__ or "", repeats=9, steps=100)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    source = read(Path(os.environ["LIMBECK_DATA"]) / "mutag" / "MUTAG.txt")
    result = {
        "machine": machine("torch_geometric", "mlxtend"),
        "data": {"graphs": len(source), "nodes": _nodes(source), "bytes": sum(map(stored, source.graphs))},
        "setting": {"depth": DEPTH, "threshold": SHARE, "steps": given.steps, "batch": 32, "lr": 0.01, "kinds": KINDS},
        "extraction": extraction(source, given.repeats),
        "mining": mining(source, given.repeats),
        "areas": areas(source, given.steps),
    }
    report(result, given.out)


if __name__ == "__main__":
    main()
