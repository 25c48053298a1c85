"""Mirage: trees are what networks see, codes are trees, sets are those of brute force, and files do not depend on order."""

import warnings
from itertools import combinations

import pytest
import torch

import limbeck
from limbeck import Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource, load_data
from limbeck.data.condensed_graphs import CondensedGraphs, empty, train_on_sets
from limbeck.data.graphs import Graph, Graphs, from_pyg, motifs, read_tu, union
from limbeck.data.trees import Trees, frequent_sets, transactions
from limbeck.evaluate.graphs import auc, judge_graphs
from limbeck.methods.mirage.method import Mirage
from limbeck.nn.gnn import GNN

FAST = Mirage(depth=1, threshold=0.5)


def drawn(seed=0, nodes=9, labels=3, marks=2):
    g = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([(a, b) for a, b in combinations(range(nodes), 2)])
    pairs = pairs[torch.rand(len(pairs), generator=g) < 0.3].T
    kinds = torch.randint(marks, (pairs.shape[1],), generator=g)
    edges, kinds = torch.cat([pairs, pairs.flip(0)], 1), torch.cat([kinds, kinds])
    return Graph(torch.randint(labels, (nodes,), generator=g), edges, kinds)


def turned(graph, seed=1):
    order = torch.randperm(len(graph.nodes), generator=torch.Generator().manual_seed(seed))
    back = order.argsort()
    return Graph(graph.nodes[order], back[graph.edges], graph.edge_labels)


@pytest.mark.parametrize(("kind", "deeper"), [("gin", 0), ("sage", 0), ("gat", 0), ("gcn", 1)])
def test_a_root_is_what_the_network_sees_of_the_node(kind, deeper):
    pytest.importorskip("torch_geometric")
    from limbeck.nn.gnn import GNN

    torch.manual_seed(0)
    net, graph, trees = GNN(kind, 3, 2, 8, 2).double(), drawn(3), Trees()
    whole = net.embed(graph.nodes, graph.edges)

    def gap(depth):
        gaps = []
        for v, code in enumerate(trees.codes(graph, depth)):
            tree = trees.expand(code)
            gaps.append((net.embed(tree.nodes, tree.edges)[0] - whole[v]).abs().max().item())
        return max(gaps)

    # A tree knows the degrees of all but its leaves, whose own neighbours are not in it.
    assert gap(2 + deeper) < 1e-12
    assert gap(1 + deeper) > 1e-6


def test_all_roots_of_a_graph_are_its_readout():
    pytest.importorskip("torch_geometric")
    from limbeck.nn.gnn import GNN

    torch.manual_seed(0)
    net, graph, trees = GNN("gin", 3, 2, 8, 2, readout="sum").double(), drawn(3), Trees()
    roots = sum(net.embed(t.nodes, t.edges)[0] for t in map(trees.expand, trees.codes(graph, 2)))
    expected = net(graph.nodes, graph.edges, torch.zeros(len(graph.nodes), dtype=torch.int64))
    torch.testing.assert_close(net.classifier(roots)[None], expected)


def test_codes_do_not_depend_on_the_order_of_nodes_and_know_every_label():
    trees, graph = Trees(), drawn()
    codes = trees.codes(graph, 3)
    assert sorted(trees.codes(turned(graph), 3)) == sorted(codes)
    edge = int(graph.edges[0, 0])
    other = Graph(graph.nodes.clone(), graph.edges, graph.edge_labels.clone())
    other.nodes[edge] = 9
    assert trees.codes(other, 3) != codes
    marked = Graph(graph.nodes, graph.edges, graph.edge_labels + torch.eye(graph.edges.shape[1])[0].long())
    assert trees.codes(marked, 3) != codes


def test_there_are_as_many_codes_as_colours():
    """Colours of Weisfeiler and Leman, by refinement of partitions."""
    graph, trees = drawn(5, nodes=14), Trees()
    colours = graph.nodes.tolist()
    for depth in range(4):
        assert len(set(trees.codes(graph, depth))) == len(set(colours))
        near = [[] for _ in colours]
        for (a, b), mark in zip(graph.edges.T.tolist(), graph.edge_labels.tolist(), strict=True):
            near[b].append((mark, colours[a]))
        keys = [(c, tuple(sorted(n))) for c, n in zip(colours, near, strict=True)]
        colours = [sorted(set(keys)).index(k) for k in keys]


