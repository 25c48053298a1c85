"""Runs a training stage, from any point of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import Interrupted, RunError, UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Train
from limbeck.engine.feed import Feed, Position
from limbeck.engine.updater import Updater

if TYPE_CHECKING:
    from limbeck.engine.run import Run


class Training:
    """One training stage of a run.

    Args:
        run: The run it belongs to.
        stage: The stage.
    """

    def __init__(self, run: Run, stage: Train) -> None:
        self.run, self.stage, self.m, self.engine = run, stage, run.m, run.engine
        self.m._converted.clear()  # of stages before: only what changes from here on needs new optimizers and averages
        self.at = Position()
        self.own: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self.bad = 0
        self.metrics: dict[str, float] = {}
        self._prepare_roles()
        select = run.method.select if type(run.method).select is not Method.select else None
        self.feed = Feed(stage.data, self.engine, run.runtime.rank, run.runtime.world, select)
        self.m.step = self.m.epoch = 0
        self.m.total = self._total()
        self.updater = None
        if stage.step is not None:
            self.updater = Updater(self.m, stage, run.optim, run.method, self.engine, run.runtime)
        self.layout = torch.channels_last if self.engine.channels_last else None

    def _prepare_roles(self) -> None:
        stage, m = self.stage, self.m
        for name, ema in stage.ema.items():
            if name not in m:
                m[ema.of].unfreeze()
                setattr(m, name, Role(name, copy.deepcopy(m[ema.of].module), m[ema.of].preprocess))
                m.lineage[name] = m.lineage.get(ema.of, {"base": ema.of, "records": []})
        for name in (*stage.roles, *stage.frozen):
            m[name]  # a missing role is an error that names it
        for name, role in m.items():
            if name in stage.roles:
                role.unfreeze()
                role.module.train()
                self.run.changed.add(name)
            else:
                role.freeze()
            if self.engine.channels_last:
                role.module.to(memory_format=torch.channels_last)
            self.run.runtime.place(role.module, shard=name in self.engine.shard and name in stage.roles)
            if name in self.engine.compile and role.forward is role.module:
                role.forward = torch.compile(role.module)
        self.run.changed.update(stage.ema)
        self.frozen = {n: digest(r.module) for n, r in m.items() if r.frozen and n not in stage.ema}

    def _total(self) -> int:
        stage, engine, per_epoch = self.stage, self.engine, self.feed.epoch_steps()
        if per_epoch == 0:
            raise UsageError(
                "the data have no batch", where=f"stage '{stage.name}'", found=f"{len(stage.data)} samples",
                expected="at least micro_batches x processes samples",
            )  # fmt: skip
        steps = stage.steps or (None if stage.epochs is not None else engine.steps)
        if steps is None and per_epoch is not None:
            epochs = engine.epochs if stage.epochs is None else stage.epochs
            steps = math.ceil(epochs * per_epoch)
        if steps is None and stage.run is None:
            raise UsageError(
                "endless data needs a number of steps", where=f"stage '{stage.name}'", fix="set engine.steps"
            )
        return stage.share(steps) if steps and stage.steps is None else steps or 0

    # The loop

    def execute(self) -> dict[str, float]:
        """Train to the end of the stage; returns the last evaluation."""
        run, stage = self.run, self.stage
        run.progress.stage(stage.name, self.m.total or None, self.m.step)
        if stage.run is not None:
            self._own_loop(stage.run)
        else:
            self._loop()
        run.history.drain(stage.name, run.last_good)
        if self.metrics.get("step") != self.m.step and self._evaluate():
            self._keep_best()
        self._check_end()
        if self.engine.restore == "best" and self.best is not None:
            run.load_roles(self.best["checkpoint"])
        return {k: v for k, v in self.metrics.items() if k != "step"}

    def _loop(self) -> None:
        m, run = self.m, self.run
        assert self.updater is not None
        device = run.runtime.device
        while m.step < m.total and not self._exhausted():
            m.epoch = self.at.epoch
            for whole, parts in self.feed.epoch(m, self.at):
                if m.step >= m.total:
                    break
                parts = [batch.to(device, self.layout) for batch in parts] if self._moves else parts
                logs = self.updater.step(parts, whole)
                m.step += 1
                self.at.batch += 1
                self._after_step(logs)
            else:
                self._after_epoch()
                if self._stop_early():
                    break

    @property
    def _moves(self) -> bool:
        return self.run.runtime.device.type != "cpu" or self.layout is not None

    def _exhausted(self) -> bool:
        """Whether the epochs asked for are done, although selection made them shorter than planned."""
        by_steps = self.stage.steps or (self.stage.epochs is None and self.engine.steps)
        return self.feed.select is not None and not by_steps and self.at.epoch >= self._epochs()

    def _epochs(self) -> float:
        return self.engine.epochs if self.stage.epochs is None else self.stage.epochs

    def _own_loop(self, loop: Callable[[Roles, Any, dict[str, Any]], Iterator[Mapping[str, Any]]]) -> None:
        for values in loop(self.m, self.stage.data, self.own):
            self.m.step += 1
            tensors = {k: v if isinstance(v, Tensor) else torch.tensor(float(v)) for k, v in values.items()}
            self._after_step({f"train/{k}": v for k, v in tensors.items()})

    def _after_step(self, logs: dict[str, Tensor]) -> None:
        run, engine, step = self.run, self.engine, self.m.step
        run.history.note(step, logs)
        run.progress.step(step)
        if step == 1:
            self._check_frozen()
        if step % engine.log_every == 0:
            run.history.drain(self.stage.name, run.last_good)
            run.history.emit(self.stage.name, step, self.at.epoch, **self._rates())
        if engine.checkpoint_every and step % engine.checkpoint_every == 0:
            self.checkpoint()
        if run.signal.caught(run.runtime, step, engine.log_every):
            name = self.checkpoint()
            raise Interrupted(
                f"stopped by {run.signal.name}; nothing is lost", where=f"stage '{self.stage.name}', step {step}",
                found=f"checkpoint {name}", fix="run the same command again to go on",
            )  # fmt: skip

    def _after_epoch(self) -> None:
        run, method = self.run, self.run.method
        self.at = Position(epoch=self.at.epoch + 1)
        self.m.epoch = self.at.epoch
        for name, ema in self.stage.ema.items():
            if ema.every == "epoch" and self.updater is not None:
                self.updater.average(name)
        method.after_epoch(self.m, self.at.epoch)
        if self.updater is not None:
            self.updater.refresh()
        every = self.engine.evaluate_every
        if every and self.at.epoch % every == 0 and self._evaluate():
            self._keep_best()
        run.history.drain(self.stage.name, run.last_good)

    def _evaluate(self) -> bool:
        """Evaluate, write a row; whether it is the best so far."""
        run, method, m = self.run, self.run.method, self.m
        evaluate = self.stage.evaluate or run.evaluate
        run.history.drain(self.stage.name, run.last_good)
        if evaluate is None:
            run.history.emit(self.stage.name, m.step, self.at.epoch, **self._rates())
            self.metrics = {"step": m.step}
            return False
        method.before_evaluate(m)
        modes = {part: part.training for name in self.stage.roles for part in m[name].module.modules()}
        for name in self.stage.roles:
            m[name].module.eval()
        try:
            with torch.no_grad():
                metrics = {name: float(value) for name, value in evaluate(m).items()}
        finally:
            for part, mode in modes.items():
                part.training = mode
        row = {f"val/{name}": value for name, value in metrics.items()}
        run.history.emit(self.stage.name, m.step, self.at.epoch, **self._rates(), **row)
        self.metrics = {**metrics, "step": m.step}
        return self._is_best(metrics)

    def _keep_best(self) -> None:
        self.best = {**(self.best or {}), "checkpoint": self.checkpoint_name()}
        self.checkpoint()

    def _is_best(self, metrics: dict[str, float]) -> bool:
        monitor = self.engine.monitor or next(iter(metrics), None)
        if monitor is None:
            return False
        if monitor not in metrics:
            raise UsageError(
                "the metric to monitor is not measured",
                where="engine.monitor",
                found=monitor,
                expected=", ".join(metrics),
            )
        value = metrics[monitor] if self.engine.mode == "max" else -metrics[monitor]
        if self.best is not None and value <= self.best["value"]:
            self.bad += 1
            return False
        self.bad = 0
        self.best = {"value": value, "metric": monitor, "step": self.m.step, "epoch": self.at.epoch, "metrics": metrics}
        return True

    def _stop_early(self) -> bool:
        if self.engine.patience is None or self.bad < self.engine.patience:
            return False
        self.run.progress.say(
            f"{self.stage.name}: no improvement in {self.bad} evaluations, stopped at step {self.m.step}"
        )
        return True

    def _rates(self) -> dict[str, float]:
        return self.updater.rates() if self.updater is not None else {}

    # Checks

    def _check_frozen(self) -> None:
        for name, role in self.m.items():
            if not role.frozen:
                continue
            where = f"stage '{self.stage.name}', roles.{name}"
            if any(part.training for part in role.module.modules()):
                raise RunError("a frozen role is in train mode", where=where, fix="do not set .training on it")
            if any(p.requires_grad or p.grad is not None for p in role.module.parameters()):
                raise RunError("a gradient reached a frozen role", where=where, fix="do not call requires_grad_ on it")

    def _check_end(self) -> None:
        if self.stage.run is None or self.m.step:
            self._check_frozen()
        for name, before in self.frozen.items():
            if digest(self.m[name].module) != before:
                raise RunError("a frozen role has changed", where=f"stage '{self.stage.name}', roles.{name}")
        if self.updater is None:
            return
        idle = [role for role, count in self.updater.count.items() if count == 0]
        if idle:
            raise RunError(
                "a role that should learn was never updated", where=f"stage '{self.stage.name}', roles.{idle[0]}",
                fix="does the step yield an Update for it?",
            )  # fmt: skip

    # State

    def checkpoint_name(self) -> str:
        """The name that a checkpoint taken now has."""
        return f"{self.run.index:02d}-{self.stage.name}-{self.m.step:08d}"

    def checkpoint(self) -> str:
        """Save the run as it is now."""
        self.run.history.drain(self.stage.name, self.run.last_good)
        return self.run.save(self.checkpoint_name(), self.state(), {self.best["checkpoint"]} if self.best else set())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this stage."""
        own = {k: {**v.state_dict()} if hasattr(v, "state_dict") else v for k, v in self.own.items()}
        return {
            "step": self.m.step,
            "at": [self.at.epoch, self.at.batch, self.at.rows],
            "updater": self.updater.state() if self.updater is not None else None,
            "best": self.best,
            "bad": self.bad,
            "metrics": self.metrics,
            "own": own,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; the roles are loaded already."""
        self.m.step, self.at = state["step"], Position(*state["at"])
        self.m.epoch = self.at.epoch
        self.best, self.bad, self.own = state["best"], state["bad"], dict(state["own"])
        self.metrics = state["metrics"]
        if self.updater is not None:
            self.updater.load(state["updater"])


def digest(module: nn.Module) -> list[int]:
    """A number for each tensor of a module that changes when its bits do; computed where the tensor is."""
    tensors = [t.detach().contiguous().reshape(-1) for t in (*module.parameters(), *module.buffers()) if t.numel()]
    flat = [
        t if len(t) > 1 else t.clone(memory_format=torch.contiguous_format) for t in tensors
    ]  # one may have stride 0
    return [_digest(t.view(_WORDS[min(t.element_size(), 8)])) for t in flat]


def _digest(words: Tensor) -> int:
    """Sum and exclusive or of a tensor's words `[N]`: the latter alone does not see equal numbers change in pairs."""
    return (int(words.sum(dtype=torch.int64).item()) << 64) + int(torch.hash_tensor(words).item())


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
