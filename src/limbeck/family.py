"""A family: one trained elastic model, and what each of its sub-networks costs and is worth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from limbeck.core.adapt import call
from limbeck.core.errors import UsageError
from limbeck.core.files import write_text
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.evaluate import cost
from limbeck.evaluate.pareto import pareto_front
from limbeck.evaluate.recalibrate import recalibrate
from limbeck.evaluate.tasks import evaluator
from limbeck.nn.elastic import Elastic

FILE = "family.json"
_CALIBRATION, _BATCH = 2000, 200  # samples that statistics are measured on, as in OFA


@dataclass(frozen=True)
class Member:
    """A sub-network.

    Args:
        arch: The size of each dimension.
        parameters: Numbers in its parameters.
        flops: Operations for one sample; a multiply-add counts as two.
        latency: Median seconds of a call with one sample on the machine that measured it, or None.
        quality: The main number of its evaluation, or None where there was nothing to judge on.
        metric: What that number is.
    """

    arch: Mapping[str, int]
    parameters: int
    flops: int
    latency: float | None = None
    quality: float | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Family:
    """An elastic model and some of its sub-networks, measured.

    Args:
        elastic: The model.
        members: Sub-networks, by rising number of parameters.
        data: Training samples, on which the running statistics of a sub-network that is picked are measured; None where the
            model has no batch norm.
        preprocess: What is done to the inputs first, such as the model's own normalisation.
    """

    elastic: Elastic
    members: Sequence[Member]
    data: Source | None = None
    preprocess: Callable[[Any], Any] | None = None

    @classmethod
    def of(
        cls,
        elastic: nn.Module,
        data: Source,
        test: Source | None = None,
        *,
        archs: Sequence[Mapping[str, int]] | None = None,
        count: int = 20,
        seed: int = 0,
        latency: bool = True,
        preprocess: Callable[[Any], Any] | None = None,
    ) -> Family:
        """Measure sub-networks of a trained elastic model, each with statistics of its own.

        Args:
            elastic: The model, as a method such as `deps` leaves it.
            data: Training samples for the statistics.
            test: Samples to judge on.
            archs: Which sub-networks; default: the smallest, the largest and random ones.
            count: How many of them, 2 or more.
            seed: Of the random ones.
            latency: Whether to time them.
            preprocess: What is done to the inputs first.

        Raises:
            UsageError: This is no elastic model.

        Example:
            >>> from limbeck.data import TensorSource
            >>> from limbeck.nn.mlp import mlp
            >>> from limbeck.nn.space import Space
            >>> source = TensorSource(torch.eye(4), torch.arange(4) % 3)
            >>> family = Family.of(Elastic(mlp(4, 8, 3), Space({"0.channels": (2, 8)})), source, source, count=2)
            >>> [member.parameters for member in family.members], family.pick(parameters=50)[0][0].out_features
            ([19, 67], 2)
        """
        if not isinstance(elastic, Elastic):
            found = type(elastic).__name__
            raise UsageError("this is no elastic model", found=found, fix="train one with a method such as deps")
        chosen = list(archs) if archs is not None else _some(elastic, count, seed)
        family = cls(elastic, (), data, preprocess)
        members = [family._measure(arch, test, latency) for arch in chosen]
        return replace(family, members=sorted(members, key=lambda m: (m.parameters, m.flops)))

    def pick(
        self, *, parameters: float | None = None, flops: float | None = None, latency: float | None = None
    ) -> tuple[nn.Module, Member]:
        """The best sub-network within a budget, as a plain module in evaluation mode: the largest where none was judged.

        Args:
            parameters: At most this many.
            flops: At most this many for one sample.
            latency: At most this many seconds for one sample, as measured on this machine.

        Raises:
            UsageError: No measured sub-network is that small, or none was timed.
        """
        budget = {"parameters": parameters, "flops": flops, "latency": latency}
        asked = {name: limit for name, limit in budget.items() if limit is not None}
        if "latency" in asked and any(member.latency is None for member in self.members):
            raise UsageError("the sub-networks were not timed", where="latency", fix="Family.of(..., latency=True)")
        fitting = [m for m in self.members if all(getattr(m, name) <= limit for name, limit in asked.items())]
        if not fitting:
            least = {name: min(getattr(m, name) for m in self.members) for name in asked}
            raise UsageError(
                "no sub-network is within the budget", where=", ".join(asked), found=asked, expected=f"at least {least}"
            )
        best = max(fitting, key=lambda m: (m.quality if m.quality is not None else 0.0, m.parameters))
        return self.module(best.arch), best

    def module(self, arch: Mapping[str, int]) -> nn.Module:
        """A sub-network as a plain module, with running statistics of its own."""
        small = self.elastic.extract(arch)
        if self.data is None:
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in small.modules()):
                fix = "give training samples: Family.load(..., data=source)"
                raise UsageError("the statistics of a sub-network need data", where="data", fix=fix)
            return small.eval()
        return recalibrate(small, self._inputs())

    def front(self, against: str = "flops") -> list[Member]:
        """The members that no other beats in both quality and a cost, by rising cost."""
        points = [{"cost": getattr(m, against), "quality": m.quality or 0.0} for m in self.members]
        return [self.members[i] for i in pareto_front(points, maximise=["quality"], minimise=["cost"])]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was measured beside the model of a run: `family.json`."""
        document = {"sizes": self.elastic.space.largest(), "members": [asdict(member) for member in self.members]}
        write_text(Path(path) / FILE, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], data: Source | None = None, module: nn.Module | None = None) -> Family:
        """The family that was saved in the folder of a run or a student.

        Args:
            path: The folder.
            data: Training samples, where the model has batch norms.
            module: The model before its conversions, where it is one's own.

        Raises:
            UsageError: There is none, or it was measured with another space.
        """
        from limbeck.api import load

        elastic = load(path, module)
        if not isinstance(elastic, Elastic):
            raise UsageError("this is no elastic model", where=path, found=type(elastic).__name__)
        return cls.read(path, elastic, data)

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        elastic: Elastic,
        data: Source | None = None,
        preprocess: Callable[[Any], Any] | None = None,
    ) -> Family:
        """What was measured of an elastic model that is loaded already; the arguments are those of `load` and `of`."""
        try:
            document = json.loads((Path(path) / FILE).read_text(encoding="utf-8"))
            members = [Member(**member) for member in document["members"]]
        except FileNotFoundError:
            fix = "Family.of(...).save(path)"
            raise UsageError("this family was not measured", where=path, expected=FILE, fix=fix) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError("this file is damaged", where=Path(path) / FILE, found=error) from None
        if document.get("sizes") != elastic.space.largest():
            found = document.get("sizes")
            raise UsageError("what was measured is of another space", where=Path(path) / FILE, found=found)
        for member in members:
            elastic.space.check(member.arch)
        return cls(elastic, members, data, preprocess)

    def _measure(self, arch: Mapping[str, int], test: Source | None, latency: bool) -> Member:
        small = self.module(arch)
        one = self._one()

        def run() -> Any:
            with torch.no_grad():
                return call(small, one)

        with cost.evaluating(small):
            seconds = cost.latency(run).median if latency else None
        positions, keywords = _arguments(one)
        flops = cost.flops(small, *positions, **keywords)
        member = Member(dict(arch), cost.parameters(small)[0], flops, seconds)
        judge = None if test is None else evaluator(test, small, _BATCH, None, False)
        if judge is None:
            return member
        with torch.no_grad():
            numbers = judge(Roles(student=Role("student", small, self.preprocess)))
        return replace(member, quality=numbers[judge.primary], metric=judge.primary)

    def _inputs(self) -> Iterator[Any]:
        assert self.data is not None
        rows = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[:_CALIBRATION]
        device = next(self.elastic.parameters()).device
        for part in rows.split(_BATCH):
            yield self._prepared(self.data.batch(part, 0).to(device).x)

    def _one(self) -> Any:
        assert self.data is not None
        return self._prepared(self.data.batch(torch.arange(1), 0).to(next(self.elastic.parameters()).device).x)

    def _prepared(self, x: Any) -> Any:
        return x if self.preprocess is None else self.preprocess(x)


def _some(elastic: Elastic, count: int, seed: int) -> list[dict[str, int]]:
    """The smallest, the largest, and different random ones."""
    generator = Random(seed)
    found = {tuple(arch.items()): arch for arch in (elastic.space.smallest(), elastic.space.largest())}
    for _ in range(20 * count):
        if len(found) >= min(count, elastic.space.count()):
            break
        arch = elastic.space.sample(generator)
        found.setdefault(tuple(arch.items()), arch)
    return list(found.values())


def _arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})