def test_a_tree_of_a_regular_graph_has_a_known_size():
    ring = torch.tensor([(k, (k + s) % 8) for k in range(8) for s in (1, 2, -1, -2)]).T
    trees = Trees()
    (code,) = set(trees.codes(Graph(torch.zeros(8, dtype=torch.int64), ring), 3))
    assert trees.size(code) == 1 + 4 + 16 + 64
    tree = trees.expand(code)
    assert len(tree.nodes) == 85
    assert torch.bincount(tree.edges[1])[0] == 4


def test_frequent_sets_are_those_of_brute_force():
    rng = torch.Generator().manual_seed(0)
    rows = [{k for k in range(7) if torch.rand((), generator=rng) < 0.5} for _ in range(25)]
    for least in (2, 5, 9, 30):
        expected = {}
        for size in range(1, 8):
            for items in combinations(range(7), size):
                count = sum(set(items) <= row for row in rows)
                if count >= least:
                    expected[items] = count
        found = {f.items: f.count for f in frequent_sets(rows, least)}
        assert found == expected
        for items, count in found.items():
            assert all(found[part] >= count for part in combinations(items, len(items) - 1) if part)
    (top,) = frequent_sets([{1, 2, 3}], 1, maximal=True)
    assert (top.items, top.count) == ((1, 2, 3), 1)
    pandas = pytest.importorskip("pandas")
    mlxtend = pytest.importorskip("mlxtend.frequent_patterns")
    table = pandas.DataFrame([[k in row for k in range(7)] for row in rows])
    theirs = mlxtend.fpgrowth(table, min_support=5 / 25, use_colnames=True)
    ours = {frozenset(f.items): f.count / 25 for f in frequent_sets(rows, 5)}
    assert {frozenset(s): v for s, v in zip(theirs["itemsets"], theirs["support"], strict=True)} == pytest.approx(ours)


def test_the_file_does_not_depend_on_the_order_of_graphs(tmp_path):
    source = motifs(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    other = Graphs([turned(_marked(source.graphs[i])) for i in order], source.labels[order])
    one = Graphs([_marked(g) for g in source.graphs], source.labels)
    FAST.condense(one).save(tmp_path / "a")
    FAST.condense(other).save(tmp_path / "b")
    for name in ("graphs.safetensors", "graphs.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = CondensedGraphs.load(tmp_path / "a")
    assert again.bytes() == FAST.condense(one).bytes()
    assert sum(again.bytes().values()) <= (tmp_path / "a" / "graphs.safetensors").stat().st_size


def _marked(graph):
    return Graph(graph.nodes, graph.edges, torch.zeros(graph.edges.shape[1], dtype=torch.int64))


def test_examples_are_the_trees_of_sets_with_their_roots():
    small = FAST.condense(motifs(60))
    x = small.examples([0, 1])
    trees = [*small.set(0), *small.set(1)]
    side = union(trees)
    assert all(x[name].equal(side[name]) for name in ("nodes", "edges", "edge_labels"))
    assert int(x["roots"].sum()) == len(trees)
    assert x["nodes"][x["roots"]].tolist() == [int(t.nodes[0]) for t in trees]
    assert x["graph"][x["roots"]].tolist() == [0] * len(small.set(0)) + [1] * len(small.set(1))
    assert (x["graph"][x["edges"][0]] == x["graph"][x["edges"][1]]).all()


def test_sampling_is_by_frequency_or_not():
    small = FAST.condense(motifs(60))
    shares = []
    for sampling in ("frequency", "uniform"):
        ((_, y),) = small.batches(1, 4000, sampling)
        shares.append(float((y == 1).double().mean()))
    counts, labels = small.counts.double(), small.labels == 1
    assert shares[0] == pytest.approx(float(counts[labels].sum() / counts.sum()), abs=0.04)
    assert shares[1] == pytest.approx(float(labels.double().mean()), abs=0.04)


def test_one_graph_is_one_transaction_and_variants():
    graph = drawn()
    lone = Graph(torch.tensor([*graph.nodes, 2]), graph.edges, graph.edge_labels)
    both = Graphs([graph, lone], [0, 1])
    trees = Trees()
    sizes = [len(t) for t in transactions(both.graphs, 1, trees)]
    method = Mirage(depth=1, threshold=1, maximal=True)
    small = method.condense(both)
    assert (small.set_ends[1:] - small.set_ends[:-1]).tolist() == sizes
    without = Mirage(depth=1, threshold=1, maximal=True, single_trees=False).condense(both)
    assert (without.set_ends[1:] - without.set_ends[:-1]).tolist() == [sizes[0]] * 2
    apart = Mirage(depth=1, threshold=1, shared=False)
    with pytest.raises(UsageError, match="of its own"):  # the first graph is part of the second
        apart.condense(both)
    third = Graph(torch.tensor([*graph.nodes, 1]), graph.edges, graph.edge_labels)
    own = apart.condense(Graphs([third, lone], [0, 1]))
    assert len(own) == 2 ** sizes[0] * 2
    assert all(
        any(len(t.nodes) == 1 and int(t.nodes) == 1 + int(y) for t in own.set(k)) for k, y in enumerate(own.labels)
    )


def test_each_class_may_have_its_threshold():
    source = motifs(60)
    one, two = (FAST.condense(source), Mirage(depth=1, threshold=(0.5, 0.9)).condense(source))
    assert two.counts[two.labels == 0].tolist() == one.counts[one.labels == 0].tolist()
    size = int((source.labels == 1).sum())
    assert int(two.counts[two.labels == 1].min()) >= round(0.9 * size) > int(one.counts[one.labels == 1].min())


def test_maximal_sets_are_those_in_no_other():
    rng = torch.Generator().manual_seed(1)
    rows = [{k for k in range(8) if torch.rand((), generator=rng) < 0.6} for _ in range(30)]
    whole = frequent_sets(rows, 6)
    expected = [f for f in whole if not any(set(f.items) < set(g.items) for g in whole)]
    assert frequent_sets(rows, 6, maximal=True) == expected
    assert 1 < len(expected) < len(whole)


def test_networks_learn_from_it_and_a_run_keeps_it(tmp_path):
    pytest.importorskip("torch_geometric")
    from limbeck.nn.gnn import GNN

    data = Data(train=motifs(120, noise=0.0), test=motifs(60, noise=0.0, seed=1))
    result = limbeck.distill(None, "condensed:graphs", data, Mirage(), out=tmp_path / "run", progress="off")
    small = limbeck.load(tmp_path / "run")
    assert small.bytes() == result.roles.student.module.bytes()
    torch.manual_seed(0)
    network = train_on_sets(small, GNN("gin", 5, 2), 150)
    assert judge_graphs(network, data.test)["auc"] > 0.6
    assert small.train(GNN("sage", 5, 2), steps=3).training is False
    assert '"graph condensation"' in (tmp_path / "run" / "metrics.json").read_text()


def test_areas():
    assert auc(torch.tensor([0.0, 0.0]), torch.tensor([0, 1])) == 0.5
    assert auc(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])) == 1.0


