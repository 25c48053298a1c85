"""Diffusion and flow models in one notation: schedules, denoisers, guidance, sampling, and teachers that are exact."""

from limbeck.diffusion.denoiser import Denoiser, EDMDenoiser
from limbeck.diffusion.draws import Draws
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.intervals import add_more_noise, interval_gradient, interval_loss, interval_target
from limbeck.diffusion.mixture import GaussianMixture, grid, ring, scattered
from limbeck.diffusion.objectives import dmd_gradient, sid_loss, surrogate
from limbeck.diffusion.sampler import Experts, Sampler
from limbeck.diffusion.sampling import few_step, flow
from limbeck.diffusion.schedule import EDM, Cosine, RectifiedFlow, Schedule, Table

__all__ = [
    "EDM",
    "Cosine",
    "Denoiser",
    "Draws",
    "EDMDenoiser",
    "Experts",
    "GaussianMixture",
    "RectifiedFlow",
    "Sampler",
    "Schedule",
    "Table",
    "add_more_noise",
    "dmd_gradient",
    "few_step",
    "flow",
    "grid",
    "guided",
    "interval_gradient",
    "interval_loss",
    "interval_target",
    "ring",
    "scattered",
    "sid_loss",
    "surrogate",
]
