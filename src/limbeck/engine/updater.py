"""Executes the updates of one step: backward, reduction over processes, clipping, optimizer, schedule, averages."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import RunError, UsageError
from limbeck.core.method import Method, updates
from limbeck.core.optim import Optim, OptimSpec
from limbeck.core.roles import Roles, sharded
from limbeck.core.stages import Train
from limbeck.core.update import Update
from limbeck.engine.runtime import Runtime
from limbeck.engine.settings import Engine

Logs = dict[str, Tensor]
Program = Generator[Update, None, None]


class Updater:
    """Runs a stage's step program on the micro-batches of one step.

    Args:
        m: The roles; those of the stage are ready to learn.
        stage: The stage.
        optim: The run's optimizer settings by role, for roles to which the stage gives none.
        method: Whose hooks are called.
        engine: The settings.
        runtime: The machine.
    """

    def __init__(
        self, m: Roles, stage: Train, optim: Mapping[str, OptimSpec], method: Method, engine: Engine, runtime: Runtime
    ) -> None:
        assert stage.step is not None
        self.m, self.stage, self.step_program, self.method, self.runtime = m, stage, stage.step, method, runtime
        self.specs: dict[str, OptimSpec] = {
            role: spec or optim.get(role) or Optim() for role, spec in stage.roles.items()
        }
        self.sole = next(iter(stage.roles)) if len(stage.roles) == 1 else None
        self.hooked = type(method).after_update is not Method.after_update
        self.device_type = runtime.device.type
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.precision)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.scalers: dict[str, torch.amp.GradScaler] = {}
        self.params: dict[str, list[nn.Parameter]] = {}
        self.base_lr: dict[str, list[float]] = {}
        self.count = dict.fromkeys(self.specs, 0)
        self.moves = dict.fromkeys(stage.ema, 0)
        self.pending: set[str] = set()
        for role in self.specs:
            self.prepare(role)
            if engine.precision == "fp16":
                self.scalers[role] = torch.amp.GradScaler(self.device_type)

    def prepare(self, role: str) -> None:
        """Build the role's optimizer over its present parameters; state of parameters that stayed is kept."""
        module, spec = self.m[role].module, self.specs[role]
        params = [p for p in module.parameters() if p.requires_grad]
        if not params:
            raise UsageError("a role that shall learn has no parameter that requires a gradient", where=f"roles.{role}")
        old = self.optimizers.get(role)
        optimizer = self.method.optimizer(self.m, role, spec) if isinstance(spec, Optim) else spec(module)
        if old is not None:
            optimizer.state.update({p: old.state[p] for p in params if p in old.state})
        self.optimizers[role], self.params[role] = optimizer, params
        if isinstance(spec, Optim):
            self.m._rates[role] = lambda step: spec.factor(*self.stage.at(step, self.m.total))
        self.base_lr[role] = [self.stage.lr_factor * group["lr"] for group in optimizer.param_groups]

    def step(self, batches: list[Batch], whole: int) -> Logs:
        """One step of the program on this process's micro-batches of a batch of `whole` samples; returns what to log.

        The programs of all micro-batches run in lock-step: each reaches the same yield, gradients add, the role is updated
        once, then all go on.
        """
        programs = [updates(self.step_program, self.m, batch, self.sole) for batch in batches]
        shares = [1.0] if self.runtime.world == 1 == len(batches) else [len(b) / whole for b in batches]
        logs: Logs = {}
        try:
            while True:
                done = self._round(programs, shares, whole, logs)
                if done:
                    return logs
        finally:
            self.m.lead = True
            for program in programs:
                program.close()
            for role in self.pending:
                self.optimizers[role].zero_grad(set_to_none=True)
            self.pending.clear()

    def _round(self, programs: list[Program], shares: list[float], whole: int, logs: Logs) -> bool:
        """Advance all programs to their next yield and carry it out; True when they have ended."""
        first: Update | None = None
        counts: list[Any] = []
        terms: list[tuple[str, Tensor, Any]] = []
        held: list[Tensor | None] | None = None
        for i, (program, share) in enumerate(zip(programs, shares, strict=True)):
            if len(programs) > 1:
                self.m.lead = i == 0
            update = self._advance(program)
            if i == 0:
                first = update
                if update is not None and update.role not in self.optimizers:
                    raise UsageError(
                        "an update names a role that does not learn in this stage",
                        where=f"stage '{self.stage.name}', {line_of(program)}",
                        found=update.role,
                        expected=f"one of {', '.join(self.optimizers)}",
                    )
                if (
                    update is not None
                    and update.loss is not None  # one that only applies has nothing to add to what is held
                    and update.role in self.pending
                    and (update.count is not None or self.runtime.world > 1)
                ):
                    held = [p.grad for p in self.params[update.role]]
                    self.optimizers[update.role].zero_grad(set_to_none=True)
            if (update is None) != (first is None) or (update and first and update.role != first.role):
                raise RunError("micro-batches disagree about the next update", where=line_of(program))
            if update is None or update.loss is None or first is None:
                continue
            weight: Any = (
                share if update.count is None or len(shares) * self.runtime.world == 1 else update.count / whole
            )
            counts.append(update.count)
            self._backward(update, weight, program)
            terms.append((f"loss/{update.role}", update.loss.detach(), weight))
            terms.extend((name, value.detach(), weight) for name, value in update.logs.items())
        if first is None:
            return True
        scale = self._count_scale(counts, whole) if counts else None
        if counts:
            self._collect(first.role, scale, held)
        logs |= _weighted(terms, scale)  # a role that is updated twice in a step shows its last loss
        if first.apply:
            self._apply(first.role, logs)
        else:
            self.pending.add(first.role)
        return False

    def _advance(self, program: Program) -> Update | None:
        """Run a program to its next yield under the precision of the run, and check the modes it left."""
        with torch.autocast(self.device_type, self.half) if self.half else nullcontext():
            update = next(program, None)
            cast = torch.is_autocast_enabled(self.device_type)
        leak = None if torch.is_grad_enabled() else "torch.no_grad()"
        if cast != (self.half is not None):
            leak = "torch.autocast"
        if leak:
            where = line_of(program)
            program.close()
            torch.set_grad_enabled(True)
            raise UsageError(
                f"an update is yielded inside {leak}", where=where, fix="move the yield out of the with block"
            )
        return update

    def _backward(self, update: Update, weight: Any, program: Program) -> None:
        loss: Any = update.loss
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) and loss.ndim else "a loss without a graph"
            raise UsageError(
                f"the loss of '{update.role}' cannot be differentiated",
                where=line_of(program),
                found=found if isinstance(loss, Tensor) else type(loss).__name__,
                expected="a scalar tensor that depends on the role's parameters",
                fix="check for .detach(), torch.no_grad() or a missing reduction",
            )
        if not (isinstance(weight, float) and weight == 1.0):
            loss = loss * weight
        divided = self.runtime.world > 1 and sharded(self.m[update.role].module)
        if divided:
            loss = loss * self.runtime.world  # sharded gradients are averaged by the reduce-scatter
        if update.role in self.scalers:
            loss = self.scalers[update.role].scale(loss)
        if self.sole or not divided:
            torch.autograd.backward(loss, inputs=None if self.sole else self.params[update.role])
            return
        # The leaves of this graph are not the role's own parameters but what was gathered of them.
        others = [p for role, params in self.params.items() if role != update.role for p in params]
        kept = [p.grad for p in others]
        loss.backward()
        for p, gradient in zip(others, kept, strict=True):
            p.grad = gradient

    def _count_scale(self, counts: list[Any], whole: int) -> Tensor | None:
        """What turns `count / whole` weights into shares of the global count; None when there is nothing to turn."""
        if counts[0] is None or len(counts) * self.runtime.world == 1:
            return None
        total = torch.stack([torch.as_tensor(c, dtype=torch.float32, device=self.runtime.device) for c in counts]).sum()
        self.runtime.add([total])
        return whole / total

    def _collect(self, role: str, scale: Tensor | None, held: list[Tensor | None] | None) -> None:
        """Make the gradient of the role the global one, and add what earlier updates left."""
        params = self.params[role]
        if self.count[role] == 0 and role not in self.pending and all(p.grad is None for p in params):
            raise UsageError(
                "a role received no gradient",
                where=f"stage '{self.stage.name}', roles.{role}",
                expected="a loss that depends on its parameters",
                fix="is the forward pass of another module used, or something detached?",
            )
        if scale is None and self.runtime.world == 1 and held is None:
            return
        if self.runtime.world > 1 and not sharded(self.m[role].module):
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in params if p.grad is not None]
        if scale is not None:
            torch._foreach_mul_(grads, scale)
        if not sharded(self.m[role].module):
            self.runtime.add(grads)
        for p, before in zip(params, held or [], strict=False):
            if before is not None:
                p.grad = before if p.grad is None else p.grad.add_(before)

    def _apply(self, role: str, logs: Logs) -> None:
        optimizer, spec = self.optimizers[role], self.specs[role]
        scaler = self.scalers.get(role)
        self.pending.discard(role)
        if isinstance(spec, Optim):
            factor = spec.factor(*self.stage.at(self.m.step, self.m.total))
            for group, lr in zip(optimizer.param_groups, self.base_lr[role], strict=True):
                group["lr"] = lr * factor
            if spec.clip is not None:
                if scaler:
                    scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(self.params[role], spec.clip)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                # Each process holds the whole norm, and logs are summed over processes.
                logs[f"train/grad_norm/{role}"] = norm / self.runtime.world
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.count[role] += 1
        for name, ema in self.stage.ema.items():
            if ema.of == role and ema.every == "step":
                self.average(name)
        if self.hooked:
            self.method.after_update(self.m, role)
            self.refresh()

    def average(self, name: str) -> None:
        """Move an averaged role."""
        ema = self.stage.ema[name]
        ema.move(self.m[name].module, self.m[ema.of].module, self.moves[name])
        self.moves[name] += 1

    def refresh(self) -> None:
        """New optimizers for roles that a hook has converted, and new averages of them."""
        for role in self.m._converted & self.specs.keys():
            module = self.m[role].module
            self.runtime.place(module, shard=False)
            module.train()
            self.prepare(role)
            for name, ema in self.stage.ema.items():
                if ema.of == role:
                    setattr(self.m, name, copy.deepcopy(module))
                    self.m[name].freeze()
        self.m._converted.clear()

    def rates(self) -> dict[str, float]:
        """The present learning rate of each role."""
        return {f"train/lr/{role}": o.param_groups[0]["lr"] for role, o in self.optimizers.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        states = {r: self.runtime.optimizer_state(self.m[r].module, o) for r, o in self.optimizers.items()}
        scalers = {role: scaler.state_dict() for role, scaler in self.scalers.items()}
        return {"optimizers": states, "scalers": scalers, "count": self.count, "moves": self.moves}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint's state."""
        for role, saved in state["optimizers"].items():
            self.runtime.load_optimizer(self.m[role].module, self.optimizers[role], saved)
        for role, saved in state["scalers"].items():
            self.scalers[role].load_state_dict(saved)
        self.count, self.moves = dict(state["count"]), dict(state["moves"])


def _weighted(terms: list[tuple[str, Tensor, Any]], scale: Tensor | None) -> Logs:
    """The weighted sum over micro-batches of each quantity."""
    sums: Logs = {}
    for name, value, weight in terms:
        value = value if isinstance(weight, float) and weight == 1.0 else value * weight
        value = value if scale is None else value * scale
        sums[f"train/{name}"] = sums[f"train/{name}"] + value if f"train/{name}" in sums else value
    return sums


def line_of(program: Any) -> str:
    """The file and line at which a program is suspended."""
    while getattr(program, "gi_yieldfrom", None) is not None:
        program = program.gi_yieldfrom
    frame = getattr(program, "gi_frame", None)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "the end of the step"
