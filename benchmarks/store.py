"""An epoch from stored teacher outputs / a plain epoch of the student / an epoch with the teacher running.

    python benchmarks/store.py --out benchmarks/results/store.json

torchvision's ResNet-50 and ResNet-18 at a low resolution, 1,000 classes, one thread. The three loops differ in the loss
alone: cross-entropy, or the mean of it and the KL to the teacher's outputs. They take turns, one epoch each, and ratios are
medians over the rounds of paired epochs, with their range, in CPU time and in elapsed time; a busy machine widens both.
`read` is the time to look up one batch in a larger store, in shuffled order.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50

from limbeck.core.roles import Role
from limbeck.data import TensorSource
from limbeck.losses import kl
from limbeck.teachers import Cached, OutputStore, collect


def epoch(student, teacher, source, optimizer, batch_size):
    """CPU and elapsed seconds."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    cpu, wall = time.process_time(), time.perf_counter()
    for rows in order.split(batch_size):
        batch = source.batch(rows, 0)
        logits = student(batch.x)
        loss = F.cross_entropy(logits, batch.y)
        if teacher is not None:
            with torch.no_grad():
                t = teacher(batch)
            loss = 0.5 * loss + 0.5 * kl(logits, t, temperature=4.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - cpu, time.perf_counter() - wall


def epochs(samples, pixels, batch_size, rounds, folder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    source = TensorSource(images, torch.randint(1000, (samples,), generator=generator))
    teacher = Role("teacher", resnet50())
    teacher.freeze()
    started = time.perf_counter()
    full = collect(teacher, source, folder / "full", batch_size=batch_size)
    collecting = time.perf_counter() - started
    top = collect(teacher, source, folder / "top", batch_size=batch_size, top_k=16)
    teachers = {
        "plain": None,
        "uncached": teacher,
        "cached": Role("teacher", Cached(full)),
        "cached_top16": Role("teacher", Cached(top)),
    }
    student = resnet18().train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    seconds = {name: [] for name in teachers}
    for _ in range(rounds + 1):
        for name, one in teachers.items():
            seconds[name].append(epoch(student, one, source, optimizer, batch_size))
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up

    def ratio(a, b):
        found = {}
        for i, clock in enumerate(("cpu", "elapsed")):
            values = sorted(x[i] / y[i] for x, y in zip(seconds[a], seconds[b], strict=True))
            found[clock] = {
                "median": round(median(values), 3),
                "rounds from, to": [round(values[j], 3) for j in (0, -1)],
            }
        return found

    return {
        "setting": {"samples": samples, "pixels": pixels, "batch_size": batch_size, "rounds": rounds, "classes": 1000},
        "cpu_seconds_per_epoch": {name: [round(v[0], 3) for v in values] for name, values in seconds.items()},
        "collect_seconds": round(collecting, 3),
        "cached / plain": ratio("cached", "plain"),
        "cached_top16 / plain": ratio("cached_top16", "plain"),
        "uncached / plain": ratio("uncached", "plain"),
        "cached / uncached": ratio("cached", "uncached"),
    }


def read(rows, batch_size, repeats, folder, **how):
    source = TensorSource(torch.zeros(rows, 1), ids=torch.arange(rows) * 7919)
    store = collect(Wide(), source, folder, batch_size=1024, **how)
    store = OutputStore(store.path)
    cached = Cached(store)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    milliseconds = []
    for i in range(repeats):
        batch = source.batch(order[i * batch_size : (i + 1) * batch_size], 0)
        started = time.process_time()
        cached(batch)
        milliseconds.append(1000 * (time.process_time() - started))
    size = sum(p.stat().st_size for p in folder.iterdir())
    return {
        "samples": rows,
        "batch_size": batch_size,
        "files": len(list(folder.glob("shard-*"))),
        "bytes_per_sample": round(size / rows, 1),
        "milliseconds_per_batch": round(median(milliseconds), 3),
    }


class Wide(nn.Module):
    """1,000 random logits, as nothing but their size matters."""

    def forward(self, x):
        return torch.randn(len(x), 1000)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        found = {
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "system": platform.platform(),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "cores": os.cpu_count(),
                "threads": 1,
                "load at start": round(os.getloadavg()[0], 1),
            },
            **epochs(given.samples, given.pixels, given.batch_size, given.rounds, folder),
            "read": {
                "full fp16": read(100_000, 256, 100, folder / "a"),
                "full fp16, files of 6 MB": read(100_000, 256, 100, folder / "b", shard_bytes=6 * 10**6),
                "top 16": read(100_000, 256, 100, folder / "c", top_k=16),
            },
        }
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
