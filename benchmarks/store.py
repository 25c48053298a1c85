"""Epochs of a ResNet-18 student: plain training, from a stored teacher, and with a ResNet-50 teacher in the loop.

    python benchmarks/store.py --out benchmarks/results/store.json

All three run in the engine, on the same 32 px images in the same order, on the CPU with one thread. Time is the process's
CPU time from batch to batch; the arms are interleaved. `collect` is what the store costs once.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Stamped, machine, options, report, spread
from torch import nn

from limbeck import Engine, Method, Optim, Roles, Update
from limbeck.data import Data
from limbeck.engine.run import execute
from limbeck.methods.kd.method import KD
from limbeck.teachers import Cached
from limbeck.teachers.collect import collect

BATCH, STEPS, CLASSES = 16, 8, 100


class Plain(Method):
    """Cross-entropy with the labels: training without a teacher."""

    frozen = ()

    def step(self, m: Roles, batch: Any) -> Iterator[Update]:
        yield Update("student", F.cross_entropy(m.student(batch), batch.y))


def epoch_ms(method: Method, source: Stamped, student: nn.Module, teacher: nn.Module | None) -> float:
    """CPU time of an epoch: the steps after the first, scaled to all."""
    roles = Roles(student=copy.deepcopy(student), **({} if teacher is None else {"teacher": teacher}))
    engine = Engine(steps=STEPS + 2, batch_size=BATCH, log_every=STEPS, evaluate_every=0, checkpoint_every=0)
    source.restart()
    execute(method, roles, Data(train=source), engine, optim={"student": Optim("sgd", lr=0.01, momentum=0.9)})
    return STEPS * source.step_ms(1, STEPS)


def main() -> None:
    asked = options(__doc__.splitlines()[0], repeats=7)
    from torchvision.models import resnet18, resnet50

    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = (STEPS + 2) * BATCH
    source = Stamped(torch.randn(samples, 3, 32, 32), torch.arange(samples) % CLASSES, ids=torch.arange(samples))
    source.restart()
    teacher, student = resnet50(num_classes=CLASSES), resnet18(num_classes=CLASSES)
    kd = KD(temperature=4.0, label_weight=0.1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        store = collect(teacher, source, folder, batch_size=BATCH)
        once = 1e3 * (time.process_time() - start) * STEPS * BATCH / samples
        arms: dict[str, tuple[Method, nn.Module | None]] = {
            "plain": (Plain(), None),
            "cached": (kd, Cached(store)),
            "uncached": (kd, teacher),
        }
        runs = [
            {name: epoch_ms(method, source, student, role) for name, (method, role) in arms.items()}
            for _ in range(asked.repeats + 1)
        ][1:]  # the first one warms up
    ratios = {
        "cached_over_plain": [r["cached"] / r["plain"] for r in runs],
        "cached_over_uncached": [r["cached"] / r["uncached"] for r in runs],
        "uncached_over_plain": [r["uncached"] / r["plain"] for r in runs],
    }
    result = {
        "machine": machine("torchvision"),
        "what": f"CPU ms of an epoch of {STEPS} batches of {BATCH} images 3x32x32",
        "aims": {"cached_over_plain": 1.10},
        **{name: spread(values) for name, values in ratios.items()},
        "epoch_ms": {name: spread([run[name] for run in runs], 1) for name in arms},
        "collect_once_ms": round(once, 1),
    }
    report(result, asked.out)


if __name__ == "__main__":
    main()
