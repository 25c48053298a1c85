"""Executes a program: stage after stage, from wherever an earlier start of the same run got to."""

from __future__ import annotations

import atexit
import copy
import hashlib
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.core.errors import UsageError
from limbeck.core.files import write_text
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Artefact, Choice, Collect, Convert, Search, Stage, Train
from limbeck.engine.checkpoint import Checkpoints, random_state, set_random_state
from limbeck.engine.history import History, trackers
from limbeck.engine.progress import Progress, make_progress
from limbeck.engine.runtime import Runtime, make_runtime
from limbeck.engine.settings import Engine
from limbeck.engine.signals import Signals
from limbeck.engine.train import Training, digest

# Settings that may differ between two starts of one run without changing what it computes.
_FREE = {"workers", "checkpoint_every", "keep", "trackers", "device", "processes"}


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
            try:
                stage = program.send(answer)
            except StopIteration:
                break
            if saved is not None and self.index < len(saved[1]["results"]):
                answer = self._replay(stage, saved[1]["results"][self.index])
            else:
                answer = self._stage(stage, saved)
                saved = None
                self.method.after_stage(self.m, stage)
                self._end_stage(stage, answer)
            self.results.append(answer)
            self.index += 1
        if saved is not None:
            self._restore(saved)
        self._note("finished")
        numbers = [r for r in self.results if isinstance(r, dict) and all(isinstance(v, float) for v in r.values())]
        return Result(self.m, self.history.rows, numbers[-1] if numbers else {}, self.out, self.results)

    # Stages

    def _stage(self, stage: Stage, saved: Any) -> Any:
        if saved is not None:
            self._restore(saved)
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
            return self._convert(stage)
        with torch.no_grad():
            return self._collect(stage) if isinstance(stage, Collect) else self._search(stage)

    def _convert(self, stage: Convert) -> dict[str, Any]:
        self.changed.add(stage.role)
        before = self._seen(stage, stage.of or stage.role)
        record = self.m.convert(stage.role, stage.how, stage.of)
        if before is not None:
            self.runtime.place(self.m[stage.role].module, shard=False)
            outputs, numbers = self._seen(stage, stage.role) or before
            row = {f"convert/{name}": value for name, value in difference(before[0], outputs).items()}
            row |= {f"before/{name}": value for name, value in before[1].items()}
            row |= {f"after/{name}": value for name, value in numbers.items()}
            self.history.emit(stage.name, 0, 0, **row)
        return record

    @torch.no_grad()
    def _seen(self, stage: Convert, role: str) -> tuple[torch.Tensor, Mapping[str, float]] | None:
        """A role's outputs on the first samples of what a conversion is compared on, and its evaluation."""
        if stage.compare is None or role not in self.m:
            return None
        frozen = self.m[role].frozen
        self.m[role].freeze()
        rows = torch.arange(min(self.engine.batch_size, len(stage.compare)))
        batch = stage.compare.batch(rows, 0).to(self.runtime.device)
        numbers = dict(self.evaluate(self.m)) if self.evaluate is not None and role == stage.role else {}
        outputs = self.m[role](batch)
        if not frozen:
            self.m[role].unfreeze()
        return outputs, numbers

    def _collect(self, stage: Collect) -> Artefact:
        if self.out is None:
            folder = Path(tempfile.mkdtemp(prefix="limbeck-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
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
        self.identity = self._identity()
        if self.out is None or self.checkpoints is None:
            return None
        if self.runtime.rank == 0:
            self._claim(self.out)
        self.runtime.barrier()
        found = self.checkpoints.latest(self.progress.say)
        if found is None:
            self.history.load({"rows": 0, "window": {}, "time": 0.0})
            return None
        name, roles, state = found
        self.last_good = str(self.checkpoints.folder / name)
        self._kept = list(state["results"])
        return roles, state

    def _claim(self, out: Path) -> None:
        path = out / "run.json"
        if path.exists():
            before = json.loads(path.read_text())["identity"]
            for key, value in self.identity.items():
                if before.get(key) != value and key != "id":
                    raise UsageError(
                        "the run folder holds another run", where=out, found=f"{key} = {before.get(key)}",
                        expected=f"{key} = {value}", fix="choose another `out`, or delete the folder",
                    )  # fmt: skip
        self._note("running")

    def _identity(self) -> dict[str, Any]:
        """What makes this run this run; a resume must agree in all of it."""
        method = self.method
        settings: dict[str, Any] = asdict(method) if is_dataclass(method) else {}
        engine = {f.name: getattr(self.engine, f.name) for f in fields(self.engine) if f.name not in _FREE}
        named = getattr(self.data, "__dict__", {}) if self.data is not None else {}
        sources = {k: v for k, v in named.items() if isinstance(v, Source)}
        identity = {
            "method": f"{type(method).__module__}.{type(method).__qualname__}",
            "method fields": json.loads(json.dumps(settings, default=str)),
            "engine": json.loads(json.dumps(engine, default=list)),
            "optim": {k: str(v) for k, v in self.optim.items()},
            "data": {k: v.fingerprint() for k, v in sources.items()},
            "roles": {n: hashlib.sha256(str(digest(r.module)).encode()).hexdigest()[:16] for n, r in self.m.items()},
        }
        identity["id"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return identity

    def _note(self, status: str) -> None:
        if self.out is None or self.runtime.rank:
            return
        packages = {name: version(name) for name in ("limbeck", "torch", "numpy")}
        info = {
            "status": status,
            "seconds": round(self.history.elapsed(), 1),
            "seed": self.engine.seed,
            "versions": {**packages, "python": platform.python_version()},
            "machine": {
                "system": platform.platform(),
                "device": str(self.runtime.device),
                "processes": self.runtime.world,
            },
            "changed": time.strftime("%Y-%m-%d %H:%M:%S"),
            "identity": self.identity,
        }
        write_text(self.out / "run.json", json.dumps(info, indent=1, default=str) + "\n")

    def _restore(self, saved: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Rebuild the roles as they were, with their weights, and put counters and random states back."""
        from limbeck.convert.record import rebuild

        roles, state = saved
        self.m.lineage.update(state["lineage"])
        for name, origin in state["lineage"].items():
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


def difference(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """How far apart the outputs of a module before and after a conversion are.

    Args:
        before: `[B, ...]`.
        after: `[B, ...]`, of the same shape.

    Returns:
        The largest difference, the norm of the difference over that of the outputs, and the share of equal answers (largest
        output along the last dimension); nothing where the shapes differ.

    Example:
        >>> difference(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]]))
        {'max_abs_difference': 0.5, 'relative_difference': 0.1, 'agreement': 1.0}
    """
    if before.shape != after.shape:
        return {}
    before, after = before.double(), after.double()
    gap = after - before
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    relative = gap.norm() / before.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "max_abs_difference": gap.abs().max().item(),
        "relative_difference": relative.item(),
        "agreement": same.item(),
    }


def _digest(folder: Path) -> str:
    """The hash of all files of a folder and their names."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
