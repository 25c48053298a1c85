"""The four kinds of stages, as plain data; the engine executes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.optim import Ema, OptimSpec
from limbeck.core.roles import Roles
from limbeck.core.update import Update

Step = Callable[[Roles, Batch], "Iterator[Update] | Tensor | Update"]


@dataclass(frozen=True, eq=False)
class Train:
    """Update named roles from batches.

    Args:
        step: Called with the roles and a batch; a generator of updates, or a function that returns one update or a loss for
            the only role.
        roles: The roles that learn, each with its optimizer; `None` as optimizer takes the run's setting.
        frozen: Roles that are used and must not change.
        data: A source, a data loader, a function `(step, generator) -> Batch` for endless data, or None for no data.
        steps: Steps of this stage; wins over epochs. Default: the run's.
        epochs: Passes over the data. Default: the run's.
        lr_factor: Multiplies the learning rates of this stage, whoever gave them.
        span: Which part of the run the stage is, from 0 to 1: it takes that share of the run's steps or epochs, and its
            optimizers that part of their schedules. So several stages go through one schedule.
        ema: Averaged roles by name.
        evaluate: Called with the roles in evaluation mode; returns numbers. Default: the run's.
        run: In place of `step`, for a stage that owns its loop: `run(m, data, state)` is a generator that yields a mapping of
            numbers wherever a checkpoint may be taken, keeps everything it needs to go on in the dictionary `state`
            (tensors, numbers, strings, and objects with `state_dict`), and starts from there when `state` is not empty.
        name: Shown in the history and in file names.

    Yields to the program: the last evaluation's numbers.
    """

    step: Step | None = None
    roles: Mapping[str, OptimSpec | None] = field(default_factory=dict)
    frozen: Sequence[str] = ()
    data: Any = None
    steps: int | None = None
    epochs: float | None = None
    lr_factor: float = 1.0
    span: tuple[float, float] = (0.0, 1.0)
    ema: Mapping[str, Ema] = field(default_factory=dict)
    evaluate: Callable[[Roles], Mapping[str, float]] | None = None
    run: Callable[[Roles, Any, dict[str, Any]], Iterator[Mapping[str, Any]]] | None = None
    name: str = "train"

    def __post_init__(self) -> None:
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise UsageError(
                "a stage is no part of the run",
                where=f"stage '{self.name}'.span",
                found=self.span,
                expected="0 <= from < to <= 1",
            )

    def share(self, steps: int) -> int:
        """How many of the run's steps are this stage's; those of stages that share a run out add up.

        Example:
            >>> Train(span=(0.0, 0.5)).share(7) + Train(span=(0.5, 1.0)).share(7)
            7
        """
        return round(self.span[1] * steps) - round(self.span[0] * steps)

    def at(self, step: int, total: int) -> tuple[float, float]:
        """Where step `step` of the stage's `total` lies in the whole schedule, and how long that is.

        Example:
            >>> Train(span=(0.5, 1.0)).at(3, 50)
            (53.0, 100.0)
        """
        whole = total / (self.span[1] - self.span[0])
        return step + self.span[0] * whole, whole


@dataclass(frozen=True, eq=False)
class Collect:
    """Run models or mine data, and keep what comes out as an artefact of the run.

    Args:
        name: Shown in the history; the artefact's folder.
        make: Called with the roles (frozen, no gradient) and an empty folder to write to; returns plain data (numbers,
            strings, lists, dictionaries, tensors). Killed half-way, it is called again with the folder as it was left.
        example: What `make` returns, in form: a plan, which collects nothing, goes on with it.

    Yields to the program: an `Artefact`, the folder and what `make` returned.
    """

    name: str
    make: Callable[[Roles, Any], Any]
    example: Any = None


class Conversion(Protocol):
    """A change of a module's structure that can be done again from its record alone."""

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The changed module, and a record of plain data; `record["kind"]` names a function of `limbeck.convert`."""
        ...


@dataclass(frozen=True, eq=False)
class Convert:
    """Change a role's module; the record of the change rebuilds it on resume and on loading.

    Args:
        role: The role.
        how: The conversion.
        of: The role whose module is converted; default the role itself. The module is never changed in place.
        name: Shown in the history.
        compare: A source. With it the module is run before and after on its first samples, and judged where the run judges:
            the history says how far apart the two are. For conversions that should change little, such as folding a mask.

    Yields to the program: the record.
    """

    role: str
    how: Conversion
    of: str | None = None
    name: str = "convert"
    compare: Any = None


@dataclass(frozen=True, eq=False)
class Search:
    """Score candidates, keep the best.

    Args:
        candidates: Plain data, in a fixed order.
        score: A pure function of the roles and a candidate; higher is better.
        name: Shown in the history.

    Yields to the program: a `Choice`, the candidate with all scores.
    """

    candidates: Iterable[Any]
    score: Callable[[Roles, Any], float]
    name: str = "search"


@dataclass(frozen=True)
class Choice:
    """What a search found: the candidate, its score, and `(candidate, score)` of all."""

    candidate: Any
    score: float
    scores: tuple[tuple[Any, float], ...]


@dataclass(frozen=True)
class Artefact:
    """What a collect stage left: its folder, what it returned, and the hash of both."""

    path: Any
    value: Any
    digest: str


Stage = Train | Collect | Convert | Search
