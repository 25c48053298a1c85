"""What a recipe needs, found with fake tensors: shapes, parameters, FLOPs, memory, hours; no weights and no GPU."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from limbeck.core.source import Source
from limbeck.core.stages import Train
from limbeck.engine.settings import Engine
from limbeck.plan.fake import Fake, cached, fake_batch, fake_roles
from limbeck.plan.gpus import GPUS, Gpu, find_gpu
from limbeck.plan.memory import Memory
from limbeck.plan.program import prepare_roles, sample, total_steps, training_stages
from limbeck.plan.report import LAUNCH, Plan, RoleCost, StageCost
from limbeck.plan.trace import explained, shard, trace_stage
from limbeck.teachers.cached import Cached

if TYPE_CHECKING:
    from limbeck.core.recipe import Recipe
    from limbeck.job import Job
    from limbeck.plan.draft import Draft

__all__ = ["GPUS", "Gpu", "Memory", "Plan", "RoleCost", "StageCost", "plan_job", "plan_recipe"]

# The share of a data sheet's peak that convolutional and small models reach in eager PyTorch.
UTILISATION = {"fp32": 0.5, "bf16": 0.25, "fp16": 0.25}


def plan_recipe(
    recipe: Recipe, gpu: str = "a100-80gb", utilisation: float | None = None, samples: int | None = None
) -> Plan:
    """Plan a recipe: models are made without weights, and nothing is downloaded.

    Args:
        recipe: The recipe.
        gpu: The GPU to plan for, a name in `GPUS`.
        utilisation: The share of its peak that the hours assume, in (0, 1]. Default: 0.5 in fp32, 0.25 in 16 bits.
        samples: Training samples, where the data are not on this machine; without it, the hours are not known then.

    Raises:
        UsageError: Shapes or dtypes do not fit, a name is not known, or the recipe does not say what missing data look like.

    Example:
        >>> from limbeck.core.recipe import Recipe
        >>> method = {"name": "kd", "label_weight": 0.5}
        >>> tree = {"teacher": "timm:resnet10t", "student": "timm:test_resnet", "data": "folder/of/images", "method": method}
        >>> plan = plan_recipe(Recipe.parse(tree | {"engine": {"batch_size": 8}}), gpu="t4", samples=1000)
        >>> plan.fits, plan.stages[0].steps, [role.output for role in plan.stages[0].roles]
        (True, 1250, ['float32[8, 1000]', 'float32[8, 1000]'])
    """
    from limbeck.plan.draft import draft

    return plan_job(draft(recipe, samples), gpu, utilisation)


def plan_job(job: Job | Draft, gpu: str = "a100-80gb", utilisation: float | None = None) -> Plan:
    """Run one step of each training stage on fake tensors.

    Hours = steps x the larger of FLOPs / (peak of the GPU x utilisation) and operations x 10 µs. An update that a method
    makes every few steps is counted in all of them.

    Args:
        job: A job, as `limbeck.api.build` makes it; not changed.
        gpu: The GPU to plan for, a name in `GPUS`.
        utilisation: The share of its peak that the hours assume, in (0, 1]. Default: 0.5 in fp32, 0.25 in 16 bits.

    Raises:
        UsageError: Shapes or dtypes do not fit, or the GPU is not known.
    """
    card = find_gpu(gpu)
    share = UTILISATION[job.engine.precision] if utilisation is None else utilisation
    notes = list(getattr(job, "notes", ()))
    stages = _trace(job, job.engine, notes)
    needed = max(map(_needed, stages), default=0)
    rate = card.peak(job.engine.precision) * share
    seconds = tuple(max(s.flops / rate, s.operations * LAUNCH) for s in stages)
    hours = sum(math.inf if s.steps is None else s.steps * t / 3600 for s, t in zip(stages, seconds, strict=True))
    if job.engine.precision == "bf16" and not card.bfloat16:
        notes.append(f"{card.name} does not compute in bfloat16: set engine.precision=fp16")
    if job.engine.shard:
        notes.append("a sharded role gathers one part at a time: that memory is not counted")
    if job.engine.compile:
        notes.append("compiled roles usually need less memory than this")
    return Plan(
        stages=tuple(stages),
        gpu=card,
        devices=job.engine.processes,
        precision=job.engine.precision,
        utilisation=share,
        needed=needed,
        fits=needed <= card.memory,
        seconds=seconds,
        hours=hours if math.isfinite(hours) else None,
        advice=() if needed <= card.memory else _advice(job, stages, card),
        notes=tuple(notes),
    )


def _trace(job: Any, engine: Engine, notes: list[str]) -> list[StageCost]:
    """The cost of each training stage under these settings."""
    fake, costs = Fake(), list[StageCost]()
    m = fake_roles(job.roles, fake)
    for stage in training_stages(job.method, m, job.data, notes, fake):
        seen = sample(stage.data, engine.batch_size, torch.Generator().manual_seed(engine.seed))
        steps = total_steps(stage, engine, getattr(job, "counted", True))
        m.step, m.epoch, m.total = 0, 0, steps or 0
        with fake():
            prepare_roles(stage, m)
            parts = _parts(stage, seen, engine)
            stored = job.taught is not None or job.recipe.cache is not None
            live = [name for name, role in m.teachers.items() if not isinstance(role.module, Cached)]
            if stored and live:
                notes.append("the teacher's outputs are stored once before training: that pass is not counted")
                for name in live:
                    setattr(m, name, cached(m[name], parts[0]))
            if not costs and not m.lineage:  # the method's check is about the models as they are given
                with explained(stage, parts[0], {}), suppress(DataDependentOutputException):
                    job.method.check(m, parts[0])
            cost = trace_stage(job.method, m, stage, parts, job.optim, engine)
        memory = shard(cost.memory, m, stage, engine) if engine.shard else cost.memory
        costs.append(replace(cost, memory=memory, steps=steps))
    return costs


def _parts(stage: Train, seen: Any, engine: Engine) -> list[Any]:
    """The fake micro-batches of one device, of full size."""
    if not seen.fields():
        return [seen] * engine.micro_batches
    whole = min(engine.batch_size, len(stage.data)) if isinstance(stage.data, Source) else len(seen)
    return list(fake_batch(seen, math.ceil(whole / engine.processes)).split(engine.micro_batches))


def _needed(stage: StageCost, parts: float = 1) -> int:
    """Bytes that a GPU must have for a stage, were each micro-batch cut into `parts`."""
    memory = stage.memory
    held = memory.peak - memory.activations + memory.activations / parts
    if parts > 1:  # then gradients are held while the next part is computed
        held += sum(4 * r.parameters for r in stage.roles if r.learns) - memory.gradients
    return int(1.1 * held + 1e9)


def _advice(job: Any, stages: list[StageCost], card: Gpu) -> tuple[str, ...]:
    engine, advice = job.engine, []
    if engine.precision == "fp32":
        half = "bf16" if card.bfloat16 else "fp16"
        needed = max(map(_needed, _trace(job, replace(engine, precision=half), [])))
        enough = "enough" if needed <= card.memory else "not enough alone"
        advice.append(f"engine.precision={half} needs about {needed / 1e9:.1f} GB, {enough}")
    parts = 2
    while engine.batch_size >= engine.micro_batches * parts * engine.processes:
        needed = max(_needed(stage, parts) for stage in stages)
        if needed <= card.memory:
            count = engine.micro_batches * parts
            limit = "losses over the batch and batch normalisation then see a part at a time"
            advice.append(f"engine.micro_batches={count} needs about {needed / 1e9:.1f} GB; {limit}")
            break
        parts *= 2
    needed = max(map(_needed, stages))
    larger = [gpu.name for gpu in sorted(GPUS.values(), key=lambda g: g.memory) if gpu.memory >= needed]
    if larger:
        advice.append(f"as it is, it fits on {larger[0]}")
    if not advice:
        advice.append("spread the large roles over several GPUs: engine.processes and engine.shard")
    return tuple(advice)
