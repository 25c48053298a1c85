"""Executes a program: stage after stage, from wherever an earlier start of the same run got to."""

from __future__ import annotations

import atexit
import copy
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Artefact, Choice, Collect, Convert, Search, Stage, Train
from limbeck.engine.checkpoint import Checkpoints, random_state, set_random_state
from limbeck.engine.convert import convert
from limbeck.engine.history import History, trackers
from limbeck.engine.identity import check_claim, identity, note
from limbeck.engine.progress import Progress, make_progress
from limbeck.engine.runtime import Runtime, make_runtime
from limbeck.engine.settings import Engine
from limbeck.engine.signals import Signals
from limbeck.engine.train import Training


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        roles: The models, as the run ended with them.
        history: All rows.
        metrics: The last evaluation of the last training stage.
        out: The run folder, or None.
        results: What each stage yielded to the program.
    """

    roles: Roles
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    out: Path | None
    results: list[Any]


def execute(
    method: Method,
    roles: Roles,
    data: Any = None,
    engine: Engine | None = None,
    *,
    optim: Mapping[str, OptimSpec] | None = None,
    evaluate: Callable[[Roles], Mapping[str, float]] | None = None,
    out: str | Path | None = None,
    progress: Progress | str = "off",
) -> Result:
    """Run a method's program to its end; called again with the same `out`, go on where it stopped.

    Args:
        method: The program.
        roles: The models by role.
        data: Handed to the program's `stages`; for the methods of the library a `limbeck.data.Data`.
        engine: How to execute it.
        optim: Optimizers by role, for roles to which the program gives none.
        evaluate: Called with the roles in evaluation mode, without gradient; the first number it returns chooses the best
            checkpoint unless `engine.monitor` names another.
        out: The run folder; None keeps nothing on disk.
        progress: `"off"`, `"auto"`, `"bar"`, `"lines"`, or an object.

    Returns:
        The roles, history and numbers.

    Raises:
        UsageError: Something does not fit, found before any step; or `out` holds another run.
        RunError: The run had to stop.
        Interrupted: SIGINT or SIGTERM; the state is saved.

    Example:
        >>> from dataclasses import dataclass
        >>> from types import SimpleNamespace
        >>> from torch import nn
        >>> from limbeck.core.batch import Batch
        >>> from limbeck.core.optim import Optim
        >>> class Fit(Method):
        ...     frozen = ()
        ...     def step(self, m, batch):
        ...         return (m.student(batch) - batch.y).square().mean()
        >>> def line(step, generator):
        ...     x = torch.rand(16, 1, generator=generator)
        ...     return Batch(x=x, y=3 * x)
        >>> result = execute(Fit(), Roles(student=nn.Linear(1, 1)), SimpleNamespace(train=line),
        ...                  Engine(steps=200, log_every=100), optim={"student": Optim("sgd", lr=0.5)})
        >>> round(result.roles.student.weight.item(), 2)
        3.0
    """
    engine = engine or Engine()
    method.check_data(data)
    run = Run(method, roles, data, engine, dict(optim or {}), evaluate, Path(out) if out is not None else None)
    run.progress = make_progress(progress, run.runtime.rank) if isinstance(progress, str) else progress
    with run.signal:
        try:
            return run.execute()
        finally:
            run.progress.close()


class Run:
    """The state of one run and the services its stages share."""

    def __init__(
        self,
        method: Method,
        roles: Roles,
        data: Any,
        engine: Engine,
        optim: dict[str, OptimSpec],
        evaluate: Callable[[Roles], Mapping[str, float]] | None,
        out: Path | None,
    ) -> None:
        self.method, self.m, self.data, self.engine, self.optim = method, roles, data, engine, optim
        self.evaluate, self.out = evaluate, out
        self.runtime: Runtime = make_runtime(engine)
        self.progress: Progress = make_progress("off")
        self.signal = Signals()
        self.originals = {name: role.module for name, role in roles.items()}
        self.changed: set[str] = set()
        self.results: list[Any] = []
        self._kept: list[Any] = []
        self.index = 0
        self.last_good: str | None = None
        self.checkpoints = Checkpoints(out / "checkpoints", engine.keep) if out is not None else None
        sinks = [] if out is None or self.runtime.rank else trackers(engine.trackers, out)
        self.history = History(out / "history.jsonl" if out is not None else None, self.runtime, sinks)

    def execute(self) -> Result:
        """Run what is left of the program."""
        self.history.sinks.append(lambda row: self.progress.row(row))
        self._seed()
        saved = self._open()
        program = self.method.stages(self.m, self.data)
        answer: Any = None
        while True:
            modules = {name: role.module for name, role in self.m.items()}
            try:
                stage = program.send(answer)
            except StopIteration:
                break
            made = {name for name, module in modules.items() if self.m[name].module is not module}
            if saved is not None and self.index < len(saved[1]["results"]):
                answer = self._replay(stage, saved[1]["results"][self.index])
            else:
                answer = self._stage(stage, saved, made)
                saved = None
                self.method.after_stage(self.m, stage)
                self._end_stage(stage, answer)
            self.results.append(answer)
            self.index += 1
        if saved is not None:
            self._restore(saved)
        if self.out is not None and self.runtime.rank == 0:
            note(self, self.out, "finished")
        numbers = [r for r in self.results if isinstance(r, dict) and all(isinstance(v, float) for v in r.values())]
        return Result(self.m, self.history.rows, numbers[-1] if numbers else {}, self.out, self.results)

    # Stages

    def _stage(self, stage: Stage, saved: Any, made: AbstractSet[str]) -> Any:
        if saved is not None:
            # A role that the program made anew after the checkpoint, at the end of a stage, has nothing to do with it.
            self._restore(saved, made if saved[1]["train"] is None else frozenset())
        if isinstance(stage, Train):
            training = Training(self, stage)
            if saved is not None and saved[1]["train"] is not None:
                # Averaged roles are made by the stage, so their weights are loaded once it is prepared.
                self._load_states(saved[0])
                training.load(saved[1]["train"])
                set_random_state(saved[1]["rng"][self.runtime.rank])
                self._load_generators(saved[1])
            return training.execute()
        self.progress.stage(stage.name, None)
        for _, role in self.m.items():
            role.freeze()
            self.runtime.place(role.module, shard=False)
        if isinstance(stage, Convert):
            self.changed.add(stage.role)
            return convert(self, stage)
        with torch.no_grad():
            return self._collect(stage) if isinstance(stage, Collect) else self._search(stage)

    def _collect(self, stage: Collect) -> Artefact:
        if self.out is None:
            own = None
            if self.runtime.rank == 0:
                own = tempfile.mkdtemp(prefix="limbeck-")
                atexit.register(shutil.rmtree, own, ignore_errors=True)
            folder = Path(self.runtime.gather(own)[0])  # one for all processes
        else:
            folder = self.out / "artefacts" / f"{self.index:02d}-{stage.name}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.runtime.rank == 0:
            value = stage.make(self.m, folder)
        self.runtime.barrier()
        value = self.runtime.gather(value if self.runtime.rank == 0 else None)[0]
        return Artefact(folder, value, _digest(folder))

    def _search(self, stage: Search) -> Choice:
        scores = tuple((candidate, float(stage.score(self.m, candidate))) for candidate in stage.candidates)
        if not scores:
            raise UsageError("a search has no candidates", where=f"stage '{stage.name}'")
        candidate, score = max(scores, key=lambda pair: pair[1])
        return Choice(candidate, score, scores)

    def _replay(self, stage: Stage, result: Any) -> Any:
        """What a finished stage yielded, without doing it again; roles are rebuilt when all is known."""
        if isinstance(stage, Collect):
            artefact = Artefact(self.out / "artefacts" / f"{self.index:02d}-{stage.name}", *result)  # type: ignore[operator]
            if _digest(artefact.path) != artefact.digest:
                raise UsageError(
                    "an artefact of this run has changed on disk", where=artefact.path, fix="start with a new `out`"
                )
            return artefact
        if isinstance(stage, Search):
            scores = tuple(zip(stage.candidates, result, strict=True))
            candidate, score = max(scores, key=lambda pair: pair[1])
            return Choice(candidate, score, scores)
        return result

    def _end_stage(self, stage: Stage, answer: Any) -> None:
        kept = answer
        if isinstance(answer, Artefact):
            kept = [answer.value, answer.digest]
        elif isinstance(answer, Choice):
            kept = [score for _, score in answer.scores]
        self._kept = [*self._kept, kept]
        if self.signal.name and not isinstance(stage, Train):
            self.progress.say(f"{self.signal.name}: stopping after stage '{stage.name}'")
        self.save(f"{self.index:02d}-{stage.name}-end", None, set())

    # State

    def _seed(self) -> None:
        seed = self.engine.seed
        self.m.seed = seed
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed + self.runtime.rank)
        if (
            self.engine.deterministic != torch.are_deterministic_algorithms_enabled()
        ):  # the call alone imports the compiler
            torch.use_deterministic_algorithms(self.engine.deterministic)

    def save(self, name: str, train: dict[str, Any] | None, protect: set[str]) -> str:
        """Write a checkpoint of everything; returns its name."""
        if self.checkpoints is None:
            return "not written: the run has no folder"
        roles = {r: self.runtime.model_state(self.m[r].module) for r in sorted(self.changed) if r in self.m}
        rng = self.runtime.gather(random_state())
        state = {
            "stage": self.index,
            "results": self._kept,
            "lineage": self.m.lineage,
            "train": train,
            "history": self.history.state(),
            "rng": rng,
            "generators": {key: g.get_state() for key, g in self.m._generators.items()},
        }
        if self.runtime.rank == 0:
            self.checkpoints.save(name, roles, state, protect, {"run": self.identity["id"]})
        self.runtime.barrier()
        self.last_good = str(self.checkpoints.folder / name)
        return name

    def _open(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Claim the run folder; the newest good checkpoint when there is one."""
        self.identity = identity(self)
        if self.out is None or self.checkpoints is None:
            return None
        if self.runtime.rank == 0:
            check_claim(self.out, self.identity)
            note(self, self.out, "running")
        self.runtime.barrier()
        found = self.checkpoints.latest(self.progress.say)
        if found is None:
            self.history.load({"rows": 0, "window": {}, "time": 0.0})
            return None
        name, roles, state = found
        self.last_good = str(self.checkpoints.folder / name)
        self._kept = list(state["results"])
        return roles, state

    def _restore(self, saved: tuple[dict[str, Any], dict[str, Any]], without: AbstractSet[str] = frozenset()) -> None:
        """Rebuild the roles as they were, with their weights, and put counters and random states back."""
        from limbeck.convert.record import rebuild

        roles, state = saved
        roles = {name: values for name, values in roles.items() if name not in without}
        lineage = {name: origin for name, origin in state["lineage"].items() if name not in without}
        self.m.lineage.update(lineage)
        for name, origin in lineage.items():
            module = rebuild(copy.deepcopy(self.originals[origin["base"]]), origin["records"])
            setattr(self.m, name, module if name in self.m else Role(name, module, self.m[origin["base"]].preprocess))
        self.m._converted.clear()
        for name in roles:
            if name not in self.m:
                raise UsageError("a checkpoint has a role that the program does not", where=f"roles.{name}")
        self.changed.update(roles)
        self._load_states(roles)
        self.history.load(state["history"])
        self._load_generators(state)
        set_random_state(state["rng"][self.runtime.rank])

    def _load_states(self, roles: dict[str, Any]) -> None:
        for name, values in roles.items():
            self.runtime.load_model(self.m[name].module, values)

    def _load_generators(self, state: dict[str, Any]) -> None:
        for key, value in state["generators"].items():
            name, device = key.rsplit("@", 1)
            self.m.rng(name, device).set_state(value)

    def load_roles(self, checkpoint: str) -> None:
        """Put the roles' weights of one of this run's checkpoints in place."""
        if self.checkpoints is not None:
            self._load_states(self.checkpoints.load(checkpoint)[0])


def _digest(folder: Path) -> str:
    """The hash of all files of a folder and their names."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
