"""How many steps fit into a time."""

from __future__ import annotations

import math
import re
import time
from copy import deepcopy
from dataclasses import replace

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.engine.run import execute
from limbeck.job import Job

_SHARE = 0.05  # of the time, for trying how long a step takes
_MARGIN = 0.95  # of the time is planned for: machines get slower when they are hot or shared
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(budget: str | float) -> float:
    """A time in seconds.

    Args:
        budget: Seconds, or a number with `s`, `m` or `h`.

    Raises:
        UsageError: It is not a time above 0.

    Example:
        >>> seconds_of("2m"), seconds_of("1.5h"), seconds_of(20)
        (120.0, 5400.0, 20.0)
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([smh]?)", str(budget).strip())
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if not seconds > 0:
        raise UsageError(
            "this is not a budget of time",
            where="budget",
            found=budget,
            expected="seconds, or a number with s, m or h, such as 90s, 2m or 1h",
        )
    return seconds


def steps_within(job: Job, seconds: float, judging: float) -> int:
    """The number of steps of each stage that fit into a time, found by a few steps on copies of the models.

    Args:
        job: What will run.
        seconds: Time that is left for everything.
        judging: Seconds that judging the student on the test data takes.

    Raises:
        UsageError: Not one step fits, or the run has several processes.
    """
    if job.engine.processes > 1:
        raise UsageError("a budget of time needs one process", where="budget", fix="set engine.steps in its place")
    began = time.perf_counter()
    first = _try(job, 1)
    more = max(1, min(200, int(_SHARE * seconds / first)))
    step = max(1e-5, (_try(job, 1 + more) - first) / more)
    left = _MARGIN * (seconds - (time.perf_counter() - began)) - judging
    if job.evaluate is not None:
        validation, train = len(job.data["validation"]), len(job.data.train)
        tested = len(job.data.get("test") or job.data["validation"])
        check = judging * validation / tested
        left -= check
        if job.engine.evaluate_every:
            step += check / max(1, train / job.engine.batch_size * job.engine.evaluate_every)
    steps = math.floor(left / step)
    if steps < 1:
        raise UsageError(
            "the budget is too short for one step",
            where="budget",
            found=f"{seconds:.1f} s left after loading and judging",
            expected=f"at least {seconds - left + step:.1f} s",
            fix="give more time, or fewer data",
        )
    return steps


def _try(job: Job, steps: int) -> float:
    """Seconds that a run of so many steps takes, on copies of what learns."""
    frozen = set(job.method.frozen)
    copies = {
        name: Role(name, role.module if name in frozen else deepcopy(role.module), role.preprocess)
        for name, role in job.roles.items()
    }
    engine = replace(job.engine, steps=steps, checkpoint_every=0, evaluate_every=0, trackers=(), log_every=steps)
    began = time.perf_counter()
    execute(job.method, Roles(**copies), job.data, engine, optim=job.optim)
    return time.perf_counter() - began
