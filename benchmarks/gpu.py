"""ResNet-50 -> ResNet-18 at 224 px in bf16 on a GPU: images a second, and the share of a bare loop's speed.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Needs CUDA. Images lie on the GPU, so that models and engine are measured and not a disk. Every arm exists twice, in a bare
loop and in the engine, interleaved; a window of steps ends with a synchronisation. In the cached arms the engine reads its
store and the bare loop a tensor on the GPU, which is the best that any cache can do.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measuring import machine, options, report, spread
from torch import Tensor, nn

from limbeck import Batch, Engine, Method, Optim, Roles, Update
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.losses import kl
from limbeck.methods.kd.method import KD
from limbeck.teachers import Cached
from limbeck.teachers.collect import collect

CLASSES, WARM_UP = 1000, 10


class Timed(TensorSource):
    """Notes the time, after waiting for the GPU, at the batches that open and close the window."""

    def restart(self, steps: int) -> None:
        self.asked, self.steps, self.times = 0, steps, []  # type: ignore[var-annotated]

    def batch(self, rows: Tensor, view: int) -> Batch:
        if self.asked in (WARM_UP, WARM_UP + self.steps):
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
        self.asked += 1
        return super().batch(rows, view)


class Plain(Method):
    """Cross-entropy with the labels: training without a teacher."""

    frozen = ()

    def step(self, m: Roles, batch: Any) -> Iterator[Update]:
        yield Update("student", F.cross_entropy(m.student(batch), batch.y))


def bare(source: Timed, student: nn.Module, teacher: nn.Module | None, stored: Tensor | None, batch: int) -> None:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, fused=True)
    student.train()
    for epoch in range((WARM_UP + source.steps + 1) * batch // len(source) + 1):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(batch):
            if len(source.times) == 2:
                return
            data = source.batch(rows, 0)
            x = data.x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16):
                logits = student(x)
                loss = F.cross_entropy(logits, data.y)
                if teacher is not None or stored is not None:
                    with torch.no_grad():
                        target = teacher(x) if teacher is not None else stored[rows.to(stored.device)]
                    loss = 0.9 * kl(logits, target, temperature=4.0) + 0.1 * loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def engine(source: Timed, student: nn.Module, teacher: nn.Module | None, batch: int) -> None:
    method = Plain() if teacher is None else KD(temperature=4.0, label_weight=0.1)
    roles = Roles(student=student, **({} if teacher is None else {"teacher": teacher}))
    settings = Engine(
        steps=WARM_UP + source.steps + 1, batch_size=batch, device="cuda", precision="bf16", channels_last=True,
        log_every=50, evaluate_every=0, checkpoint_every=0,
    )  # fmt: skip
    execute(method, roles, Data(train=source), settings, optim={"student": Optim("sgd", lr=0.1, momentum=0.9)})


def main() -> None:
    asked = options(__doc__.splitlines()[0], batch=256, steps=50, repeats=5)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU and torch sees none; nothing was measured")
    from torchvision.models import resnet18, resnet50

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    samples = 8 * asked.batch
    x = torch.randn(samples, 3, 224, 224, device="cuda")
    source = Timed(x, torch.arange(samples, device="cuda") % CLASSES, ids=torch.arange(samples))
    source.restart(0)
    teacher = resnet50().cuda().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    student = resnet18().cuda().to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        store = collect(teacher, source, folder, batch_size=asked.batch)
        stored = store.read(source.ids)["output"].cuda()  # type: ignore[union-attr]
        roles = {"plain": (None, None), "uncached": (teacher, None), "cached": (Cached(store), stored)}
        speeds: dict[str, list[float]] = {f"{name}, {kind}": [] for name in roles for kind in ("bare", "engine")}
        for _ in range(asked.repeats):
            for name, (module, outputs) in roles.items():
                for kind in ("bare", "engine"):
                    source.restart(asked.steps)
                    learner = copy.deepcopy(student)
                    if kind == "bare":
                        bare(source, learner, None if outputs is not None else module, outputs, asked.batch)
                    else:
                        engine(source, learner, module, asked.batch)
                    seconds = source.times[1] - source.times[0]
                    speeds[f"{name}, {kind}"].append(asked.steps * asked.batch / seconds)
    shares = {
        name: [e / b for e, b in zip(speeds[f"{name}, engine"], speeds[f"{name}, bare"], strict=True)] for name in roles
    }
    result = {
        "machine": {**machine("torchvision"), "gpu": torch.cuda.get_device_name()},
        "batch": asked.batch,
        "images_per_second": {name: spread(values, 1) for name, values in speeds.items()},
        "share_of_bare_loop": {name: spread(values) for name, values in shares.items()},
    }
    report(result, asked.out)


if __name__ == "__main__":
    main()
