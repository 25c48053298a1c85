"""How many steps fit into a time."""

from __future__ import annotations

import math
import re
import tempfile
import time
from copy import deepcopy
from dataclasses import replace

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.engine.run import execute
from limbeck.job import Job

_SHARE = 0.04  # of the time, for trying how long a step takes
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
    fixed, step = _step_time(job, _SHARE * seconds, judging)
    left = _MARGIN * (seconds - (time.perf_counter() - began)) - fixed - judging
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


def _step_time(job: Job, patience: float, judging: float) -> tuple[float, float]:
    """Seconds of a run besides its steps, and seconds of one step with its share of evaluations and checkpoints."""
    _try(job, 1)  # pays for what is loaded once
    began = time.perf_counter()
    fixed = _try(job, 1)
    if fixed > patience:
        return 0.0, fixed
    more = 1
    while (total := _try(job, 1 + more)) < 2 * fixed and time.perf_counter() - began < patience:
        more *= 4
    # Where the steps are lost in the noise, they are taken to cost all of it: too few are better than too many.
    step = (total - fixed) / more if total >= 2 * fixed else total / (1 + more)
    per_epoch = max(1, len(job.data.train) / job.engine.batch_size)
    if job.evaluate is not None and job.engine.evaluate_every and more < per_epoch:  # no evaluation was seen yet
        judged = job.data.get("test") or job.data["validation"]
        step += judging * len(job.data["validation"]) / len(judged) / per_epoch / job.engine.evaluate_every
    return fixed, step


def _try(job: Job, steps: int) -> float:
    """Seconds that a run of so many steps takes, on copies of what learns."""
    frozen = set(job.method.frozen)
    copies = {
        name: Role(name, role.module if name in frozen else deepcopy(role.module), role.preprocess)
        for name, role in job.roles.items()
    }
    engine = replace(job.engine, steps=steps, trackers=())
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        execute(job.method, Roles(**copies), job.data, engine, optim=job.optim, evaluate=job.evaluate, out=out)
    return time.perf_counter() - began
