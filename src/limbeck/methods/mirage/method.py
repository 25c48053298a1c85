"""Graphs condensed to sets of computation trees that often occur together; nothing is trained."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Convert, Stage
from limbeck.data.condensed_graphs import CondensedGraphs, FillGraphs, empty
from limbeck.data.graphs import Graphs
from limbeck.data.trees import Trees, frequent_sets, transactions
from limbeck.methods.checks import check_field


@dataclass(frozen=True)
class Mirage(Method):
    """Mirage (Gupta et al. 2024): what a network of `depth` layers sees of a graph is the set of its computation trees.

    The trees of each node are told apart exactly, each graph is the set of its different trees, and the sets that occur together
    in at least `threshold` of the graphs of a class are kept with their counts. Any network of message passing of that depth
    is trained on them: a set stands for graphs as their roots stand for nodes.

    Args:
        depth: L, layers of the networks that are to be trained; one more for graph convolutions (GCN), whose degrees a tree of
            depth L does not know.
        threshold: Below 1 a share of the graphs of a class, else their number; one for all classes, or one for each.
        single_trees: Whether trees of one node, of nodes without neighbours, are kept; the authors' code drops them.
        maximal: Whether sets that are part of another one are left out; the paper keeps them.
        shared: Whether sets that are frequent in several classes are kept, as the paper does; some of the authors' scripts drop
            them.
        limit: Of the number of sets of a class.
        variant: `paper`: sets are drawn by how often they occur; `code`: trees of one node are dropped, and trainings on the sets
            take all of them alike unless told otherwise, as the authors' loader draws by frequency and then overwrites the draw.
            Whether shared sets are kept differs among the authors' own programs, so it stays `shared`.

    Example:
        >>> from limbeck.data.graphs import motifs
        >>> data = motifs(40)
        >>> small = Mirage(depth=1, threshold=0.9).condense(data)
        >>> sum(small.bytes().values()) < 1000, small.labels.unique().tolist()
        (True, [0, 1])
    """

    trains: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    logits: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...] | None] = ()

    depth: int = 2
    threshold: float | tuple[float, ...] = 0.25
    single_trees: bool = True
    maximal: bool = False
    shared: bool = True
    limit: int = 10_000
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        for name in ("depth", "limit"):
            check_field(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")
        for t in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            check_field("threshold", t, t > 0 and (t < 1 or t == int(t)), "a share below 1, or a whole number")

    def check(self, m: Roles, batch: Batch) -> None:
        """The student takes sets of trees."""
        if not isinstance(m.student.module, CondensedGraphs):
            raise UsageError(
                "the student is no condensed set of graphs", where="student", found=type(m.student.module).__name__,
                expected="condensed:graphs",
            )  # fmt: skip

    def check_data(self, data: Any) -> None:
        """The data are graphs with labels."""
        if not isinstance(getattr(data, "train", None), Graphs):
            raise UsageError(
                "these data are no graphs", where="data.train", found=type(getattr(data, "train", None)).__name__,
                expected="limbeck.data.graphs.Graphs", fix="read_tu(folder), or from_pyg(dataset)",
            )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Mine, and fill the student."""
        mined = yield Collect("mine", partial(self._mine, data.train))
        small = empty() if mined.path is None else CondensedGraphs.load(mined.path)
        yield Convert("student", FillGraphs(small), name="keep frequent sets")

    def condense(self, source: Graphs) -> CondensedGraphs:
        """The frequent sets of each class.

        Raises:
            UsageError: A class has no frequent set, none of its own, or too many.
        """
        trees = Trees()
        seen = transactions(source.graphs, self.depth, trees)
        if not self.single_trees or self.variant == "code":
            seen = [frozenset(c for c in items if trees.keys[c][2]) for items in seen]
        labels, found = source.labels.tolist(), {}
        for c, threshold in self._thresholds(sorted(set(labels))).items():
            mine = [items for items, label in zip(seen, labels, strict=True) if label == c]
            least = max(1, round(threshold * len(mine))) if threshold < 1 else int(threshold)
            found[c] = frequent_sets(mine, least, self.limit, self.maximal)
            if not found[c]:
                raise UsageError(
                    "a class has no frequent set", where="method.threshold", 
                    found=f"{threshold} ({least} graphs of class {c})",
                    expected=f"at most {_most(mine)} graphs", fix="lower the threshold",
                )  # fmt: skip
        if not self.shared:
            held = [{s.items for s in sets} for sets in found.values()]
            found = {c: [s for s in sets if sum(s.items in h for h in held) == 1] for c, sets in found.items()}
            if bare := [c for c, sets in found.items() if not sets]:
                raise UsageError(
                    "a class has no frequent set of its own", where="method.shared", found=f"class {bare[0]}",
                    fix="lower the threshold, or keep shared sets",
                )  # fmt: skip
        info: dict[str, Any] = {"depth": self.depth, "threshold": self.threshold, "graphs": len(source)}
        if self.variant == "code":
            info["sampling"] = "uniform"
        return CondensedGraphs.of(found, trees, info)

    def _thresholds(self, classes: list[int]) -> dict[int, float]:
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * len(classes)
        if len(given) != len(classes):
            raise UsageError(
                "thresholds and classes differ in number", where="method.threshold", found=f"{len(given)} thresholds",
                expected=f"{len(classes)}, or one for all",
            )  # fmt: skip
        return dict(zip(classes, given, strict=True))

    def _mine(self, source: Graphs, m: Roles, folder: Path) -> dict[str, Any]:
        small = self.condense(source)
        small.save(folder)
        return {"sets": len(small), "trees": len(small.tree_ends) - 1, "bytes": sum(small.bytes().values())}


def _most(transactions: list[frozenset[int]]) -> int:
    """The graphs that the most frequent tree is in."""
    counts: dict[int, int] = {}
    for items in transactions:
        for item in items:
            counts[item] = counts.get(item, 0) + 1
    return max(counts.values(), default=0)
