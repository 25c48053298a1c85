"""CIFAR-10 at 32 px on a GPU: an EDM is trained, and distilled to one step by SiD and by DMD.

    python benchmarks/gpu_fewstep.py --out benchmarks/results/gpu-fewstep.json

The teacher is an EDM in the structure of Ho et al. with classes (35 M numbers at the default width), and an average of its
weights. Reported are the Frechet distance to test images, in features of a classifier that is trained on the images, and
images a second, of the teacher in several numbers of steps and of each student in one. The defaults are for 15 minutes of one
large GPU (a guess);
`--device cpu --precision fp32 --width 32 --teacher_steps 2 --steps 2 --samples 10 --batch 4` tries the program.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from fewstep_models import CLASSES, Judge, cifar10, whole
from measuring import machine, report
from torch import Tensor, nn

from limbeck import Batch, Method, Optim, Roles, Train, Update
from limbeck.core.optim import Ema
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import Draws, flow
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.samples import frechet_distance
from limbeck.methods.disback.method import DisBack
from limbeck.methods.sid.method import SiD
from limbeck.prove import accuracy, fit, seeded

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
AT_ONCE, NFE, WARM_UP = 500, (1, 2, 4, 8, 18, 35), 2


@dataclass(frozen=True)
class Denoising(Method):
    """Training of an EDM, with an average of its weights."""

    trains: ClassVar[tuple[str, ...]] = ("student",)

    def stages(self, m: Roles, data: Any) -> Generator[Any, Any, None]:
        yield Train(self.step, roles={"student": None}, data=data.train, ema={"student_average": Ema("student", 0.999)})

    def step(self, m: Roles, batch: Batch) -> Update:
        loss = denoising_loss(m, "student", Draws(m, batch), batch.x, batch.y, times=(0.0, 1.0), weight=_edm)
        return Update("student", loss)


def _edm(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (sigma**2 + 0.25) / (0.5 * sigma) ** 2


def network(width: int) -> nn.Module:
    from cifar10_edm import denoiser

    return seeded(0, lambda: denoiser(width))


@torch.no_grad()
def drawn(call: Callable[[Tensor, Tensor], Tensor], given: argparse.Namespace) -> tuple[Tensor, float]:
    """Samples of all classes, and how many are made in a second."""
    y = (torch.arange(given.samples) % CLASSES).to(given.device)
    z = torch.randn(given.samples, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(given.device)
    parts = list(zip(z.split(AT_ONCE), y.split(AT_ONCE), strict=True))
    for _ in range(WARM_UP):
        call(*parts[0])
    wait(given.device)
    start = time.perf_counter()
    made = [call(*part).clamp(-1, 1) for part in parts]
    wait(given.device)
    return torch.cat(made), given.samples / (time.perf_counter() - start)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Train, distil, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 128, "teacher_steps": 20_000, "steps": 3000, "batch": 256, "samples": 10_000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    engine = {"device": given.device, "batch_size": given.batch}
    train, _, test = cifar10()

    classifier = Judge(3)
    optim = Optim("adamw", lr=3e-3, weight_decay=0.05, schedule="cosine")
    judging = Roles(student=classifier)
    fit(supervised, judging, train, {"student": optim}, steps=min(1500, given.teacher_steps), **engine)
    right = accuracy(judging, test)
    classifier.to(given.device).eval()

    start = time.perf_counter()
    m = Roles(student=network(given.width))
    learning = {"student": Optim("adam", lr=2e-4, warmup=min(500, given.teacher_steps // 2), clip=1.0)}
    settings = {**engine, "precision": given.precision}
    fit(Denoising(), m, Data(train=train), learning, steps=given.teacher_steps, **settings)
    teacher: Any = m.student_average.module.to(given.device).eval().requires_grad_(False)
    minutes = {"teacher": (time.perf_counter() - start) / 60}
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"teacher, {n}": lambda z, y, n=n: flow(teacher, z, teacher.schedule, n, y)  # type: ignore[misc]
        for n in NFE
    }

    methods = {
        "sid": SiD(steps=1, start=0.5, alpha=1.2, times=(0.001, 0.8), ema=0.99),
        "dmd": DisBack(nodes=(), ema=0.99),
    }
    for name, method in methods.items():
        start = time.perf_counter()
        student = network(given.width)
        student.load_state_dict(teacher.state_dict())
        m = Roles(teacher=teacher, student=student)
        rates = {r: Optim("adam", lr=1e-5, betas=(0.0, 0.999)) for r in ("student", "fake")}
        source = Noise((3, 32, 32), 50_000, classes=CLASSES)
        fit(method, m, Data(train=source), rates, steps=given.steps, **settings)
        average: Any = m.student_average.module.to(given.device).eval()
        ways[name] = lambda z, y, net=average: net(z, condition=y)  # type: ignore[misc]
        minutes[name] = (time.perf_counter() - start) / 60

    rows: dict[str, Any] = {}
    with torch.no_grad():
        real = torch.cat([classifier.body(x.to(given.device)) for x in whole(test).x.split(AT_ONCE)])
        for name, call in ways.items():
            x, speed = drawn(call, given)
            made = torch.cat([classifier.body(part) for part in x.split(AT_ONCE)])
            rows[name] = {"frechet": round(frechet_distance(made, real), 3), "images a second": round(speed, 1)}
            print(name, rows[name], flush=True)
    gpu = torch.cuda.get_device_name() if given.device != "cpu" else None
    about = {name: getattr(given, name) for name in (*sizes, "precision")}
    report(
        {"rows": rows, "minutes": minutes, "classifier": right, **about, "gpu": gpu, "machine": machine("diffusers")},
        given.out,
    )


if __name__ == "__main__":
    main()
