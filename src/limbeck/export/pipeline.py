"""Few-step students as pipelines of diffusers, which `from_pretrained` loads."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import UsageError, require
from limbeck.diffusion.sampler import Experts, Sampler
from limbeck.export.cards import write_card

_PARTS = ("unet", "transformer")
# By whether the student is a flow, and by its noise.
_KINDS = {
    False: {"fresh": "LCMScheduler", "ddim": "DDIMScheduler"},
    True: {"fresh": "FlowMatchLCMScheduler", "ddim": "FlowMatchEulerDiscreteScheduler"},
}


def to_pipeline(
    student: nn.Module, pipeline: Any, path: str | os.PathLike[str], results: Mapping[str, Any] | None = None
) -> Path:
    """Write a pipeline with the student's network in the place of its own, and a scheduler that takes the student's steps.

    `DiffusionPipeline.from_pretrained(path)` loads it; its `README.md` has the call. As many `num_inference_steps` must be given
    as the student has, a number that pipelines do not store, and a `guidance_scale` of 1, for guidance is in the weights. But
    for flows, steps are whole timesteps in diffusers: those of a student whose times lie between two are rounded down.

    Args:
        student: A `Denoiser`, or a `Sampler` with `fresh` or `ddim` noise, around a network of the pipeline's kind; adapters are
            merged.
        pipeline: The teacher's pipeline, with text encoder and autoencoder; not changed.
        path: The folder.
        results: Content of the run's `metrics.json`, for the card.

    Raises:
        UsageError: The student holds no network of that kind, or several experts; its steps are not those that the scheduler
            can take; or the pipeline has a scheduler of its own.

    Returns:
        The folder.
    """
    from limbeck.convert.lora import MergeLora

    diffusers = require("diffusers", extra="fewstep")
    if any(isinstance(part, Experts) for part in student.modules()):
        raise UsageError(
            "a pipeline of diffusers has room for one network", where="student", found="several experts",
            fix="sample with the student itself, or write each expert by its own",
        )  # fmt: skip
    name = next((part for part in _PARTS if getattr(pipeline, part, None) is not None), None)
    own: Any = None if name is None else getattr(pipeline, name)
    whole, _ = MergeLora()(student)
    found = next((m for m in whole.modules() if own is not None and type(m) is type(own)), None)
    if name is None or found is None:
        raise UsageError(
            "the student holds no network of the pipeline's kind", where="student", found=type(student).__name__,
            expected="a module around a " + type(own).__name__ if own is not None else "a pipeline with a unet or transformer",
        )  # fmt: skip
    # Without the notes that diffusers keeps of what was a default, which would then be that of the new kind.
    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    scheduler = _scheduler(diffusers, student, config)
    made = type(pipeline)(**{**pipeline.components, name: found, "scheduler": scheduler})
    if type(made.scheduler) is not type(scheduler):
        raise UsageError(
            "this kind of pipeline takes another scheduler", where=type(made).__name__, found=type(made.scheduler).__name__,
            expected=type(scheduler).__name__, fix="train with noise=ddim, or give a pipeline that leaves its scheduler as it is",
        )  # fmt: skip
    made.save_pretrained(path, safe_serialization=True)
    steps = student.steps if isinstance(student, Sampler) else 1
    write_card(path, Path(path).name, results or {}, _load(type(made), Path(path).name, steps), library="diffusers")
    return Path(path)


def _load(kind: type, name: str, steps: int) -> str:
    """Python that loads a pipeline and calls it as the student is to be called."""
    known: Any = inspect.signature(kind.__call__).parameters
    words = ['"a photograph of a lighthouse"'] if "prompt" in known else []
    words += ["class_labels=[0]"] if "class_labels" in known else []
    words += [f"num_inference_steps={steps}", *(["guidance_scale=1.0"] if "guidance_scale" in known else [])]
    return (
        f"from diffusers import {kind.__name__}\n\n"
        f'pipeline = {kind.__name__}.from_pretrained("{name}")\n'
        f"samples = pipeline({', '.join(words)})"
    )


def _scheduler(diffusers: Any, student: nn.Module, config: dict[str, Any]) -> Any:
    """What takes the student's steps, made of the pipeline's own settings, and tried.

    Raises:
        UsageError: There is no such scheduler.
    """
    denoiser: Any = student.denoiser if isinstance(student, Sampler) else student
    times, noise = [denoiser.schedule.last], "fresh"
    if isinstance(student, Sampler):
        times, noise = [float(t) for t in student.times], student.noise if student.steps > 1 else "fresh"
    flow = denoiser.prediction == "flow_prediction"
    settings: dict[str, Any] = {"prediction_type": denoiser.prediction, "clip_sample": False, "thresholding": False}
    settings |= {"set_alpha_to_one": True, "timestep_spacing": "trailing", "original_inference_steps": len(times)}
    if flow:  # evenly from 1 to the last time
        last = times[-1] if len(times) > 1 else None
        settings = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": last}
    if noise in _KINDS[flow]:
        kind = getattr(diffusers, _KINDS[flow][noise])
        known = set(inspect.signature(kind).parameters)
        settings = {name: value for name, value in settings.items() if name in known}
        tried = kind.from_config(config, **settings)
        tried.set_timesteps(len(times))
        if all(abs(denoiser.time_scale * t - float(s)) < 1 for t, s in zip(times, tried.timesteps, strict=True)):
            return kind.from_config(config, **settings)
    raise UsageError(
        "diffusers has no scheduler for these steps", where="student.times, student.noise",
        found=f"{[round(t, 3) for t in times]}, {noise}",
        expected="even steps from 1 on, of a flow also two uneven ones, with noise fresh or ddim",
        fix="train with start=1 and noise=fresh, or sample with the student itself",
    )  # fmt: skip
