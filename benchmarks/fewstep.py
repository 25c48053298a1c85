"""Few-step methods on one teacher: class-conditional flows of images, students that begin as the teacher, equally many updates.

    python benchmarks/fewstep.py digits --out benchmarks/results/fewstep.json

Teachers and trials are kept in `runs/fewstep`: stopped and started again, it goes on; the JSON is written after each trial.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from fewstep_models import CLASSES, FLOW, Judge, cifar10, digits, dit, unet, whole
from measuring import machine, report
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck import Batch, Method, Optim, Roles, Update
from limbeck.core.stages import Step
from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import Draws, Sampler, flow
from limbeck.diffusion.consistency import consistency_pair, sampling_times
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.samples import density_and_coverage, frechet_distance
from limbeck.losses.huber import pseudo_huber
from limbeck.methods.disback.method import DisBack
from limbeck.methods.mdt_dist.method import MDTDist
from limbeck.methods.msd.method import MSD
from limbeck.methods.phased_dmd.method import PhasedDMD
from limbeck.methods.sid.method import SiD
from limbeck.methods.snoopi.method import SNOOPI
from limbeck.methods.swiftbrush.method import SwiftBrush
from limbeck.prove import accuracy, fit, seeded

FOLDER, TUNING, SOLVER = Path("runs/fewstep"), 100, 50
Generator = Callable[[Tensor, Tensor], Tensor]  # of noise and classes


@dataclass(frozen=True)
class Task:
    """A teacher, and what its students may spend.

    Args:
        about: In a sentence.
        network: Predicts the velocity.
        learning: Steps and rate of the teacher.
        steps: Updates of a student.
        rates: Of a student, chosen among with seed 100.
        arms: The methods.
        splits: Images to train, to tune and to test on.
        seeds: What is reported.
        batch: Images of a step.
        judge: Steps of the classifier.
    """

    about: str
    network: Callable[[], nn.Module]
    learning: tuple[int, float]
    steps: int
    rates: tuple[float, ...]
    arms: tuple[str, ...]
    splits: Callable[[], list[TensorSource]] = digits
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    judge: int = 600


@dataclass(frozen=True)
class Arm:
    """A way to train a student, and the ways in which it is sampled.

    Args:
        program: A method, or a step on the training images, for so many updates.
        rows: How the student is called, by the name of the row; the first is tuned by.
        real: Whether it is given the training images and not noise.
        share: Of the updates that the engine is told, where a method has several stages of as many.
    """

    program: Callable[[], Method] | Step
    rows: Mapping[str, Callable[[nn.Module], tuple[Generator, int]]]
    real: bool = False
    share: float = 1.0


def denoise(m: Roles, batch: Batch) -> Update:
    """The velocity at images with noise, a tenth of them without class."""
    loss = denoising_loss(
        m, "student", Draws(m, batch), batch.x, batch.y, times=(0.001, 1.0), dropout=0.1, weight=_velocity
    )
    return Update("student", loss)


def _velocity(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (1 / sigma**2).clamp(max=400.0)


def consistency(m: Roles, batch: Batch) -> Update:
    """Latent consistency distillation, the student's own prediction one step of the teacher earlier as the target."""
    draws = Draws(m, batch)
    index = (draws.uniform("index") * SOLVER).long()
    noise = draws.normal("noise", batch.x)
    return Update(
        "student", pseudo_huber(*consistency_pair(m.teacher, m.student, m.student, batch.x, noise, index, batch.y))
    )


def once(student: nn.Module) -> tuple[Generator, int]:
    """The student in one call."""
    return lambda z, y: student(z, t=torch.ones(len(z)), condition=y), 1


def own(student: nn.Module) -> tuple[Generator, int]:
    """The student in its own steps."""
    return lambda z, y: student(z, condition=y), student.steps  # type: ignore[return-value]


def by_consistency(steps: int) -> Callable[[nn.Module], tuple[Generator, int]]:
    """The student in steps of the grid that consistency was trained on."""
    return lambda s: own(Sampler(s, sampling_times(FLOW, steps, SOLVER).tolist()))


def along(steps: int) -> Callable[[nn.Module], tuple[Generator, int]]:
    """A denoiser along its flow."""
    return lambda s: (lambda z, y: flow(s, z, FLOW, steps, y), steps)


