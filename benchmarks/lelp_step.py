"""A step of LELP over a step of distillation: the same two transformers, taking turns in one run.

python benchmarks/lelp_step.py --out benchmarks/results/lelp-step.json
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import machine, options, report, spread
from torch import nn

from limbeck import Batch, Method, Roles
from limbeck.core.method import updates
from limbeck.core.source import Source
from limbeck.data import TensorSource
from limbeck.methods.kd.method import KD
from limbeck.methods.lelp.method import LELP
from limbeck.prove import seeded


class Classifier(nn.Module):
    """Some layers of a transformer on vectors, the mean over places, a linear layer."""

    def __init__(self, width: int, layers: int, classes: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.stem = nn.Linear(32, width)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors `[B, T, 32]` to logits `[B, C]`."""
        return self.head(self.body(self.stem(x)).mean(1))


def data(count: int = 256) -> TensorSource:
    """Random sequences of 32 vectors in two classes."""
    x = torch.randn(count, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorSource(x, torch.arange(count) % 2, ids=torch.arange(count))


def roles(source: Source, method: Method) -> Roles:
    """A teacher of four layers, a student of two, ready for a method's steps."""
    m = Roles(teacher=seeded(0, lambda: Classifier(128, 4)), student=seeded(1, lambda: Classifier(64, 2)))
    m.freeze("teacher")
    if isinstance(method, LELP):
        method.prepare(m, source)
    return m


def stepper(method: Method, source: Source, batch: Batch) -> Callable[[], None]:
    """One whole step: both forward passes, backward, optimizer."""
    m = roles(source, method)
    optimizer = torch.optim.AdamW(m.student.parameters(), lr=1e-4)

    def step() -> None:
        for update in updates(method.step, m, batch, "student"):
            update.backward(m)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(rounds: int = 40, steps: int = 5) -> dict[str, Any]:
    """CPU time of a step of each, and of one over the other, by rounds in which they take turns."""
    source = data()
    batch = source.batch(torch.arange(64), 0)
    methods = {"lelp": LELP(), "kd": KD(temperature=1.0, label_weight=0.0)}
    takers = {name: stepper(method, source, batch) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in takers}
    for _ in range(rounds + 2):  # two to warm up
        for name, step in takers.items():
            start = time.process_time()
            for _ in range(steps):
                step()
            times[name].append(1e3 * (time.process_time() - start) / steps)
    times = {name: values[2:] for name, values in times.items()}
    ratio = [a / b for a, b in zip(times["lelp"], times["kd"], strict=True)]
    return {"step_ms": {name: spread(values) for name, values in times.items()}, "lelp / kd": spread(ratio)}


def main() -> None:
    """Measure and report."""
    given = options(__doc__ or "", rounds=40)
    torch.set_num_threads(1)
    report({**compare(given.rounds), "machine": machine()}, given.out)


if __name__ == "__main__":
    main()
