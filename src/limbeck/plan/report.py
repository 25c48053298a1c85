"""What a plan says, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from limbeck.plan.gpus import Gpu
from limbeck.plan.memory import Memory
from limbeck.report.format import show

LAUNCH = 1e-5  # seconds that eager PyTorch needs to start an operation on a GPU, which small models wait for


@dataclass(frozen=True)
class RoleCost:
    """One role in one training stage.

    Args:
        name: The role.
        model: The module's class.
        learns: Whether the stage trains it.
        parameters: Numbers in its parameters.
        flops: Of its forward passes in one step on one device; a multiply-add counts as two.
        output: dtype and shape of what it returned last.
    """

    name: str
    model: str
    learns: bool
    parameters: int
    flops: int
    output: str


@dataclass(frozen=True)
class StageCost:
    """One training stage.

    Args:
        name: The stage.
        batch: What one micro-batch looks like.
        roles: The roles.
        flops: Of one step on one device, backward included.
        operations: Kernels that one step starts, about.
        memory: At the peak of a step, on one device.
        steps: Steps of the stage, or None where the recipe does not say.
    """

    name: str
    batch: str
    roles: tuple[RoleCost, ...]
    flops: int
    operations: int
    memory: Memory
    steps: int | None


@dataclass(frozen=True)
class Plan:
    """What a recipe would need, found without data, weights or GPU.

    Args:
        stages: The training stages.
        gpu: The GPU it was planned for.
        devices: How many of them work together.
        precision: The engine's precision.
        utilisation: The share of the GPU's peak that the hours assume.
        needed: Bytes that one GPU must have: the peak, and what the estimate does not see.
        fits: Whether it has them.
        seconds: Of one step of each stage.
        hours: Hours of all stages, evaluation and slow data loading not counted; None where the steps are not known.
        advice: What to change when it does not fit.
        notes: What is not exact.
    """

    stages: tuple[StageCost, ...]
    gpu: Gpu
    devices: int
    precision: str
    utilisation: float
    needed: int
    fits: bool
    seconds: tuple[float, ...]
    hours: float | None
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def memory(self) -> Memory:
        """The memory of the stage that needs most."""
        return max((stage.memory for stage in self.stages), key=lambda m: m.peak, default=Memory())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        for stage, cost in zip(plain["stages"], self.stages, strict=True):
            stage["memory"]["peak"] = cost.memory.peak
        return plain

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """The plan as a text table."""
        lines: list[str] = []
        for stage in self.stages:
            lines += _stage_lines(stage)
        name = f"{self.devices} x {self.gpu.name}" if self.devices > 1 else self.gpu.name
        verdict = "fits" if self.fits else "does not fit"
        lines.append(
            f"{verdict}: about {_gb(self.needed)} of {_gb(self.gpu.memory)} on {name} in {self.precision}"
            " (peak + 10 % + 1 GB for the driver, kernels and fragmentation)"
        )
        speed = f"at {self.utilisation:.0%} of {self.gpu.peak(self.precision) / 1e12:g} TFLOP/s"
        speed += f" and at least {LAUNCH * 1e6:g} µs for an operation, if the data keep up"
        if self.hours is not None:
            lines.append(f"takes: about {_hours(self.hours)} {speed}")
        else:
            steps = ", ".join(show("seconds", seconds) for seconds in self.seconds)
            lines.append(f"takes: about {steps} per step {speed}; give the number of samples for hours")
        lines += [f"advice: {text}" for text in self.advice]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)


def _stage_lines(stage: StageCost) -> list[str]:
    steps = "steps not known" if stage.steps is None else f"{stage.steps:,} steps"
    flops = f"{show('flops', stage.flops)}FLOP per step".replace(" FLOP", "FLOP")
    head = [f"stage '{stage.name}': {steps}, {flops} and device", f"  batch {stage.batch}"]
    rows = [("role", "model", "", "parameters", "forward", "output")]
    rows += [
        (
            role.name,
            role.model,
            "learns" if role.learns else "frozen",
            show("parameters", role.parameters),
            f"{show('flops', role.flops)}FLOP" if role.flops else "–",
            role.output,
        )
        for role in stage.roles
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(stage.memory).items())
    return [*head, *table, f"  memory at the peak {_gb(stage.memory.peak)}: {parts}"]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e6:.2f} MB"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"
