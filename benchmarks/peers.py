"""One distillation in a hand-written loop, Limbeck, torchdistill and Lightning: CPU time of a step, one thread.

    pip install torchdistill lightning && python benchmarks/peers.py --out benchmarks/results/peers.json

All arms get the same teacher, student, batches in the same order, loss (KD at temperature 4) and fused SGD, and read
their batches from one source, which stamps the process's CPU time: a step is timed from batch to batch, without set-up.
Arms are interleaved in a new order in every repeat and compared with the hand-written loop of the same repeat. The
weights that each leaves are compared with the hand-written loop's. torchdistill and Lightning run twice: as their
documentation shows, and with everything off that they can do without.
"""

import copy
import gc
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Stamped, machine, options, report, spread
from torch import Tensor, nn

from limbeck import Engine, Method, Optim, Roles, Update
from limbeck.data import Data
from limbeck.engine.run import execute
from limbeck.methods.kd.method import KD

TEMPERATURE, LR, MOMENTUM, LOG_EVERY = 4.0, 0.01, 0.9, 25


@dataclass(frozen=True)
class Task:
    """One size: models, data, and which steps are timed (a multiple of LOG_EVERY, so that logs are in it)."""

    teacher: nn.Module
    student: nn.Module
    source: Stamped
    batch_size: int
    first: int
    count: int

    @property
    def steps(self) -> int:
        return self.first + self.count + 1

    def models(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.teacher).eval().requires_grad_(False), copy.deepcopy(self.student)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The order of the engine's first epoch with seed 0; inputs stand in for the labels that KD alone does not read.
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(0))
        for rows in order.split(self.batch_size):
            batch = self.source.batch(rows, 0)
            yield batch.x, batch.id

    def __len__(self) -> int:
        return self.steps


