"""What a generator is judged by: samples beside real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.core.files import aside
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.data.ids import normals
from limbeck.diffusion.sampling import flow
from limbeck.diffusion.schedule import Schedule
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.samples import density_and_coverage, energy_distance, frechet_distance

SAMPLES = "samples.safetensors"
_STEPS = 50  # of the teacher


class Generation:
    """Judges generators by as many samples as there are real ones, of the same classes: `coverage` and `density` of the real
    samples, `energy_distance` and `frechet_distance` to them, all of the samples as they are, flattened.

    A student is called once for each sample, in which call a `Sampler` takes all its steps; a teacher goes along its flow in 50
    steps. The noise is always the same.

    Args:
        source: Real samples, with labels where the models have classes.
        batch_size: Samples of one call.

    Example:
        >>> from limbeck.data import TensorSource
        >>> from limbeck.diffusion import ring
        >>> evaluate = Generation(TensorSource(ring(8).sample(200, torch.Generator().manual_seed(0))))
        >>> numbers = evaluate.judge(Roles(teacher=ring(8)), "teacher")
        >>> numbers["coverage"] > 0.9, numbers["energy_distance"] < 0.05
        (True, True)
    """

    task, primary = "generation", "coverage"

    def __init__(self, source: Source, batch_size: int = 256) -> None:
        self.source, self.batch_size = source, batch_size
        self._real: Tensor | None = None

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        if self._real is None:
            self._real = torch.cat([self.source.batch(rows, 0).x for rows in self.rows(len(self.source))])
        made = self.generate(m[role], len(self.source))
        near = density_and_coverage(self._real, made)
        return {
            "coverage": near["coverage"],
            "density": near["density"],
            "energy_distance": energy_distance(made, self._real),
            "frechet_distance": frechet_distance(made, self._real),
        }

    @torch.no_grad()
    def generate(self, role: Role, count: int) -> Tensor:
        """The role's samples `[N, ...]` for the classes of the first `count` real ones."""
        device = next((p.device for p in role.module.parameters()), torch.device("cpu"))
        parts = []
        with evaluating(role.module), torch.random.fork_rng():
            torch.manual_seed(0)  # for noise that is added between steps
            for rows in self.rows(count):
                batch = self.source.batch(rows, 0)
                noise = normals(batch.id, batch.x[0].numel()).view_as(batch.x).to(device, torch.float32)
                condition = batch.get("y")
                condition = None if condition is None else condition.to(device)
                parts.append(self._call(role, noise, condition).float().cpu())
        return torch.cat(parts)

    def calls(self, role: str) -> int:
        """How many calls a sample takes."""
        return _STEPS if role.startswith("teacher") else 1

    def _call(self, role: Role, noise: Tensor, condition: Tensor | None) -> Tensor:
        module: Any = role.module
        if getattr(module, "null", None) is None:
            condition = None
        if (steps := self.calls(role.name)) > 1:
            return flow(role, noise, module.schedule, steps, condition)
        return role(noise, condition=condition)

    def rows(self, count: int) -> tuple[Tensor, ...]:
        """The first rows of the source, batch by batch."""
        return torch.arange(count).split(self.batch_size)


def save_samples(judge: Generation, m: Roles, folder: str | os.PathLike[str], count: int = 64) -> None:
    """Write some samples of teacher and student, and the real ones of the same classes: `samples.safetensors`."""
    count = min(count, len(judge.source))
    found = {"real": torch.cat([judge.source.batch(rows, 0).x for rows in judge.rows(count)])}
    found |= {name: judge.generate(m[name], count) for name in ("teacher", "student") if name in m}
    with aside(Path(folder) / SAMPLES) as scratch:
        save_file({name: x.contiguous() for name, x in found.items()}, scratch)


def generates(module: nn.Module) -> bool:
    """Whether a model makes samples from noise."""
    return isinstance(getattr(module, "schedule", None), Schedule)
