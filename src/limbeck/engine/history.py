"""Numbers over time: gathered as tensors, read in one go, written as rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import RunError
from limbeck.engine.runtime import Runtime

Row = dict[str, Any]


class History:
    """The rows of a run, in memory and in `history.jsonl`.

    Args:
        path: The file; None keeps rows in memory only.
        runtime: Sums the parts of the processes.
        sinks: Called with each new row.
    """

    def __init__(self, path: Path | None, runtime: Runtime, sinks: list[Callable[[Row], None]]) -> None:
        self.path, self.runtime, self.sinks = path, runtime, sinks
        self.rows: list[Row] = []
        self.started, self.before = time.perf_counter(), 0.0
        self._pending: list[tuple[int, str, Tensor]] = []
        self._window: dict[str, list[float]] = {}

    def note(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep 0-d tensors of a step; nothing is read from the device."""
        self._pending.extend((step, name, value) for name, value in values.items())

    def drain(self, stage: str, last_good: str | None) -> None:
        """Read what was noted; a value that is not finite stops the run.

        Raises:
            RunError: Names the stage, step, role and the last good checkpoint.
        """
        if not self._pending:
            return
        stacked = torch.stack([value.detach().float() for _, _, value in self._pending])
        self.runtime.add([stacked])
        for (step, name, _), value in zip(self._pending, stacked.tolist(), strict=True):
            if not math.isfinite(value):
                raise RunError(
                    "the run has diverged",
                    where=f"stage '{stage}', step {step}, {name.removeprefix('train/')}",
                    found=value,
                    expected="a finite number",
                    fix="lower the learning rate, clip the gradient (optim.<role>.clip), or use fp32; "
                    + (f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"),
                )
            self._window.setdefault(name, []).append(value)
        self._pending.clear()

    def emit(self, stage: str, step: int, epoch: int, **more: float) -> Row:
        """Write a row: the means since the last row, and `more`."""
        row: Row = {"stage": stage, "step": step, "epoch": epoch, "time": round(self.elapsed(), 3)}
        row |= {name: sum(values) / len(values) for name, values in self._window.items()}
        row |= more
        self._window.clear()
        self.rows.append(row)
        if self.path is not None and self.runtime.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        for sink in self.sinks:
            sink(row)
        return row

    def elapsed(self) -> float:
        """Seconds of work so far, over all starts of the run."""
        return self.before + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; drain first."""
        return {"rows": len(self.rows), "window": self._window, "time": self.elapsed()}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint's state: later rows are dropped, in the file as well."""
        if self.path is not None and self.path.exists():
            # A kill may have cut the last line short; it is then later than any checkpoint.
            lines = self.path.read_text(encoding="utf-8").splitlines()[: state["rows"]]
            self.rows = [json.loads(line) for line in lines]
            if self.runtime.rank == 0:
                scratch = self.path.with_suffix(".tmp")
                scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
                scratch.replace(self.path)
        self._window = {name: list(values) for name, values in state["window"].items()}
        self.before, self.started = state["time"], time.perf_counter()


def trackers(names: tuple[str, ...], out: Path) -> list[Callable[[Row], None]]:
    """Sinks that pass rows on to TensorBoard, W&B or MLflow, through Lightning's loggers."""
    from limbeck.core.errors import require

    made: list[Callable[[Row], None]] = []
    for name in names:
        require(name, extra=name)
        if name == "tensorboard":
            logger = require("lightning.fabric.loggers", extra=name).TensorBoardLogger(
                out, name="tensorboard", version=""
            )
        elif name == "wandb":
            logger = require("lightning.pytorch.loggers", extra=name).WandbLogger(name=out.name, save_dir=out)
        else:
            logger = require("lightning.pytorch.loggers", extra=name).MLFlowLogger("limbeck", run_name=out.name)
        made.append(_tracker(logger))
    return made


def _tracker(logger: Any) -> Callable[[Row], None]:
    def sink(row: Row) -> None:
        numbers = {f"{row['stage']}/{k}": v for k, v in row.items() if "/" in k and isinstance(v, int | float)}
        logger.log_metrics(numbers, step=row["step"])
        logger.save()

    return sink
