"""The training stages of a program, reached without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import LimbeckError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Artefact, Choice, Collect, Convert, Search, Stage, Train
from limbeck.engine.feed import Feed, as_batch
from limbeck.engine.settings import Engine
from limbeck.plan.fake import tensors_of

# A plan makes batches below this size whole; of others it reads two samples, and stretches them.
_WHOLE = 64 * 2**20


def training_stages(
    method: Method,
    m: Roles,
    data: Any,
    notes: list[str],
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Train]:
    """The training stages of a program, its conversions done on the way.

    Collections are not made and searches take their first candidate; `notes` says so in words.

    Args:
        method: The program.
        m: The roles; conversions change them.
        data: What the program is given.
        notes: What is not exact is added here.
        inside: Where conversions are done.

    Yields:
        Each stage that trains by steps.
    """
    program, answer, guessed = method.stages(m, data), None, ""
    collected: list[str] = []
    while True:
        try:
            stage = program.send(answer)
        except StopIteration:
            break
        except LimbeckError:
            raise
        except Exception as error:
            if not guessed:
                raise
            notes.append(f"what follows stage '{guessed}' needs its result, and was not looked at ({error})")
            break
        if isinstance(stage, Train) and stage.step is not None:
            yield stage
            answer = {}
        else:
            with inside():
                answer = _pass(stage, m, notes)
            guessed = guessed if isinstance(stage, Convert) else stage.name
            collected += [f"'{stage.name}'"] if isinstance(stage, Collect) else []
    if collected:
        notes.append(f"what is collected ({', '.join(collected)}) is not counted: neither time nor memory")


def _pass(stage: Stage, m: Roles, notes: list[str]) -> Any:
    if isinstance(stage, Convert):
        return m.convert(stage.role, stage.how, stage.of)
    if isinstance(stage, Search):
        notes.append(f"stage '{stage.name}' searches: its first candidate was taken")
        candidate = next(iter(stage.candidates))
        return Choice(candidate, 0.0, ((candidate, 0.0),))
    if isinstance(stage, Collect):
        return Artefact(None, stage.example, "")
    notes.append(f"stage '{stage.name}' owns its loop: its time and memory are not counted")
    return {}


def prepare_roles(stage: Train, m: Roles) -> None:
    """Put the roles into the modes of a stage, as the engine does: learning, frozen, averaged."""
    for name, ema in stage.ema.items():
        if name not in m:
            setattr(m, name, Role(name, copy.deepcopy(m[ema.of].module), m[ema.of].preprocess))
    for name in (*stage.roles, *stage.frozen):
        m[name]  # a missing role is an error that names it
    for name, role in m.items():
        if name in stage.roles:
            role.unfreeze()
            role.module.train()
        else:
            role.freeze()


def total_steps(stage: Train, engine: Engine, counted: bool = True) -> int | None:
    """Steps of a stage, as the engine counts them; None for endless or uncounted data without a number of steps."""
    per_epoch = Feed(stage.data, engine, world=engine.processes).epoch_steps() if counted else None
    steps = stage.steps or (None if stage.epochs is not None else engine.steps)
    if steps is None and per_epoch is not None:
        steps = math.ceil((engine.epochs if stage.epochs is None else stage.epochs) * per_epoch)
    return stage.share(steps) if steps and stage.steps is None else steps


def sample(data: Any, count: int, generator: torch.Generator, whole: int = _WHOLE) -> Batch:
    """About `count` random samples of a stage's data, as one batch.

    Args:
        data: What a training stage is given as data.
        count: Samples wanted.
        generator: Chooses them.
        whole: Bytes above which two samples must do.

    Returns:
        A batch of real tensors; empty where a stage has no data.
    """
    if isinstance(data, Source):
        rows = torch.randperm(len(data), generator=generator)[:count]
        few = data.batch(rows[:2], 0)
        return few if _bytes(few) / len(few) * len(rows) > whole else data.batch(rows, 0)
    if data is None:
        return Batch()
    return as_batch(next(iter(data))) if hasattr(data, "__iter__") else data(0, generator)


def _bytes(batch: Batch) -> int:
    return sum(t.nbytes for t in tensors_of(batch))
