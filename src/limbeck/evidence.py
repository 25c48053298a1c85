"""The numbers of a run: teacher, student before and student after, on data that training never sees."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck import __version__
from limbeck.checks import first_batch
from limbeck.core.files import write_text
from limbeck.core.registry import name_of
from limbeck.core.roles import Role, Roles
from limbeck.evaluate import cost
from limbeck.evaluate.generation import Generation
from limbeck.job import Job

_CALL = 32  # samples of the call that throughput is measured on


@dataclass
class Evidence:
    """What `metrics.json` holds, as far as it is known.

    Args:
        models: Numbers by model: `teacher`, `student_before`, `student`.
        seconds: Time that judging the student took.
    """

    models: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def begin(cls, job: Job) -> Evidence:
        """Judge the teacher and the student before training; an earlier start of the run has done that."""
        path = job.out / "metrics.json"
        earlier = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
        evidence = cls({name: earlier[name] for name in ("teacher", "student_before") if name in earlier})
        if "teacher" in job.roles and "teacher" not in earlier:
            evidence.models["teacher"] = _judge(job, job.roles, "teacher") | _costs(job, job.roles.teacher)
        if "student_before" not in earlier:
            began = time.perf_counter()
            evidence.models["student_before"] = _judge(job, job.roles, "student")
            evidence.seconds = time.perf_counter() - began
        if job.stored:  # they are of the training data alone
            for judge in filter(None, (job.evaluate, job.test)):
                judge.judge(job.roles, "teacher")
        return evidence

    def write(self, job: Job, **more: Any) -> None:
        """Write `metrics.json` into the run's folder."""
        metrics = {
            "task": job.test.task if job.test is not None else "",
            "primary": job.test.primary if job.test is not None else "",
            "models": self.models,
            "candidates": [],
            "data": {name: len(source) for name, source in job.data.items()},
            "lineage": _lineage(job),
            "environment": environment(job),
        }
        write_text(job.out / "metrics.json", json.dumps(metrics | more, indent=1) + "\n")

    def finish(self, job: Job, roles: Roles, seconds: float) -> None:
        """Judge the student after training, and write `metrics.json` whole."""
        numbers, costs = _judge(job, roles, "student"), _costs(job, roles.student)
        self.models["student"] = numbers | costs
        candidate = {"name": job.recipe.student, "metrics": numbers, **costs, "seconds": seconds, "chosen": True}
        lineage = _lineage(job) | {"conversions": roles.lineage.get("student", {}).get("records", [])}
        if made := getattr(roles.student.module, "info", {}).get("made"):  # of a condensed set
            lineage["made"] = made
        self.write(job, candidates=[candidate], lineage=lineage, seconds=seconds)


def environment(job: Job) -> dict[str, Any]:
    """The machine and the versions that a job's numbers were measured with."""
    return machine(next((p.device for _, r in job.roles.items() for p in r.module.parameters()), torch.device("cpu")))


def machine(device: torch.device) -> dict[str, Any]:
    """This machine and its versions."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}
    versions = {"limbeck": __version__, "torch": torch.__version__, "python": platform.python_version()}
    system = {"system": platform.platform(), "processor": platform.processor() or platform.machine()}
    return {**versions, **system, "device": str(device), **gpu, "threads": torch.get_num_threads()}


def _judge(job: Job, roles: Roles, role: str) -> dict[str, float]:
    return {} if job.test is None else job.test.judge(roles, role)


def _costs(job: Job, role: Role) -> dict[str, float]:
    """Parameters, bytes, and samples per second of one call where the role reads the data."""
    size: dict[str, float] = {"parameters": cost.parameters(role.module)[0], "bytes": cost.size_bytes(role.module)}
    if job.method.reads is not None and role.name not in job.method.reads:
        return size
    device = next((p.device for p in role.module.parameters()), torch.device("cpu"))
    batch = first_batch(job.data.get("test") or job.data.train, _CALL).to(device)
    with cost.evaluating(role.module):
        speed = cost.throughput(lambda: role(batch), len(batch), warmup=1, repeats=5, device=device)
    calls = job.test.calls(role.name) if isinstance(job.test, Generation) else 1
    return {**size, "throughput": speed / calls}


def _lineage(job: Job) -> dict[str, Any]:
    recipe = job.recipe
    specs = {"teacher": recipe.teacher, "student": recipe.student, "data": recipe.data}
    x = first_batch(job.data.train).x
    parts = {"x": x} if isinstance(x, Tensor) else dict(x) if isinstance(x, Mapping) else {}
    inputs = {name: [str(t.dtype).removeprefix("torch."), *t.shape[1:]] for name, t in parts.items()}
    return {**specs, "method": name_of(type(job.method)), "seed": job.engine.seed, "input": inputs}
