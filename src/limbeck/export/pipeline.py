"""Few-step students as pipelines of diffusers, which `from_pretrained` loads."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import UsageError, require
from limbeck.diffusion.denoiser import EDMDenoiser
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
    as the student has, a number that pipelines do not store, and a `guidance_scale` of 1, for guidance is in the weights; for a
    student that starts before the end of its schedule also the noise, in its size there. But for flows, steps are whole timesteps
    in diffusers: those of a student whose times lie between two are rounded down. Two experts by time go into a pipeline with a
    `transformer_2`, as Wan's.

    Args:
        student: A `Denoiser`, or a `Sampler` with `fresh` or `ddim` noise, around a network of the pipeline's kind; adapters are
            merged. An `EDMDenoiser` needs a `ConsistencyModelPipeline`, whose scheduler has its preconditioning.
        pipeline: The teacher's pipeline, with text encoder and autoencoder; not changed.
        path: The folder.
        results: Content of the run's `metrics.json`, for the card.

    Raises:
        UsageError: The student holds no network of that kind, or experts for which there is no place; its steps are not those
            that the scheduler can take, or its table of noise is another; or the pipeline has a scheduler of its own.

    Returns:
        The folder.
    """
    from limbeck.convert.lora import MergeLora

    diffusers = require("diffusers", extra="fewstep")
    _fitting(student, pipeline)
    whole, _ = MergeLora()(student)
    networks = _networks(whole, pipeline)
    # Without the notes that diffusers keeps of what was a default, which would then be that of the new kind.
    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    scheduler = _scheduler(diffusers, student, config)
    known = inspect.signature(type(pipeline)).parameters
    own = {name: value for name, value in pipeline.config.items() if name in known}  # settings beside the parts
    made = type(pipeline)(**{**own, **pipeline.components, **networks, "scheduler": scheduler})
    if type(made.scheduler) is not type(scheduler):
        raise UsageError(
            "this kind of pipeline takes another scheduler", where=type(made).__name__, found=type(made.scheduler).__name__,
            expected=type(scheduler).__name__, fix="train with noise=ddim, or give a pipeline that leaves its scheduler as it is",
        )  # fmt: skip
    call = _load(made, Path(path).name, student)
    made.save_pretrained(path, safe_serialization=True)
    write_card(path, Path(path).name, results or {}, call, library="diffusers")
    return Path(path)


def _fitting(student: nn.Module, pipeline: Any) -> None:
    """Refuse experts and preconditionings for which the kind of pipeline has no place."""
    kind = type(pipeline)
    for part in student.modules():
        two = isinstance(part, Experts) and len(part.experts) == 2 and part.bounds is not None
        if isinstance(part, Experts) and not (two and "transformer_2" in inspect.signature(kind).parameters):
            raise UsageError(
                "this pipeline of diffusers has room for one network", where="student",
                found=f"{len(part.experts)} experts by {'class' if part.bounds is None else 'time'}",
                expected="one network, or two by time for a pipeline with a transformer_2",
                fix="sample with the student itself, or write each expert by its own",
            )  # fmt: skip
        if isinstance(part, EDMDenoiser) and kind.__name__ != "ConsistencyModelPipeline":
            raise UsageError(
                "this kind of pipeline does not know the preconditioning of EDM", where="pipeline", found=kind.__name__,
                expected="ConsistencyModelPipeline(unet=..., scheduler=CMStochasticIterativeScheduler())",
            )  # fmt: skip


def _networks(student: nn.Module, pipeline: Any) -> dict[str, Any]:
    """The student's networks by the names under which the pipeline is to hold them."""
    name = next((part for part in _PARTS if getattr(pipeline, part, None) is not None), None)
    own: Any = None if name is None else getattr(pipeline, name)
    experts = next((part for part in student.modules() if isinstance(part, Experts)), None)
    sides: list[nn.Module] = [student] if experts is None else list(experts.experts)
    found = [next((m for m in side.modules() if own is not None and type(m) is type(own)), None) for side in sides]
    if name is None or None in found:
        raise UsageError(
            "the student holds no network of the pipeline's kind", where="student", found=type(student).__name__,
            expected="a module around a " + type(own).__name__ if own is not None else "a pipeline with a unet or transformer",
        )  # fmt: skip
    networks: dict[str, Any] = {name: found[0]}
    if "transformer_2" in inspect.signature(type(pipeline)).parameters:
        networks |= {"transformer_2": None, "boundary_ratio": None}
        if experts is not None and experts.bounds is not None:
            networks |= {"transformer_2": found[1], "boundary_ratio": float(experts.bounds[0]) / experts.schedule.last}
    return networks


def _steps(student: nn.Module) -> tuple[Any, list[float], str]:
    """The denoiser, or the first of several, with the times of the steps and their noise."""
    denoiser: Any = student.denoiser if isinstance(student, Sampler) else student
    first: Any = denoiser.experts[0] if isinstance(denoiser, Experts) else denoiser
    if not isinstance(student, Sampler):
        return first, [first.schedule.last], "fresh"
    return first, [float(t) for t in student.times], student.noise if student.steps > 1 else "fresh"