def again(steps: int) -> Callable[[nn.Module], tuple[Generator, int]]:
    """A denoiser in even steps, with fresh noise between them."""
    return lambda s: own(Sampler(s, FLOW.grid(steps)[:-1].tolist()))


def averaged(steps: int) -> Callable[[nn.Module], tuple[Generator, int]]:
    """A student of average velocities in even steps."""
    return lambda s: own(Sampler(s.denoiser, FLOW.grid(steps)[:-1].tolist(), "ddim"))  # type: ignore[arg-type]


TEACHER = {  # as it is: along its flow, and with noise again between steps, as students of several steps are sampled
    "teacher": {f"teacher, {n} step{'s' * (n > 1)}": along(n) for n in (50, 8, 4, 2, 1)},
    "teacher, fresh noise": {f"teacher, {n} steps, fresh noise": again(n) for n in (4, 2)},
}
ARMS = {
    "consistency": Arm(
        consistency, {f"consistency, {n} step{'s' * (n > 1)}": by_consistency(n) for n in (1, 2, 4)}, real=True
    ),
    "dmd": Arm(lambda: DisBack(nodes=()), {"dmd": once}),
    "disback": Arm(lambda: DisBack(nodes=(2, 5, 12, 30, 60), switch=5), {"disback": once}),
    "msd": Arm(lambda: MSD(students=2), {"msd, 2 students": once}),
    "swiftbrush": Arm(lambda: SwiftBrush(guidance=2.0), {"swiftbrush": once}),
    "snoopi": Arm(SNOOPI, {"snoopi": once}),
    "sid": Arm(lambda: SiD(steps=1), {"sid, 1 step": own}),
    "sid 4": Arm(lambda: SiD(steps=4), {"sid, 4 steps": own}),
    "phased_dmd": Arm(
        lambda: PhasedDMD(guidance=1.0, fake_steps=1, weight="dmd"), {"phased_dmd, 4 steps": own}, share=0.5
    ),
    "mdt_dist": Arm(
        lambda: MDTDist(vd_start=0.7, vd_weight=3.0),
        {f"mdt_dist, {n} step{'s' * (n > 1)}": averaged(n) for n in (1, 2)},
        real=True,
    ),
}  # fmt: skip
TASKS = {
    "digits": Task(
        "scikit-learn's digits at 8 px; a DiTTransformer2DModel of 177 thousand numbers",
        dit, (2500, 1e-3), 240, (3e-5, 1e-4, 3e-4), tuple(ARMS),
    ),
    "digits-unet": Task(
        "the same digits; a UNet2DModel of 160 thousand numbers",
        unet, (2500, 2e-3), 240, (3e-5, 1e-4, 3e-4), tuple(ARMS),
    ),
    "cifar10": Task(
        "CIFAR-10 at 32 px; a UNet2DModel of 621 thousand numbers",
        partial(unet, 32, 3, (16, 32, 64)), (1500, 2e-3), 100, (1e-4, 3e-4),
        ("consistency", "dmd", "sid", "mdt_dist"), cifar10, judge=1500,
    ),
    "cifar10-dit": Task(
        "CIFAR-10 at 32 px; a DiTTransformer2DModel of 837 thousand numbers",
        partial(dit, 32, 3, 4, 4, 4), (2500, 1e-3), 100, (1e-4, 3e-4), ("consistency", "dmd", "sid"), cifar10, judge=1500,
    ),
}  # fmt: skip


def kept(name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """A trained network, from its file where there is one."""
    module, path = seeded(0, make), FOLDER / f"{name}.pt"
    if path.exists():
        module.load_state_dict(torch.load(path))
    else:
        start = time.process_time()
        train(module)
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), path)
        print(f"{name}: {(time.process_time() - start) / 60:.1f} minutes of CPU", flush=True)
    return module.eval()


@cache
def judge(splits: Callable[[], list[TensorSource]], steps: int) -> nn.Module:
    """The classifier of real images."""
    train = splits()[0]
    channels = whole(train).x.shape[1]

    def learn(module: nn.Module) -> None:
        optim = Optim("adamw", lr=3e-3, weight_decay=0.05, schedule="cosine")
        fit(supervised, Roles(student=module), train, {"student": optim}, steps=steps, batch_size=64)

    return kept(f"{splits.__name__}-judge", partial(Judge, channels), learn)


