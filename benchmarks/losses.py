"""Plackett-Luce distillation against plain loops over ranks, at 1,000 and 100,000 classes.

    python benchmarks/losses.py --out losses.json

`loop` evaluates the formula as it is written, one log-sum-exp over what is left per rank: O(C^2). `running` is the
better loop, one logaddexp per rank: O(C). At 100,000 classes only their forward passes are timed: the backward pass of
`loop` would keep O(C^2) numbers, and autograd takes quadratic time for the 100,000 slices of `running`. Times are
medians on one thread; every implementation is checked against `plackett_luce` before it is timed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from limbeck.losses import kl, plackett_luce

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ranked(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    first = teacher.scatter(-1, labels[:, None], torch.inf)
    order = first.argsort(-1, descending=True)
    return student.gather(-1, order), teacher.softmax(-1).gather(-1, order)


def loop(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    worth, weights = ranked(student, teacher, labels)
    loss = torch.zeros(len(worth))
    for k in range(worth.shape[1]):
        loss = loss + weights[:, k] * (worth[:, k:].logsumexp(-1) - worth[:, k])
    return loss.mean()


def running(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    worth, weights = (x.unbind(-1) for x in ranked(student, teacher, labels))
    left, loss = worth[-1], torch.zeros_like(worth[-1])
    for k in range(len(worth) - 2, -1, -1):
        left = torch.logaddexp(left, worth[k])
        loss = loss + weights[k] * (left - worth[k])
    return loss.mean()


def top_100(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return plackett_luce(student, teacher, labels, top_k=100)


def kl_only(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return kl(student, teacher)


def milliseconds(loss: Loss, batch: tuple[Tensor, Tensor, Tensor], *, backward: bool, repeats: int) -> float:
    student, teacher, labels = batch
    times = []
    for _ in range(repeats):
        leaf = student.clone().requires_grad_(backward)
        start = time.perf_counter()
        value = loss(leaf, teacher, labels)
        if backward:
            value.backward()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def measure(classes: int, batch: int, loop_repeats: int, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(batch, classes, generator=generator) for _ in range(2))
    data = student, teacher, torch.randint(classes, (batch,), generator=generator)
    expected = plackett_luce(*data)
    row: dict[str, float] = {"classes": classes, "batch": batch}
    plan: dict[str, tuple[Loss, bool, int]] = {
        "plackett_luce.forward_ms": (plackett_luce, False, repeats),
        "plackett_luce.forward_backward_ms": (plackett_luce, True, repeats),
        "plackett_luce_top_100.forward_backward_ms": (top_100, True, repeats),
        "kl.forward_backward_ms": (kl_only, True, repeats),
        "loop.forward_ms": (loop, False, loop_repeats),
        "running.forward_ms": (running, False, loop_repeats),
    }
    if classes <= 1000:
        plan |= {
            "loop.forward_backward_ms": (loop, True, loop_repeats),
            "running.forward_backward_ms": (running, True, loop_repeats),
        }
    for reference in (loop, running):
        torch.testing.assert_close(reference(*data), expected, rtol=1e-4, atol=1e-4)
    for name, (loss, backward, times) in plan.items():
        row[name] = milliseconds(loss, data, backward=backward, repeats=times)
    for slow in ("loop", "running"):
        row[f"{slow}_over_plackett_luce.forward"] = round(
            row[f"{slow}.forward_ms"] / row["plackett_luce.forward_ms"], 1
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Plackett-Luce distillation against plain loops over ranks.")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    measure(100, 2, 1, 1)  # warm-up
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "rows": [
            measure(1_000, 64, loop_repeats=5, repeats=20),
            measure(100_000, 1, loop_repeats=1, repeats=10),
        ],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        aside = out.with_suffix(out.suffix + ".tmp")
        aside.write_text(text + "\n")
        aside.replace(out)


if __name__ == "__main__":
    main()
