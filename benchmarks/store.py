"""An epoch from stored teacher outputs / a plain epoch of the student / an epoch with the teacher running.

    python benchmarks/store.py --out benchmarks/results/store.json

torchvision's ResNet-50 and ResNet-18 at a low resolution, 1,000 classes, one thread. All epochs run in the engine and are
timed from batch to batch, without its set-up; they differ in the loss alone: cross-entropy, or the mean of it and the KL to
the teacher's outputs. They take turns, one epoch each, and ratios are medians over the rounds of paired epochs, with their
range, in CPU time and in elapsed time; a busy machine widens both.
`read` is the time to look up one batch in a larger store, in shuffled order.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from measuring import machine, options, report, spread
from torch import nn
from torchvision.models import resnet18, resnet50

from limbeck import Engine, Method, Optim, Roles, Update
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.methods.kd.method import KD
from limbeck.teachers import Cached, OutputStore, collect


class Plain(Method):
    frozen = ()

    def step(self, m, batch):
        yield Update("student", F.cross_entropy(m.student(batch), batch.y))


class Timed(TensorSource):
    """Notes CPU and elapsed time whenever a batch is asked for."""

    def batch(self, rows, view):
        self.times.append((time.process_time(), time.perf_counter()))
        return super().batch(rows, view)


def epoch(student, teacher, source, batch_size):
    """CPU and elapsed seconds of an epoch, after one step that warms up."""
    steps = len(source) // batch_size
    method = Plain() if teacher is None else KD(temperature=4.0, label_weight=0.5)
    roles = Roles(student=student, **({} if teacher is None else {"teacher": teacher}))
    engine = Engine(steps=steps + 2, batch_size=batch_size, log_every=steps, evaluate_every=0, checkpoint_every=0)
    source.times = []
    execute(method, roles, Data(train=source), engine, optim={"student": Optim("sgd", lr=1e-3, momentum=0.9)})
    return tuple(after - before for before, after in zip(source.times[1], source.times[1 + steps], strict=True))


def epochs(samples, pixels, batch_size, rounds, folder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    source = Timed(images, torch.randint(1000, (samples,), generator=generator))
    source.times = []
    teacher = resnet50()
    started = time.perf_counter()
    full = collect(teacher, source, folder / "full", batch_size=batch_size)
    collecting = time.perf_counter() - started
    top = collect(teacher, source, folder / "top", batch_size=batch_size, top_k=16)
    teachers = {
        "plain": None,
        "uncached": teacher,
        "cached": Cached(full),
        "cached_top16": Cached(top),
    }
    student = resnet18()
    seconds = {name: [] for name in teachers}
    for _ in range(rounds + 1):
        for name, one in teachers.items():
            seconds[name].append(epoch(student, one, source, batch_size))
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up

    def ratio(a, b):
        return {
            clock: spread([x[i] / y[i] for x, y in zip(seconds[a], seconds[b], strict=True)])
            for i, clock in enumerate(("cpu", "elapsed"))
        }

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
    given = options(__doc__.splitlines()[0], samples=128, pixels=32, batch_size=32, rounds=11)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        found = {
            "machine": machine("torchvision"),
            **epochs(given.samples, given.pixels, given.batch_size, given.rounds, folder),
            "read": {
                "full fp16": read(100_000, 256, 100, folder / "a"),
                "full fp16, files of 6 MB": read(100_000, 256, 100, folder / "b", shard_bytes=6 * 10**6),
                "top 16": read(100_000, 256, 100, folder / "c", top_k=16),
            },
        }
    report(found, given.out)


if __name__ == "__main__":
    main()