@cache
def teacher(name: str) -> nn.Module:
    """The teacher of a task, trained by its images."""
    task = TASKS[name]
    steps, lr = task.learning

    def learn(module: nn.Module) -> None:
        optim = {"student": Optim("adam", lr=lr, schedule="cosine", warmup=100)}
        train = task.splits()[0]
        fit(denoise, Roles(student=module), train, optim, steps=steps, batch_size=task.batch)

    return kept(f"{name}-teacher", task.network, learn)


@torch.no_grad()
def generate(task: Task, call: Generator, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples and their classes, within the range of pixels."""
    real = whole(task.splits()[0]).x
    y = torch.arange(count) % CLASSES
    z = torch.randn(count, *real.shape[1:], generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(10_000 + seed)  # for noise between steps, which is not to be z once more
        x = torch.cat([call(a, b) for a, b in zip(z.split(250), y.split(250), strict=True)])
    return x.clamp(real.amin(), real.amax()), y


def judged(task: Task, x: Tensor, y: Tensor, split: int) -> dict[str, float]:
    """Samples beside real images, in the features of the classifier."""
    classifier: Any = judge(task.splits, task.judge)
    with torch.no_grad():
        real = classifier.body(whole(task.splits()[split]).x)
        made = classifier.body(x)
        right = (classifier.fc(made.relu()).argmax(1) == y).double().mean()
    near = density_and_coverage(real, made)
    found = {"frechet": frechet_distance(made, real), "agreement": 100 * float(right)}
    return {**found, **{name: 100 * value for name, value in near.items()}}


def row(name: str, task: Task, call: Generator, nfe: int, seed: int, label: str) -> dict[str, float]:
    """The numbers of one way to sample; some of the samples are kept for the gallery."""
    start = time.process_time()
    x, y = generate(task, call, 1000, 3000 + seed)
    seconds = time.process_time() - start
    if seed == 0:
        save_file({"x": x[:100].contiguous()}, FOLDER / f"{name}-{label}.safetensors")
    return {**judged(task, x, y, 2), "nfe": nfe, "seconds": seconds}


def trial(name: str, arm_name: str, seed: int, lr: float) -> dict[str, Any]:
    """One student at one rate."""
    task, arm = TASKS[name], ARMS[arm_name]
    student = seeded(0, task.network)
    student.load_state_dict(teacher(name).state_dict())
    m = Roles(teacher=teacher(name), student=student)
    train = task.splits()[0]
    shape = tuple(whole(train).x.shape[1:])
    source = train if arm.real else Noise(shape, 100 * task.batch, CLASSES, seed=seed)
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05, warmup=10)}
    start = time.process_time()
    settings = {"steps": round(task.steps * arm.share), "batch_size": task.batch, "seed": seed}
    if arm.program is consistency:
        fit(consistency, m, source, optim, **settings)
    else:
        method: Any = arm.program()  # type: ignore[call-arg]
        fake = {"fake": Optim("adam", lr=1e-3)} if "fake" in method.makes else {}
        fit(method, m, Data(train=source), optim | fake, **settings)
    minutes = (time.process_time() - start) / 60
    return {"minutes": minutes, **measured(name, arm, m.student.module.eval(), seed)}


def measured(name: str, arm: Arm, student: nn.Module, seed: int) -> dict[str, Any]:
    """The distance that rates are chosen by, and all rows."""
    task = TASKS[name]
    first, _ = next(iter(arm.rows.values()))(student)
    validation = judged(task, *generate(task, first, 500, 2000 + seed), 1)["frechet"]
    rows = {label: row(name, task, *how(student), seed, label) for label, how in arm.rows.items()}
    return {"validation": validation, "rows": rows}


def plain(name: str, arm: str, seed: int) -> dict[str, Any]:
    """The teacher itself, and the training images in the place of samples."""
    task = TASKS[name]
    real = whole(task.splits()[0])
    found = measured(name, Arm(denoise, TEACHER[arm]), teacher(name), seed)
    found["rows"]["training images"] = {**judged(task, real.x[:1000], real.y[:1000], 2), "nfe": 0, "seconds": 0.0}
    return {"minutes": 0.0, **found}


class Trials:
    """Finished trials in a file, by task, arm, rate and seed."""

    def __init__(self, out: Path | None) -> None:
        self.path, self.out = FOLDER / "trials.jsonl", out
        FOLDER.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All of them."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = {(t["task"], t["arm"], t["lr"], t["seed"]): t for t in map(json.loads, lines)}
        return list(found.values())  # of two processes that did one trial, the last

    def get(self, name: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
        """A trial, done now if it is not yet."""
        key = {"task": name, "arm": arm, "lr": lr, "seed": seed}
        for found in self.rows():
            if key.items() <= found.items():
                return found
        found = {**key, **(plain(name, arm, seed) if arm in TEACHER else trial(name, arm, seed, lr))}
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        first = next(iter(found["rows"].values()))
        print(
            f"{name} {arm} lr {lr} seed {seed}: {found['validation']:.2f}, {first}, {found['minutes']:.2f} min",
            flush=True,
        )
        if self.out is not None:
            report(summary(self.rows()), self.out, quiet=True)
        return found


def chosen(trials: list[dict[str, Any]], name: str, arm: str) -> float:
    """The rate of an arm that validation with the tuning seed prefers; one that diverged is never chosen."""
    found = [t for t in trials if (t["task"], t["arm"], t["seed"]) == (name, arm, TUNING)]
    rates = TASKS[name].rates
    return (
        min(found, key=lambda t: t["validation"] if t["validation"] == t["validation"] else 1e9)["lr"]
        if found
        else rates[0]
    )


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds by task and row, and all trials."""
    tables: dict[str, Any] = {}
    for name, task in TASKS.items():
        table: dict[str, Any] = {}
        for arm in (*TEACHER, *task.arms):
            lr = 0.0 if arm in TEACHER else chosen(trials, name, arm)
            mine = [t for t in trials if (t["task"], t["arm"], t["lr"]) == (name, arm, lr) and t["seed"] in task.seeds]
            for label in mine[0]["rows"] if mine else ():
                each = [t["rows"][label] for t in mine]
                line: dict[str, Any] = {
                    key: spread([r[key] for r in each]) for key in each[0] if key not in ("nfe", "seconds")
                }
                line |= {"nfe": each[0]["nfe"], "seconds": round(median(r["seconds"] for r in each), 3), "lr": lr}
                table[label] = line | {"minutes": round(fmean(t["minutes"] for t in mine), 2), "seeds": len(mine)}
        slow = table.get("teacher, 50 steps", {}).get("seconds", 0.0)
        for line in table.values():
            line["speed"] = round(slow / line["seconds"], 1) if line["seconds"] else None
        about = {"task": task.about, "updates": task.steps, "batch": task.batch, "teacher_steps": task.learning[0]}
        tables[name] = {**about, "rows": table}
    return {"machine": machine("diffusers"), "tables": tables, "trials": trials}


def spread(values: list[float]) -> list[float]:
    """Mean and standard deviation."""
    return [round(fmean(values), 3), round(stdev(values), 3) if len(values) > 1 else 0.0]


def run(trials: Trials, name: str, arms: tuple[str, ...]) -> None:
    """The trials of a task, seed by seed; the rates of an arm are tried before, by the tuning seed."""
    task = TASKS[name]
    for seed in task.seeds:
        for arm in arms:
            rates = task.rates if arm not in TEACHER and len(task.rates) > 1 else ()
            for lr in rates:
                trials.get(name, arm, lr, TUNING)
            trials.get(name, arm, 0.0 if arm in TEACHER else chosen(trials.rows(), name, arm), seed)


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=list(TASKS))
    parser.add_argument(
        "--arms",
        nargs="*",
        choices=[*TEACHER, *ARMS, []],
        help="only these, in this order, for several processes at once",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trials = Trials(given.out)
    for name in given.tasks:
        task = TASKS[name]
        teacher(name)
        right = accuracy(Roles(student=judge(task.splits, task.judge)), task.splits()[2])
        print(f"{name}: the classifier is right in {right:.1f} % of the test images", flush=True)
        run(trials, name, tuple(given.arms or (*TEACHER, *task.arms)))
    report(summary(trials.rows()), given.out)


if __name__ == "__main__":
    main()
