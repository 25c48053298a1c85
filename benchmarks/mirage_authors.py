"""Mirage's trees and sets beside the functions of its authors' own script, on MUTAG (`LIMBECK_DATA/mutag/MUTAG.txt`).

    git clone https://github.com/frigategnn/Mirage && pip install pyfpgrowth networkx torch_geometric
    LIMBECK_DATA=path python benchmarks/mirage_authors.py --mirage Mirage --out benchmarks/results/mirage_authors.json

From `NCI1/graph-nci-finalize-reduce-curr.py` come `to_nx`, `get_labels`, `get_MPTree` and `get_can_lab_tree`, as they are, called
as its cells 40 and following do; its sets are those of pyfpgrowth, by count. What they read is made before the clock starts. The
rest of the script (its data set, splits and networks) is not run. Times are of the process's CPU, the ways taking turns.
"""

import argparse
import ast
import itertools
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from measuring import machine, report
from mirage import DEPTH, read, timed

from limbeck.data.graphs import Graph, Graphs
from limbeck.data.trees import Trees, frequent_sets, transactions

SCRIPT = "NCI1/graph-nci-finalize-reduce-curr.py"
NAMES = ("to_nx", "get_labels", "get_MPTree", "get_can_lab_tree")


def theirs(folder: Path) -> dict[str, Callable[..., Any]]:
    """The authors' functions, out of their script."""
    tree = ast.parse((folder / SCRIPT).read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in NAMES]
    names: dict[str, Any] = {name: import_module(module) for name, module in (("np", "numpy"), ("nx", "networkx"))}
    names["to_networkx"] = import_module("torch_geometric.utils").to_networkx
    exec(compile(tree, SCRIPT, "exec"), names)
    return {name: names[name] for name in NAMES}


def both_ways(graph: Graph) -> bool:
    """Whether every edge is listed both ways, as the script takes for granted; one molecule of the file has some that are not."""
    edges = set(map(tuple, graph.edges.T.tolist()))
    return all((b, a) in edges for a, b in edges)


def as_they_read(source: Graphs) -> list[Any]:
    """Graphs of torch_geometric with one-hot labels; all edges have one label, as the script gives them for NCI1."""
    data, one_hot = import_module("torch_geometric.data").Data, torch.nn.functional.one_hot
    return [
        data(
            x=one_hot(g.nodes, source.node_labels), edge_index=g.edges,
            edge_attr=torch.ones(g.edges.shape[1], 1, dtype=torch.int64),
        )
        for g in source.graphs
    ]  # fmt: skip


def labels(them: dict[str, Callable[..., Any]], graphs: list[Any], depth: int) -> list[list[int]]:
    """The canonical label of each node's tree, as the script's loop makes them."""
    found = []
    for data in graphs:
        graph = them["get_labels"](them["to_nx"](data))
        trees = [them["get_MPTree"](graph, node, depth) for node in graph.nodes]
        found.append([them["get_can_lab_tree"](tree) for tree in trees if len(tree) > 1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirage", type=Path, required=True, help="a clone of the authors' code")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = read(Path(os.environ["LIMBECK_DATA"]) / "mutag" / "MUTAG.txt")
    source = source.subset([i for i, g in enumerate(source.graphs) if both_ways(g)])
    them, graphs, fp = theirs(given.mirage), as_they_read(source), import_module("pyfpgrowth")
    extraction, mining = {}, {}
    for depth in (1, 2, 3):
        texts, codes = labels(them, graphs, depth), transactions(source.graphs, depth, Trees())
        assert [len(set(a)) for a in texts] == [len(b) for b in codes]
        ways = {
            "limbeck": lambda depth=depth: transactions(source.graphs, depth, Trees()),
            "authors": lambda depth=depth: labels(them, graphs, depth),
        }
        trees = len(set(itertools.chain(*texts)))
        extraction[f"depth {depth}"] = {"trees": trees, "ms": timed(ways, given.repeats)}
        print(depth, extraction[f"depth {depth}"], flush=True)
    codes = transactions(source.graphs, DEPTH, Trees())
    rows = [t for t, y in zip(codes, source.labels.tolist(), strict=True) if y == 1]
    for share in (0.1, 0.25, 0.5):
        least = max(1, round(share * len(rows)))
        ours = {tuple(sorted(f.items)): f.count for f in frequent_sets(rows, least, 10**6)}
        found = fp.find_frequent_patterns([list(row) for row in rows], least)
        ways = {
            "limbeck": lambda least=least: frequent_sets(rows, least, 10**6),
            "authors": lambda least=least: fp.find_frequent_patterns([list(row) for row in rows], least),
        }
        right = sum(ours.get(tuple(sorted(items))) == count for items, count in found.items())
        mining[f"{share:.0%} of {len(rows)}"] = {
            "sets": {"limbeck": len(ours), "authors": len(found), "authors, with the right count": right},
            "ms": timed(ways, given.repeats),
        }
        print(share, mining[f"{share:.0%} of {len(rows)}"], flush=True)
    used = machine("torch_geometric", "networkx", "pyfpgrowth")
    report({"machine": used, "graphs": len(source), "extraction": extraction, "mining": mining}, given.out)


if __name__ == "__main__":
    main()
