"""What the benchmarks share: the machine, steps timed by their batches, spread, the result file."""

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from limbeck import Batch
from limbeck.data import TensorSource


class Stamped(TensorSource):
    """Samples that note the process's CPU time whenever a batch is asked for: the clock of any loop that reads them."""

    def batch(self, rows: Tensor, view: int) -> Batch:
        self.stamps.append(time.process_time())
        return super().batch(rows, view)

    def restart(self) -> None:
        self.stamps: list[float] = []

    def step_ms(self, first: int, count: int) -> float:
        """The mean CPU time of `count` steps from step `first` on: neither set-up nor warm-up is in it."""
        return 1e3 * (self.stamps[first + count] - self.stamps[first]) / count


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers depend on; with the versions of further packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: installed(name) for name in packages},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median, quartiles, extremes and number of the values."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    numbers = {"median": median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in numbers.items()} | {"n": len(values)}


def options(description: str, **integers: int) -> argparse.Namespace:
    """`--out` and whole numbers with their defaults, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    for name, default in integers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def report(result: Mapping[str, Any], out: Path | None, quiet: bool = False) -> None:
    """Print the result, and write it aside and rename it."""
    text = json.dumps(result, indent=1)
    if not quiet:
        print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_suffix(out.suffix + ".tmp")
        aside.write_text(text + "\n")
        aside.replace(out)