def test_graphs_of_other_libraries_and_files(tmp_path):
    pyg = pytest.importorskip("torch_geometric.data")
    pair = torch.tensor([[0, 1], [1, 0]])
    data = [pyg.Data(x=torch.eye(2), edge_index=pair, y=torch.tensor([k]), edge_attr=torch.ones(2, 1)) for k in (0, 1)]
    found = from_pyg(data)
    assert found.graphs[0].nodes.tolist() == [0, 1]
    assert found.graphs[0].edge_labels.tolist() == [1, 1]
    with pytest.raises(UsageError, match="continuous"):
        from_pyg([pyg.Data(x=torch.tensor([[0.5], [1.0]]), edge_index=pair, y=torch.tensor([0]))])
    with pytest.raises(UsageError, match="no labels"):
        from_pyg([pyg.Data(x=torch.rand(2, 3), edge_index=pair, y=torch.tensor([0]))])
    with pytest.raises(UsageError, match="no label"):
        from_pyg([pyg.Data(x=torch.eye(2), edge_index=pair)])
    for name, text in {
        "A": "1, 2\n2, 1\n3, 4\n4, 3\n", "graph_indicator": "1\n1\n2\n2\n", "graph_labels": "-1\n1\n",
        "node_labels": "3\n4\n5\n3\n", "edge_labels": "0\n0\n1\n1\n",
    }.items():  # fmt: skip
        (tmp_path / f"TOY_{name}.txt").write_text(text)
    read = read_tu(tmp_path)
    assert [g.nodes.tolist() for g in read.graphs] == [[3, 4], [5, 3]]
    assert read.graphs[1].edges.tolist() == [[0, 1], [1, 0]]
    assert read.graphs[1].edge_labels.tolist() == [1, 1]
    assert read.labels.tolist() == [0, 1]


TOY = {"A": "1, 2\n2, 1\n3, 4\n4, 3\n", "graph_indicator": "1\n1\n2\n2\n", "graph_labels": "-1\n1\n"}