Arm = Callable[[Task, Path], nn.Module]


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def by_hand(task: Task, folder: Path) -> nn.Module:
    teacher, student = task.models()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
    losses = []
    for x, _ in task:
        with torch.no_grad():
            target = teacher(x)
        loss = kd(student(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) == LOG_EVERY:
            torch.stack(losses).mean().item()
            losses.clear()
    return student


class SameLoss(Method):
    """KD with the loss of the hand-written loop, so that the engine alone differs."""

    def step(self, m: Roles, batch: Any) -> Iterator[Update]:
        with torch.no_grad():
            target = m.teacher(batch)
        yield Update("student", kd(m.student(batch), target))


def limbeck(method: Method) -> Arm:
    def run(task: Task, folder: Path) -> nn.Module:
        teacher, student = task.models()
        engine = Engine(
            steps=task.steps, batch_size=task.batch_size, log_every=LOG_EVERY, evaluate_every=0, checkpoint_every=0
        )
        optim = {"student": Optim("sgd", lr=LR, momentum=MOMENTUM)}
        roles = Roles(teacher=teacher, student=student)
        execute(method, roles, Data(train=task.source), engine, optim=optim, out=folder)
        return student

    return run


def torchdistill_box(task: Task) -> Any:
    teacher, student = task.models()
    paths = {f"{role}_module_{key}": value for role in ("student", "teacher") for key, value in _OUTPUT.items()}
    # With alpha = 0, KDLoss leaves the factor temperature^2 out, so the weight of the term brings it in.
    term = {"criterion": {"key": "KDLoss", "kwargs": {**paths, "temperature": TEMPERATURE, "alpha": 0.0}}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": MOMENTUM, "fused": True}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {**term, "weight": TEMPERATURE**2}}},
        },
    }
    get_box = import_module("torchdistill.core.distillation").get_distillation_box
    box = get_box(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.train_data_loader = task
    return box


_OUTPUT = {"path": ".", "io": "output"}


def torchdistill_bare(task: Task, folder: Path) -> nn.Module:
    box = torchdistill_box(task)
    box.pre_epoch_process(epoch=0)
    for x, y in box.train_data_loader:
        box.post_forward_process(loss=box.forward_process(x, y, None))
    box.post_epoch_process()
    box.clean_modules()
    return box.org_student_model


def torchdistill_example(task: Task, folder: Path) -> nn.Module:
    """With the meters and the check for NaN of its image-classification example."""
    log = import_module("torchdistill.misc.log")
    box = torchdistill_box(task)
    meters = log.MetricLogger(delimiter="  ")
    meters.add_meter("lr", log.SmoothedValue(window_size=1, fmt="{value}"))
    meters.add_meter("img/s", log.SmoothedValue(window_size=10, fmt="{value}"))
    box.pre_epoch_process(epoch=0)
    for x, y in meters.log_every(box.train_data_loader, LOG_EVERY, "Epoch: [0]"):
        start = time.time()
        loss = box.forward_process(x, y, None)
        box.post_forward_process(loss=loss)
        meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        meters.meters["img/s"].update(len(x) / (time.time() - start))
        if torch.isnan(loss) or torch.isinf(loss):
            raise ValueError(f"loss = {loss}")
    box.post_epoch_process()
    box.clean_modules()
    return box.org_student_model


def lightning(barebones: bool) -> Arm:
    L = import_module("lightning.pytorch")

    class Distil(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
            super().__init__()
            self.teacher, self.student = teacher, student

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, _ = batch
            with torch.no_grad():
                target = self.teacher(x)
            loss = kd(self.student(x), target)
            if not barebones:
                self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.student.parameters(), lr=LR, momentum=MOMENTUM, fused=True)

    def run(task: Task, folder: Path) -> nn.Module:
        module = Distil(*task.models())
        quiet: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "log_every_n_steps": LOG_EVERY,
        }
        settings = {"barebones": True} if barebones else {**quiet, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            use_distributed_sampler=False,
            **settings,
        )
        trainer.fit(module, task)
        return module.student

    return run


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn(width: int) -> nn.Sequential:
    widths = (3, width, 2 * width, 4 * width)
    blocks = [
        layer
        for a, b in pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def make_task(
    teacher: nn.Module, student: nn.Module, shape: tuple[int, ...], batch_size: int, first: int, count: int
) -> Task:
    x = torch.randn((first + count + 1) * batch_size, *shape)
    return Task(teacher, student, Stamped(x, ids=torch.arange(len(x))), batch_size, first, count)


def apart(a: nn.Module, b: nn.Module, start: nn.Module) -> float:
    """The largest difference between the weights of two models, as a share of how far training moved them."""

    def far(one: nn.Module, other: nn.Module) -> float:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return max((p - q).abs().max().item() for p, q in pairs)

    return far(a, b) / far(a, start)


def held_out_loss(task: Task, student: nn.Module) -> float:
    """KD loss on samples that no arm has seen."""
    x = torch.randn(512, *task.source.x.shape[1:], generator=torch.Generator().manual_seed(1))
    teacher, _ = task.models()
    with torch.no_grad():
        return kd(student.eval()(x), teacher(x)).item()


def measure(task: Task, arms: dict[str, Arm], repeats: int) -> dict[str, Any]:
    shuffle = random.Random(0)
    steps: dict[str, list[float]] = {name: [] for name in arms}
    students: dict[str, nn.Module] = {}
    for repeat in range(repeats + 1):  # the first one warms up
        for name in shuffle.sample(list(arms), len(arms)):
            gc.collect()
            task.source.restart()
            with tempfile.TemporaryDirectory() as folder:
                students[name] = arms[name](task, Path(folder) / "run")
            if repeat:
                steps[name].append(task.source.step_ms(task.first, task.count))
    hand = "hand-written loop"
    rows = {}
    for name in arms:
        ratios = [a / b for a, b in zip(steps[name], steps[hand], strict=True)]
        rows[name] = {
            "step_ms": spread(steps[name]),
            "over_hand": spread(ratios),
            "held_out_loss": round(held_out_loss(task, students[name]), 6),
            "weights_apart": apart(students[hand], students[name], task.student),
        }
        if rows[name]["weights_apart"] > 1e-3:
            raise SystemExit(f"{name} does other work than the hand-written loop: {rows[name]}")
    return rows


def main() -> None:
    asked = options(__doc__.splitlines()[0], repeats=10)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    arms: dict[str, Arm] = {
        "hand-written loop": by_hand,
        "hand-written loop, again": by_hand,  # how far from 1 a ratio of equals is on this machine
        "limbeck": limbeck(KD(temperature=TEMPERATURE, label_weight=0.0)),
        "limbeck, the loop's loss": limbeck(SameLoss()),
    }
    not_measured = {}
    try:
        import_module("torchdistill.core.distillation")
        arms |= {"torchdistill": torchdistill_example, "torchdistill, no meters": torchdistill_bare}
    except ImportError as error:
        not_measured["torchdistill"] = str(error)
    try:
        arms |= {"lightning": lightning(barebones=False), "lightning, barebones": lightning(barebones=True)}
    except ImportError as error:
        not_measured["lightning"] = str(error)
    small = make_task(mlp(64, 192, 192, 10), mlp(64, 96, 96, 10), (64,), 64, first=10, count=50)
    image = make_task(cnn(48), cnn(24), (3, 32, 32), 32, first=5, count=25)
    result = {
        "machine": machine("lightning", "torchdistill"),
        "what": "process CPU time of a step; over_hand: its ratio to the hand-written loop of the same repeat",
        "not_measured": not_measured,
        "mlp": measure(small, arms, 3 * asked.repeats),
        "cnn": measure(image, arms, asked.repeats),
    }
    report(result, asked.out)


if __name__ == "__main__":
    main()