def _load(pipeline: Any, name: str, student: nn.Module) -> str:
    """Python that loads a pipeline and calls it as the student is to be called."""
    kind, (denoiser, times, noise) = type(pipeline), _steps(student)
    known: Any = inspect.signature(kind.__call__).parameters
    words = ['"a photograph of a lighthouse"'] if "prompt" in known else []
    labelled = "class_labels" in known and pipeline.unet.config.num_class_embeds
    words += ["class_labels=[0]"] if labelled else []
    words += [f"num_inference_steps={len(times)}", *(["guidance_scale=1.0"] if "guidance_scale" in known else [])]
    size = float(denoiser.schedule.begin(torch.ones(1, 1), torch.tensor(times[:1])))
    lines = [f"from diffusers import {kind.__name__}", "", f'pipeline = {kind.__name__}.from_pretrained("{name}")']
    if abs(size - float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0))) > 1e-4:
        if "latents" not in known:
            raise _none(times, noise)
        net = getattr(pipeline, "unet", None) or pipeline.transformer
        shape = [1, net.config.in_channels, *[net.config.sample_size] * 2]
        lines = [
            "import torch",
            *lines,
            f"noise = torch.randn{tuple(shape)}  # at the start of these steps it is smaller",
        ]
        words.append(f"latents={size:.6f} * noise")
    return "\n".join([*lines, f"samples = pipeline({', '.join(words)})"])


def _none(times: list[float], noise: str) -> UsageError:
    return UsageError(
        "diffusers has no scheduler for these steps", where="student.times, student.noise",
        found=f"{[round(t, 3) for t in times]}, {noise}",
        expected="even steps from 1 on (fresh: from above 0.5 on), of a flow also shifted ones; of an EDM one step",
        fix="train with start=1 and noise=fresh, or sample with the student itself",
    )  # fmt: skip


def _scheduler(diffusers: Any, student: nn.Module, config: dict[str, Any]) -> Any:
    """What takes the student's steps, made of the pipeline's own settings, and tried.

    Raises:
        UsageError: There is no such scheduler.
    """
    denoiser, times, noise = _steps(student)
    if isinstance(denoiser, EDMDenoiser):
        return _preconditioned(diffusers, denoiser, times, noise)
    flow = denoiser.prediction == "flow_prediction"
    if noise not in _KINDS[flow]:
        raise _none(times, noise)
    kind = getattr(diffusers, _KINDS[flow][noise])
    settings: dict[str, Any] = {"prediction_type": denoiser.prediction, "clip_sample": False, "thresholding": False}
    settings |= {"set_alpha_to_one": True, "timestep_spacing": "trailing", "timestep_scaling": 1e4}  # no boundary
    if flow:
        shift, last = _shift(times)
        settings = {"shift": shift, "use_dynamic_shifting": False, "shift_terminal": last}
    known = set(inspect.signature(kind).parameters)
    settings = {name: value for name, value in settings.items() if name in known}
    wanted = [denoiser.time_scale * t for t in times]
    for more in _originals(wanted[0], config) if "original_inference_steps" in known else [{}]:
        made = kind.from_config(config, **settings, **more)
        if len(times) > more.get("original_inference_steps", len(times)):
            continue
        made.set_timesteps(len(times))
        if all(abs(t - float(s)) < (0.01 if flow else 1) for t, s in zip(wanted, made.timesteps, strict=True)):
            made = kind.from_config(config, **settings, **more)
            denoiser.check_table(made)
            return made
    raise _none(times, noise)


def _originals(first: float, config: Mapping[str, Any]) -> list[dict[str, int]]:
    """Steps of LCM's own grid, of which a scheduler takes every few, that have this timestep as their first."""
    count = config.get("num_train_timesteps", 1000)
    last = int(first + 1e-2) + 1
    return [{"original_inference_steps": n} for n in range(1, count + 1) if count // n * n == last]


def _shift(times: list[float]) -> tuple[float, float | None]:
    """The shift with which a scheduler of flows goes from 1 to the last time by way of the others, and that time.

    It shifts even steps from 1 to m and stretches the result to end where told: `1 - t_i` is `i / (1 - b i)` times a number, with
    `b = (1 - 1 / shift) (1 - m) / (N - 1)`, where `m` is a thousandth, shifted.
    """
    count = len(times)
    if count < 3 or any(t >= 1 for t in times[1:]):
        return 1.0, times[-1] if count > 1 else None
    first, last = 1 / (1 - times[1]), (count - 1) / (1 - times[-1])  # i / (1 - t_i), a line in i
    slope = (last - first) / (count - 2)
    share, shift = -slope / (first - slope) * (count - 1), 1.0
    for _ in range(50):
        least = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        shift = 1 / max(1 - share / (1 - least), 1e-6)
    return shift, times[-1]


def _preconditioned(diffusers: Any, denoiser: EDMDenoiser, times: list[float], noise: str) -> Any:
    """The scheduler of consistency models, at whose least noise of 0 the boundary is EDM's own."""
    settings = {
        "sigma_min": 0.0,
        "sigma_max": times[0],
        "sigma_data": denoiser.schedule.data,
        "rho": denoiser.schedule.rho,
    }
    # Of one step it asks for two, to divide by their number less one.
    if len(times) > 1 or noise != "fresh":
        raise _none(times, noise)
    return diffusers.CMStochasticIterativeScheduler(num_train_timesteps=2, clip_denoised=False, **settings)
