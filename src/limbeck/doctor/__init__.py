"""What will go wrong with a job, before it does: every check with the fix in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import getdoc
from typing import TYPE_CHECKING

import torch

from limbeck.data.seeding import isolated
from limbeck.doctor import data, diffusion, models, training
from limbeck.doctor.exam import Exam, Skip
from limbeck.doctor.finding import Diagnosis, Finding

if TYPE_CHECKING:
    from limbeck.job import Job

__all__ = ["CHECKS", "Diagnosis", "Exam", "Finding", "diagnose"]

CHECKS: Mapping[str, Callable[[Exam], Finding | None]] = {
    check.__name__: check
    for check in (
        data.inputs,
        data.labels,
        models.shapes,
        models.method,
        models.classes,
        models.class_order,
        models.vocabulary,
        models.normalisation,
        models.teacher_skill,
        models.modes,
        diffusion.prediction,
        diffusion.sample_scale,
        diffusion.guidance,
        training.first_loss,
        training.gradient_leaks,
        training.unused_parameters,
        training.dead_terms,
        training.no_op,
        training.learning_rate,
    )
}


def diagnose(job: Job, samples: int = 64) -> Diagnosis:
    """Examine a job's first training stage on one batch, in float32.

    Everything is done on copies: models, modes, gradients and the global random state stay as they were.

    Args:
        job: A job, as `limbeck.api.build` makes it.
        samples: Samples of the batch, at most; the run's batch size where that is smaller.

    Returns:
        A finding for each check.

    Raises:
        UsageError: The program has no stage that trains by steps.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with isolated(), torch.random.fork_rng(devices):
        exam = Exam(job, samples)
        return Diagnosis(tuple(_judge(name, check, exam) for name, check in CHECKS.items()))


def _judge(name: str, check: Callable[[Exam], Finding | None], exam: Exam) -> Finding:
    try:
        finding = check(exam)
    except Skip as reason:
        return Finding(name, "skipped", str(reason))
    return finding or Finding(name, "ok", (getdoc(check) or "").splitlines()[0])
