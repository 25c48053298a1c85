"""Few-step students as pipelines of diffusers, which `from_pretrained` loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import UsageError, require
from limbeck.diffusion.sampler import Sampler

_PARTS = ("unet", "transformer")


def to_pipeline(student: nn.Module, pipeline: Any, path: str | os.PathLike[str]) -> Path:
    """Write a pipeline with the student's network in the place of its own, and a scheduler that takes the student's steps.

    `DiffusionPipeline.from_pretrained(path)` loads it; call it with as many `num_inference_steps` as the student has, and a
    `guidance_scale` of 1, for guidance is in the weights. Steps are whole timesteps, as diffusers has them: those of a student
    whose times lie between two are rounded down.

    Args:
        student: A `Denoiser`, or a `Sampler` with `fresh` noise, around a network of the pipeline's kind, of epsilon, sample or
            v-prediction; adapters are merged.
        pipeline: The teacher's pipeline, with text encoder and autoencoder; not changed.
        path: The folder.

    Raises:
        UsageError: The student holds no network of that kind, or its steps are not those that the scheduler can take.

    Returns:
        The folder.
    """
    from limbeck.convert.lora import MergeLora

    diffusers = require("diffusers", extra="fewstep")
    name = next((part for part in _PARTS if getattr(pipeline, part, None) is not None), None)
    own: Any = None if name is None else getattr(pipeline, name)
    whole, _ = MergeLora()(student)
    found = next((m for m in whole.modules() if own is not None and type(m) is type(own)), None)
    if name is None or found is None:
        raise UsageError(
            "the student holds no network of the pipeline's kind", where="student", found=type(student).__name__,
            expected="a module around a " + type(own).__name__ if own is not None else "a pipeline with a unet or transformer",
        )  # fmt: skip
    times = [1.0] if not isinstance(student, Sampler) else [float(t) / student.schedule.last for t in student.times]
    count = len(times)
    even = all(abs(t - (1 - i / count)) < 1e-4 for i, t in enumerate(times))
    if not even or (isinstance(student, Sampler) and count > 1 and student.noise != "fresh"):
        raise UsageError(
            "diffusers has no scheduler for these steps", where="student.times, student.noise",
            found=f"{[round(t, 3) for t in times]}", expected="even steps from 1 on, with fresh noise between them",
            fix="train with start=1 and noise=fresh, or sample with the student itself",
        )  # fmt: skip
    denoiser: Any = student.denoiser if isinstance(student, Sampler) else student
    scheduler = diffusers.LCMScheduler.from_config(
        pipeline.scheduler.config, original_inference_steps=count, prediction_type=denoiser.prediction,
        clip_sample=False, thresholding=False, set_alpha_to_one=True,
    )  # fmt: skip
    made = type(pipeline)(**{**pipeline.components, name: found, "scheduler": scheduler})
    made.save_pretrained(path, safe_serialization=True)
    return Path(path)
