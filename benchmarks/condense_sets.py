"""What `condense.py` compares: the tasks, and how each small set of them is made."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shared_images import DEVIATION, MEAN, cifar10_images
from torch import Tensor, nn

from limbeck import Method, Optim, Roles
from limbeck.data import Data
from limbeck.data.augment import Views
from limbeck.data.condensed import Condensed, from_source
from limbeck.data.coresets import herding, medoids
from limbeck.data.embedded import digits
from limbeck.evaluate.condensation import Training, accuracy, train_on
from limbeck.methods.ast.method import AST
from limbeck.methods.cv_dd.method import CVDD
from limbeck.methods.dwa.method import DWA
from limbeck.methods.ftd.method import FTD
from limbeck.methods.infer.method import INFER
from limbeck.nn.convnet import ConvNet
from limbeck.nn.mlp import mlp
from limbeck.prove import fit, seeded
from limbeck.teachers.relabel import epoch_labels, mean_logits, static_labels, with_labels
from limbeck.teachers.trajectories import ExpertTraining, Trajectories, train_experts

BATCH, TABLES, TEMPERATURE = 25, 30, 10.0
JUDGE = Optim("adamw", lr=0.01, weight_decay=0.01, schedule="cosine")  # of the proofs of recovery


class Standardised(nn.Module):
    """Pixels in [0, 1] as networks want them; it has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and what skips them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.Conv2d(before, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


def resnet(channels: int, width: int) -> nn.Sequential:
    """A ResNet of two blocks."""
    stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Residual(width, width, 1), Residual(width, 2 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@dataclass(frozen=True)
class Task:
    """A data set with its networks and budgets.

    Args:
        splits: Training, validation and test images in [0, 1], by seed.
        shape: Of an image.
        kinds: Width and blocks of the ConvNets; the first one makes sets and judges them, all three are teachers.
        operations: Augmentation, in the trainings of all networks.
        experts: Number, epochs, and first epochs of segments.
        expert_rate: Of plain experts; strong ones have 0.4 of it.
        rates: Of pixels, two for each kind of condensing.
        trainings: Of each kind of network on each set.
        iterations: Of the methods that learn pixels.
        steps: Of the networks that judge.
        teacher_epochs: Of the teachers.
    """

    splits: Callable[[int], Data]
    shape: tuple[int, int, int]
    kinds: tuple[tuple[int, int], ...]
    operations: tuple[str, ...]
    experts: tuple[int, int, int]
    expert_rate: float
    rates: dict[str, tuple[float, float]]
    trainings: int
    iterations: int
    steps: int = 150
    teacher_epochs: int = 8

    def first(self) -> nn.Module:
        return nn.Identity() if self.shape[0] == 1 else Standardised()

    def convnet(self, kind: int = 0, norm: Any = "instance") -> nn.Sequential:
        channels, size, _ = self.shape
        width, depth = self.kinds[kind]
        return nn.Sequential(self.first(), ConvNet(10, channels, size, width, depth, norm=norm))

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """Those that judge."""
        channels, size, _ = self.shape
        return {
            "ConvNet": self.convnet,
            "ResNet": lambda: nn.Sequential(self.first(), resnet(channels, 8)),
            "MLP": lambda: nn.Sequential(self.first(), nn.Flatten(), mlp(channels * size * size, 64, 10)),
        }


@lru_cache(maxsize=2)
def cifar10(seed: int) -> Data:
    """5,000 images to condense and 1,000 to tune on, of 8,000 by seed; 2,000 others to test."""
    pool = cifar10_images(8000, standardised=False)
    train, validation = torch.randperm(8000, generator=torch.Generator().manual_seed(seed))[:6000].split([5000, 1000])
    test = cifar10_images(2000, "test", standardised=False)
    return Data(train=pool.subset(train), validation=pool.subset(validation), test=test)


TASKS = {
    "digits": Task(
        lru_cache(maxsize=2)(digits), (1, 8, 8), ((16, 2), (24, 2), (12, 3)), (), (3, 8, 6), 0.05,
        {"matching": (0.5, 2.0), "recovery": (0.03, 0.1), "compensators": (0.003, 0.03)}, 3, 150,
    ),
    "cifar10": Task(
        cifar10, (3, 16, 16), ((16, 3), (24, 3), (16, 2)), ("shift", "flip"), (2, 3, 2), 0.05,
        {"matching": (5.0, 20.0), "recovery": (0.03, 0.1), "compensators": (0.003, 0.03)}, 3, 60, 100, 5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way to get a small set.

    Args:
        make: From a world, images of each class and, where it learns pixels, their rate.
        rates: Which of the task's rates.
        labels: `hard` (class numbers), `table` (one of soft labels) and `views` (one for each of 30 epochs of views).
        least: Images of each class that it can be asked for.
    """

    make: Callable[[World, int, float], Condensed]
    rates: str | None = None
    labels: tuple[str, ...] = ("hard", "table")
    least: int = 1


@dataclass
class World:
    """What there is for a task and a seed; teachers and experts are made once, kept on disk, and timed.

    Args:
        task: The task.
        seed: Of everything.
        folder: For what is kept.
    """

    task: Task
    seed: int
    folder: Path
    used: dict[str, float] = field(default_factory=dict)  # CPU seconds of what a row needed
    built: float = 0.0  # and of what was not there yet

    @cached_property
    def data(self) -> Data:
        return self.task.splits(self.seed)

    def kept(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that is made once; its cost is put down to whoever asks."""
        folder = self.folder / f"{self.seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:  # another process may want the same
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "seconds.json").exists():
                start = time.process_time()
                make(folder)
                taken = time.process_time() - start
                self.built += taken
                (folder / "seconds.json").write_text(json.dumps(taken))
        self.used[name] = json.loads((folder / "seconds.json").read_text())
        return folder

    def teacher(self, kind: int = 0) -> nn.Sequential:
        """A ConvNet with batch normalisation, trained on all data."""
        net: Any = seeded(self.seed + kind, partial(self.task.convnet, kind, "batch"))

        def make(folder: Path) -> None:
            whole = self.data.train.batch(torch.arange(len(self.data.train)), 0)
            how = Training(
                self.task.teacher_epochs * len(whole) // 50, "hard",
                Optim("adamw", lr=0.01, schedule="cosine"), Views(50, self.task.operations),
            )  # fmt: skip
            save_file(train_on(Condensed(whole.x, whole.y), net, how, self.seed).state_dict(), folder / "weights")

        net.load_state_dict(load_file(self.kept(f"teacher-{kind}", make) / "weights"))
        return net.eval()

    def committee(self) -> list[nn.Sequential]:
        return [self.teacher(kind) for kind in range(len(self.task.kinds))]

    def experts(self, name: str, training: ExpertTraining) -> Trajectories:
        net, training = seeded(self.seed, self.task.convnet), replace(training, seed=self.seed)
        folder = self.kept(name, lambda folder: train_experts(net, self.data.train, folder, training) and None)
        return Trajectories(folder, net, training)

    def run(self, method: Method, small: Condensed, lr: float, *teachers: nn.Module) -> Condensed:
        """What a method makes of a set, by the engine."""
        names = ["teacher"] if len(teachers) == 1 and not isinstance(method, CVDD | INFER) else [
            f"teacher_{i}" for i in range(len(teachers))
        ]  # fmt: skip
        m = Roles(**dict(zip(names, teachers, strict=True)), student=small)
        optim = Optim("adam", lr=lr, betas=(0.5, 0.9), schedule="cosine")
        if isinstance(method, FTD | AST):
            optim = Optim("sgd", lr=lr, momentum=0.5)
        fit(method, m, self.data, {"student": optim}, steps=self.task.iterations, seed=self.seed, batch_size=1)
        found: Any = m.student.module
        return found


# How sets are made


def real(world: World, each: int, _: float = 0.0) -> Condensed:
    return from_source(world.data.train, each, world.seed)


def chosen(how: str, world: World, each: int, _: float) -> Condensed:
    """Real images, by what the teacher's last layer reads."""
    train, net = world.data.train, world.teacher()
    whole = train.batch(torch.arange(len(train)), 0)
    with torch.no_grad():
        features = net[1].features(net[0](whole.x))  # type: ignore[operator]
    features = F.normalize(features, dim=1)
    rows = herding(features, whole.y, each) if how == "herding" else medoids(features, whole.y, each, 1, world.seed)
    return Condensed(whole.x[rows], whole.y[rows], info={"classes": list(train.classes)})


def following(method: FTD | AST) -> type:
    """A method that is given its experts."""

    class Given(type(method)):  # type: ignore[misc]
        known: Trajectories

        def trained(self, m: Roles, data: Any) -> Generator[Any, Any, Trajectories]:
            return self.known
            yield

    return Given


def matched(name: str, world: World, each: int, lr: float) -> Condensed:
    """MTT, FTD and AST, with the values of their proofs."""
    task = world.task
    count, epochs, starts = task.experts
    same: dict[str, Any] = {
        "experts": count, "epochs": epochs, "starts": starts, "student_steps": 10, "expert_batch_size": 50,
        "step_size": 0.02, "step_size_lr": 1e-4, "operations": task.operations, "batch_size": 20,
    }  # fmt: skip
    if name == "ast":
        strong = {"penalty": 0.05, "expert_lr": 0.4 * task.expert_rate}
        method: FTD | AST = AST(**same, **strong)
    else:
        method = FTD(**same, expert_lr=task.expert_rate, radius=0.03 if name == "ftd" else 0.0, ema=0.0)
    kind = following(method)
    training = replace(
        method.expert_training, norm="pixel"
    )  # of the penalty, where there is one, as in the authors' code
    kind.known = world.experts(f"experts-{name}", training)
    small = world.run(kind(**vars(method)), real(world, each), lr, seeded(world.seed, task.convnet))
    return Condensed(small.x, small.y, info=small.info)


def recovery(world: World, **fields: Any) -> dict[str, Any]:
    """What the methods of recovery have in common here."""
    return {
        "bn_weight": 0.05, "label_epochs": TABLES, "label_batch_size": BATCH, "temperature": TEMPERATURE,
        "label_operations": world.task.operations, **fields,
    }  # fmt: skip


def recovered(name: str, world: World, each: int, lr: float) -> Condensed:
    """SRe2L, its base, and DWA, with the values of its proof."""
    own = {"rho": 0.05, "variance_weight": 5.0} if name == "dwa" else {"rho": 0.0, "variance_weight": 1.0}
    return world.run(DWA(**recovery(world, **own)), real(world, each), lr, world.teacher())


def voted(world: World, each: int, lr: float) -> Condensed:
    """CV-DD; its priors are measured first, as it asks for."""
    task, teachers = world.task, world.committee()
    method, priors = CVDD(init="real", **recovery(world, operations=("roll",))), []
    for kind, net in enumerate(teachers):
        alone = world.run(replace(method, members=1), real(world, each), lr, net)
        student = seeded(world.seed, partial(task.convnet, kind, "batch"))
        trained = train_on(alone, student, Training(task.steps, optim=JUDGE), world.seed)
        priors.append(100 * accuracy(trained, world.data.validation))
    return world.run(replace(method, priors=tuple(priors)), real(world, each), lr, *teachers)


def compensated(world: World, each: int, lr: float) -> Condensed:
    """INFER, labelled by its committee; tables of views are INFER+Dyn."""
    return world.run(INFER(**recovery(world)), real(world, each), lr, *world.committee())


def by_committee(world: World, each: int, _: float) -> Condensed:
    """Random real images with CV-DD's labels, votes being equal."""
    method, m = (
        CVDD(init="real", **recovery(world)),
        Roles(**{f"teacher_{i}": net for i, net in enumerate(world.committee())}),
    )
    m.freeze(*m.teachers)
    small, views, roles = real(world, each), method.views(world.seed), list(m.teachers.values())
    assert views is not None
    return with_labels(small, epoch_labels(small, mean_logits(roles), views, TABLES, roles), views, TEMPERATURE)


def all_data(world: World, each: int, _: float) -> Condensed:
    """No small set, but what all of them stand for."""
    whole = world.data.train.batch(torch.arange(len(world.data.train)), 0)
    return Condensed(whole.x, whole.y, info={"classes": list(world.data.train.classes)})


def with_tables(task: Task, each: int) -> int:
    """Images of each class that take the place of so many with tables of views."""
    image = 4 * torch.Size(task.shape).numel() + 1
    return each * (image + 2 * 10 * TABLES) // image


def as_many_bytes(world: World, each: int, _: float) -> Condensed:
    return real(world, with_tables(world.task, each))


EVERY = ("hard", "table", "views")
ROWS = {
    "all data": Row(all_data, labels=("hard",)),
    "random real": Row(real, labels=EVERY),
    "herding": Row(partial(chosen, "herding")),
    "k-means medoids": Row(partial(chosen, "medoids")),
    "SRe2L": Row(partial(recovered, "sre2l"), "recovery", EVERY),
    "DWA": Row(partial(recovered, "dwa"), "recovery", EVERY),
    "CV-DD": Row(voted, "recovery", EVERY),
    "INFER": Row(compensated, "compensators", EVERY, least=2),
    "random real (labels of a committee)": Row(by_committee, labels=("table", "views")),
    "random real (bytes of the tables)": Row(as_many_bytes),
    "MTT": Row(partial(matched, "mtt"), "matching"),
    "FTD": Row(partial(matched, "ftd"), "matching"),
    "AST": Row(partial(matched, "ast"), "matching"),
}
COMMITTEES = ("CV-DD", "INFER", "random real (labels of a committee)")  # whose labels are not the one teacher's


def labelled(name: str, world: World, small: Condensed, labels: str) -> Condensed:
    """A set with one of its kinds of labels.

    Tables of views are a method's own where it makes some, and the teacher's, for the views of SRe2L, elsewhere. A single
    table is the mean of a committee's logits where the row has a committee.
    """
    bare = Condensed(
        small.x, small.y, compensators=small.compensators, composed=small.composed,
        info={k: v for k, v in small.info.items() if k not in ("views", "temperature")},
    )  # fmt: skip
    if labels == "hard" or (labels == "views" and small.soft is not None):
        return bare if labels == "hard" else small
    nets = world.committee() if name in COMMITTEES else [world.teacher()]
    m = Roles(**{f"teacher_{i}": net for i, net in enumerate(nets)})
    m.freeze(*m.teachers)
    answer = mean_logits(list(m.teachers.values()))
    if labels == "table":
        return with_labels(bare, static_labels(bare, answer), None, TEMPERATURE)
    views = DWA(**recovery(world)).views(world.seed)
    assert views is not None
    return with_labels(bare, epoch_labels(bare, answer, views, TABLES), views, TEMPERATURE)
