"""One step of a training stage on fake tensors: what it costs, and where it does not fit together."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from limbeck.core.adapt import main_output
from limbeck.core.batch import Batch, _shape
from limbeck.core.errors import LimbeckError, UsageError
from limbeck.core.method import Method
from limbeck.core.optim import OptimSpec
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Train
from limbeck.engine.runtime import Plain
from limbeck.engine.settings import Engine
from limbeck.engine.updater import Updater
from limbeck.plan.fake import tensors_of
from limbeck.plan.memory import Memory, MemoryTracker
from limbeck.plan.report import RoleCost, StageCost


def trace_stage(
    method: Method, m: Roles, stage: Train, parts: list[Batch], optim: Mapping[str, OptimSpec], engine: Engine
) -> StageCost:
    """Run one step of a stage, as it is once the optimizers have their state.

    Args:
        method: Whose hooks run.
        m: Fake roles in the modes of the stage; changed.
        stage: The stage, with a step.
        parts: The fake micro-batches of one device.
        optim: Optimizers by role, for roles to which the stage gives none.
        engine: The settings; a loss scale is left out, since it looks at values.

    Returns:
        The cost; its steps are not known here.

    Raises:
        UsageError: Shapes or dtypes do not fit; names the role, the module or line, and the tensors.
    """
    engine = replace(engine, precision="bf16") if engine.precision == "fp16" else engine
    whole = sum(map(_size, parts))
    outputs: dict[str, str] = {}
    flops, parts_flops = dict.fromkeys(m, 0), dict.fromkeys(m, 0)
    with (
        MemoryTracker() as tracker,
        ExitStack() as hooks,
        explained(stage, parts[0], outputs),
    ):
        for name, role in m.items():
            tracker.label("parameters", chain(role.module.parameters(), role.module.buffers()))
            hooks.enter_context(_watched(name, role.module, tracker, flops, outputs))
            for part in role.module.children():
                hooks.enter_context(_watched(name, part, tracker, parts_flops))
        tracker.label("batch", chain.from_iterable(map(tensors_of, parts)))
        updater = Updater(m, stage, optim, method, engine, Plain(torch.device("cpu")))
        for name, optimizer in updater.optimizers.items():
            _label_optimizer(tracker, optimizer, updater.params[name])
        if updater.hooked:  # a hook may convert a role at the first step
            updater.step(parts[:1], _size(parts[0]))
        start, before = tracker.now, tracker.flops
        flops.update(dict.fromkeys(m, 0))
        parts_flops.update(dict.fromkeys(m, 0))
        updater.step(parts, whole)
    for name in m:  # a program may call the parts of a model, such as an encoder, and never the whole
        if name not in outputs and parts_flops[name]:
            flops[name], outputs[name] = parts_flops[name], "called in parts"
    costs = tuple(
        RoleCost(
            name,
            type(role.module).__name__,
            name in stage.roles,
            sum(p.numel() for p in role.module.parameters()),
            flops[name],
            outputs.get(name, "not called"),
        )
        for name, role in m.items()
    )
    total = tracker.flops - before
    return StageCost(stage.name, repr(parts[0]), costs, total, tracker.now - start, tracker.peak(start), None)


def shard(memory: Memory, m: Roles, stage: Train, engine: Engine) -> Memory:
    """The memory of one device when the roles of `engine.shard` are spread over the processes."""
    names = [name for name in stage.roles if name in engine.shard]
    sizes = {name: sum(p.nbytes for p in m[name].module.parameters()) for name in stage.roles}
    everything = sum(sizes.values()) or 1
    share = sum(sizes[name] for name in names) * (1 - 1 / engine.processes)
    return replace(
        memory,
        parameters=memory.parameters - int(share),
        gradients=int(memory.gradients * (1 - share / everything)),
        optimizer=int(memory.optimizer * (1 - share / everything)),
    )


@contextmanager
def explained(stage: Train, batch: Batch, outputs: Mapping[str, str]) -> Iterator[None]:
    """Turn what torch says about a failure in a step into an error that names the role, the place and the tensors."""
    try:
        yield
    except LimbeckError as error:
        role, place = _place(error, stage)
        if role is None:
            raise
        where = place if error.where is None else f"{place}: {error.where}"
        raise type(error)(error.what, where=where, found=error.found, expected=error.expected, fix=error.fix) from error
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UsageError(
            "the step looks at the value of a tensor, and a plan knows shapes only",
            where=_place(error, stage)[1],
            found=str(getattr(error, "func", error)),
            fix="keep the decision on the device (torch.where), or run the first step with limbeck doctor",
        ) from error
    except Exception as error:
        role, place = _place(error, stage)
        given = ", ".join(f"{k} {_shape(v)}" for k, v in batch.fields().items())
        said = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        returned = "".join(f"; {name} returned {shape}" for name, shape in outputs.items())
        raise UsageError(
            f"the role '{role}' cannot take this input" if role else f"stage '{stage.name}' cannot combine its tensors",
            where=place,
            found=f"{said}; batch {given}{'' if role else returned}",
            fix="let model and data agree in shape and dtype"
            if role
            else "let the roles' outputs and the labels agree",
        ) from error


def _size(batch: Batch) -> int:
    return len(batch) if batch.fields() else 1


def _label_optimizer(tracker: MemoryTracker, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    known: set[int] = set()

    def before(*_: Any) -> None:
        learned = [p for p in params if p.grad is not None]
        tracker.label("gradients", [p.grad for p in learned if p.grad is not None])
        if {id(p) for p in learned} - known:  # a step that is not counted, so that it is as a later one
            known.update(map(id, learned))
            with tracker.before():
                optimizer.step()

    def after(*_: Any) -> None:
        states = (value for state in optimizer.state.values() for value in state.values())
        tracker.label("optimizer", (value for value in states if isinstance(value, Tensor)))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


@contextmanager
def _watched(
    name: str, module: nn.Module, tracker: MemoryTracker, flops: dict[str, int], outputs: dict[str, str] | None = None
) -> Iterator[None]:
    """Add the FLOPs of a role's forward passes, or of a part's, and note what they return."""

    def before(*_: Any) -> None:
        flops[name] -= tracker.flops

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        flops[name] += tracker.flops
        if outputs is not None and output is not None:  # None of a pass that stopped on the way
            outputs[name] = _shape(main_output(output))

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _place(error: BaseException, stage: Train) -> tuple[str | None, str]:
    """The role in whose call an error arose and the path of the module in it; else the file and line of the step."""
    role: Role | None = None
    path, line = "", f"stage '{stage.name}'"
    file = getattr(getattr(stage.step, "__code__", None), "co_filename", None)
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Role):
            role, path = owner, ""
        elif role is not None and isinstance(owner, nn.Module):
            path = next((name for name, part in role.module.named_modules() if part is owner), path)
        elif role is None and frame.f_code.co_filename == file:
            line = f"{Path(file).name}, line {number}"
    if role is None:
        return None, line
    part = role.module.get_submodule(path)
    return role.name, f"{role.name}.{path} ({type(part).__name__})" if path else f"{role.name} ({type(part).__name__})"