def test_parts_of_graphs_are_graphs():
    source = motifs(100)
    data = load_data({"train": source})
    Mirage().check_data(data)
    assert sum(len(s) for _, s in data.items()) == 100
    few = source.subset([5, 2])
    assert few.ids.tolist() == [5, 2]
    assert few.graphs[1] is source.graphs[2]
    assert few.labels.equal(source.labels[[5, 2]])


def toy(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in {**TOY, **files}.items():
        (folder / f"TOY_{name}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(("files", "words"), [
    ({"A": "1, 2\n2, 9\n"}, "a node that there is not"),
    ({"A": "1, 2\n2, 3\n"}, "from one graph to another"),
    ({"A": "1, 2\n2\n"}, "damaged"),
    ({"A": "1, x\n"}, "damaged"),
    ({"graph_indicator": "1\n2\n1\n2\n"}, "graph by graph"),
    ({"graph_labels": "1\n"}, "graph by graph"),
    ({"graph_labels": "1\n1\n1\n"}, "no nodes"),
    ({"node_labels": "1\n"}, "nodes and their labels"),
    ({"edge_labels": "1\n"}, "edges and their labels"),
    ({"node_attributes": "0.5\n" * 4}, "continuous attributes"),
])  # fmt: skip
def test_damaged_files_are_refused(files, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        read_tu(toy(tmp_path, **files))


def test_the_reader_of_torch_geometric_reads_the_same(tmp_path):
    sets = pytest.importorskip("torch_geometric.datasets")
    marks = {"node_labels": "0\n1\n1\n0\n", "edge_labels": "0\n0\n1\n1\n"}
    toy(tmp_path / "TOY", A="3, 4\n1, 2\n4, 3\n2, 1\n", **{**marks, "edge_labels": "1\n0\n1\n0\n"})
    (tmp_path / "TOY").rename(tmp_path / "raw")
    (tmp_path / "TOY").mkdir()
    (tmp_path / "raw").rename(tmp_path / "TOY" / "raw")
    theirs, ours = from_pyg(sets.TUDataset(tmp_path, "TOY")), read_tu(tmp_path / "TOY" / "raw")
    assert theirs.labels.equal(ours.labels)
    for a, b in zip(theirs.graphs, ours.graphs, strict=True):
        assert a.nodes.equal(b.nodes)
        assert sorted(zip(*a.edges.tolist(), a.edge_labels.tolist(), strict=True)) == sorted(
            zip(*b.edges.tolist(), b.edge_labels.tolist(), strict=True)
        )


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Graphs([drawn()], None), "no labels"),
    (lambda: Graphs([], []), "differ in number"),
    (lambda: Graphs([Graph(torch.zeros(2), torch.zeros(2, 0).long())], [0]), "told apart"),
    (lambda: Graphs([Graph(torch.zeros(2).long(), torch.tensor([[0], [5]]))], [0]), "leads to a node"),
    (lambda: Graphs([Graph(torch.zeros(0).long(), torch.zeros(2, 0).long())], [0]), "no nodes"),
    (lambda: Graphs([Graph(torch.tensor([-1]), torch.zeros(2, 0).long())], [0]), "below 0"),
    (lambda: Mirage(threshold=(0.5, 0.5, 0.5)).condense(motifs(20)), "differ in number"),
    (lambda: Mirage(threshold=(0.5, 0.0)), "out of range"),
    (lambda: Mirage(threshold=500).condense(motifs(20)), "no frequent set"),
    (lambda: Mirage(depth=3, threshold=1, limit=10).condense(motifs(6)), "too many frequent sets"),
    (lambda: Mirage(depth=0), "out of range"),
    (lambda: Mirage(threshold=1.5), "out of range"),
    (lambda: frequent_sets([{1}], 0), "out of range"),
    (lambda: Mirage().check_data(Data(train=TensorSource(torch.zeros(2, 2)))), "no graphs"),
    (lambda: Mirage().check(Roles(student=torch.nn.Linear(2, 2)), None), "no condensed set of graphs"),
    (lambda: train_on_sets(empty(), torch.nn.Linear(2, 2)), "nothing to train on"),
    (lambda: CondensedGraphs.load("/nowhere"), "no condensed graphs"),
    (lambda: read_tu("/nowhere"), "no graphs"),
])  # fmt: skip
def test_what_does_not_fit(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_a_readout_by_sums_is_warned_of():
    small = FAST.condense(motifs(60))
    with pytest.warns(UserWarning, match="different scales"):
        small.train(GNN("gin", 5, 2, readout="sum"), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.train(GNN("gin", 5, 2), steps=1)
