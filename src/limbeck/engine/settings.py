"""How a run is executed: the `engine:` block of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Engine:
    """Everything about execution that is not the method.

    Args:
        epochs: Passes over the data, where a stage does not say.
        steps: Steps of each stage; wins over `epochs`.
        batch_size: Samples of one step, over all processes and micro-batches.
        micro_batches: Parts that the batch of each process is computed in, to save memory.
        seed: Seed of everything.
        device: `auto` takes a GPU when there is one.
        precision: Parameters stay in float32; `bf16` and `fp16` compute in autocast, fp16 with loss scaling.
        compile: Roles whose forward is compiled.
        channels_last: Whether images and convolution weights use the channels-last layout.
        group_by_length: Whether texts of like length share a batch, so that little is padded.
        workers: Processes that load data; 0 loads in the main process.
        processes: Processes (devices) to run on; more than one needs the extra `scale`.
        shard: Roles whose parameters are sharded over the processes (FSDP).
        checkpoint_every: Steps between checkpoints; 0 saves at stage ends only.
        keep: Newest checkpoints that are kept, beside the best.
        evaluate_every: Epochs between evaluations; 0 evaluates at the end only.
        monitor: The metric that chooses the best checkpoint; None takes the first that evaluation returns.
        mode: Whether the metric is better high or low.
        restore: Which weights the run ends with: those of the last step or of the best evaluation.
        patience: Evaluations without improvement after which a stage stops early; None never does.
        log_every: Steps between history rows.
        deterministic: Ask torch for deterministic kernels.
        trackers: Where else numbers go.

    Example:
        >>> Engine(epochs=3, precision="bf16").batch_size
        64
    """

    epochs: float = 10
    steps: int | None = None
    batch_size: int = 64
    micro_batches: int = 1
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: tuple[str, ...] = ()
    channels_last: bool = False
    group_by_length: bool = True
    workers: int = 0
    processes: int = 1
    shard: tuple[str, ...] = ()
    checkpoint_every: int = 500
    keep: int = 2
    evaluate_every: float = 1
    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    restore: Literal["last", "best"] = "last"
    patience: int | None = None
    log_every: int = 10
    deterministic: bool = False
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()

    def __post_init__(self) -> None:
        limits = {"batch_size": 1, "micro_batches": 1, "processes": 1, "keep": 1, "log_every": 1}
        limits |= {"epochs": 0, "workers": 0, "checkpoint_every": 0, "evaluate_every": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                found = getattr(self, name)
                raise UsageError(f"{name} is out of range", where=f"engine.{name}", found=found, expected=f">= {least}")
        if self.steps is not None and self.steps < 1:
            raise UsageError("steps is out of range", where="engine.steps", found=self.steps, expected=">= 1")
        if self.batch_size < self.micro_batches * self.processes:
            raise UsageError(
                "the batch has fewer samples than parts",
                where="engine.batch_size",
                found=self.batch_size,
                expected=f">= micro_batches x processes = {self.micro_batches * self.processes}",
            )
