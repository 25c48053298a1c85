"""Classic losses and the classify family on one task: the same student, data, passes and size of grid for all.

    python benchmarks/classify.py digits --out benchmarks/results/classify-digits.json
    LIMBECK_DATA=path python benchmarks/classify.py cifar10 --out benchmarks/results/classify-cifar10.json

A student has few labelled images and, in the arms marked +, a pool of images without labels. Each arm is tuned over four values
on validation data, for each seed anew, and reported on test data. Trials are kept in `runs/classify-TASK`: stopped and started
again, it goes on. What teachers are there for is made once for each seed and is no part of the budget; the student's passes
are. Weight aligning, whose classes come in groups, has another problem and is not here.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared_images import cifar10_images
from torch import Tensor, nn

from limbeck import Batch, Method, Optim, Roles, losses
from limbeck.core.stages import Step
from limbeck.data import Data, TensorSource
from limbeck.data.combine import Concatenated
from limbeck.evaluate.baselines import plain_kd, supervised
from limbeck.evaluate.budget import count_passes
from limbeck.methods.distill_nearest.method import DistillNearest
from limbeck.methods.distill_weighted.method import DistillWeighted
from limbeck.methods.kd.method import KD
from limbeck.methods.kd3.method import KD3
from limbeck.methods.lelp.method import LELP
from limbeck.methods.meal_v2.method import MEALV2
from limbeck.methods.pld.method import PLD
from limbeck.methods.self_distillation.method import SelfDistillation
from limbeck.methods.ssld.method import SSLD
from limbeck.methods.wad.method import WAD
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, run_proof, seeded
from limbeck.teachers import Cached, Ensemble, collect

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
GROUPS = {"even or odd": lambda y: y % 2, "below five": lambda y: (y < 5).long(), "modulo three": lambda y: y % 3}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student's and teacher's logits, labels


@dataclass(frozen=True)
class World:
    """What is there for one seed.

    Args:
        data: Splits `train`, `unlabelled`, `validation` and `test`.
        teachers: Classifiers of the same classes; the first is the teacher of all arms but those of ensembles.
        sources: Classifiers of other tasks on such images.
    """

    data: Data
    teachers: Sequence[nn.Module]
    sources: Sequence[nn.Module]


@dataclass(frozen=True)
class Task:
    """One data set with its models and budget.

    Args:
        about: In a sentence.
        world: What is there, by seed.
        student: Makes the student.
        tap: The layer before its classifier, and the teacher's.
        optim: How the student learns.
        rates: Learning rates, where these are tuned.
        steps: Of the student.
        batch: Images of one step.
    """

    about: str
    world: Callable[[int], World]
    student: Callable[[], nn.Module]
    tap: str
    optim: Optim
    rates: tuple[float, ...]
    steps: int
    batch: int = 50


def split(images: TensorSource, seed: int, sizes: Sequence[int]) -> tuple[Data, TensorSource]:
    """Labelled, unlabelled, validation and test images; and those that the teachers learn from: the first two, with labels."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, pool, validation, test = (images.subset(rows) for rows in order[: sum(sizes)].split(list(sizes)))
    unlabelled = TensorSource(pool.batch(torch.arange(len(pool)), 0).x, ids=pool.ids)
    data = Data(train=train, unlabelled=unlabelled, validation=validation, test=test)
    return data, images.subset(order[: sizes[0] + sizes[1]])


def relabelled(source: Any, change: Callable[[Tensor], Tensor]) -> TensorSource:
    """The same images for another task."""
    whole = source.batch(torch.arange(len(source)), 0)
    return TensorSource(whole.x, change(whole.y), ids=source.ids)


def trained(make: Callable[[], nn.Module], seed: int, source: Any, optim: Optim, epochs: int) -> nn.Module:
    """A model that labels have trained."""
    m = Roles(student=seeded(seed, make))
    fit(supervised, m, source, {"student": optim}, epochs=epochs, batch_size=50, seed=seed)
    return m.student.module


@lru_cache(maxsize=1)
def digits(seed: int) -> World:
    """100 labelled digits, 800 without labels; three teachers and three classifiers of other tasks that saw all 900."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = TensorSource(torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target))
    data, seen = split(images, seed, (100, 800, 300, 597))
    optim = Optim("adamw", lr=0.01, schedule="cosine")
    teachers = [trained(partial(mlp, 64, 256, 10), 10 * seed + i, seen, optim, 30) for i in range(3)]
    sources = [
        trained(partial(mlp, 64, 64, 3), 10 * seed + 5 + i, relabelled(seen, change), optim, 30)
        for i, change in enumerate(GROUPS.values())
    ]
    return World(data, teachers, sources)


class Convolutional(nn.Module):
    """Three convolutions, each followed by normalisation and pooling."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to logits."""
        return self.fc(self.features(x))


@lru_cache(maxsize=1)
def stored(model: nn.Module, data: Data) -> nn.Module:
    """A teacher's outputs, and what its classifier reads, on everything that students learn from."""
    folder = tempfile.mkdtemp(prefix="limbeck-")
    both = Concatenated(data.train, data.unlabelled)
    return Cached(collect(model, both, folder, layers=["features"], dtype="fp32"))


@lru_cache(maxsize=1)
def cifar10(seed: int) -> World:
    """1,000 labelled images, 4,000 without labels; three teachers of all 5,000."""
    data, seen = split(cifar10_images(8000), seed, (1000, 4000, 1000, 2000))
    optim = Optim("adamw", lr=0.003, weight_decay=0.05, schedule="cosine")
    teachers = [trained(partial(Convolutional, 32), 10 * seed + i, seen, optim, 8) for i in range(3)]
    return World(data, [stored(teacher, data) for teacher in teachers], [])


TASKS = {
    "digits": Task(
        "scikit-learn's digits: students MLP 64-32-10 with 100 labelled images, and a pool of 800 without labels; three teachers "
        "MLP 64-256-10 of these 900 with their labels; 600 steps of 50 images; 300 to tune on, 597 to test",
        digits,
        lambda: mlp(64, 32, 10),
        "1",
        Optim("adamw", lr=0.01, schedule="cosine"),
        (0.001, 0.003, 0.01, 0.03),
        600,
    ),
    "cifar10": Task(
        "CIFAR-10 at 16 px: students CNN 8-16-32 with 1,000 labelled images, and a pool of 4,000 without labels; "
        "three teachers CNN 32-64-128 of these 5,000 with their labels; 390 steps of 50 images; 1,000 to tune on, 2,000 to test",
        cifar10,
        lambda: Convolutional(8),
        "features",
        Optim("adamw", lr=0.006, weight_decay=0.05, schedule="cosine"),
        (0.001, 0.003, 0.006, 0.02),
        390,
    ),
}


def on_logits(loss: Loss, m: Roles, batch: Batch) -> Tensor:
    """A loss of both logits and the labels."""
    with torch.no_grad():
        teacher = m.teacher(batch)
    return loss(m.student(batch), teacher, batch.y)


def on_features(loss: Callable[[Tensor, Tensor], Tensor], weight: float, tap: str, m: Roles, batch: Batch) -> Tensor:
    """Cross-entropy, and a loss between the layers before the classifiers."""
    with torch.no_grad():
        _, teacher = m.teacher.features(batch, tap)
    logits, student = m.student.features(batch, tap)
    return F.cross_entropy(logits, batch.y) + weight * loss(student[tap].flatten(1), teacher[tap].flatten(1))


def mixed(loss: Callable[[Tensor, Tensor], Tensor], w: float, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Labels and distillation, with the share of the labels."""
    return w * F.cross_entropy(s, y) + (1 - w) * loss(s, t)


def with_labels(loss: Callable[..., Tensor], tau: float, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Labels and distillation at a temperature."""
    return F.cross_entropy(s, y) + loss(s, t, temperature=tau)


def relations(s: Tensor, t: Tensor) -> Tensor:
    """Distances and angles between the samples of a batch."""
    return 25 * losses.rkd_distance(s, t) + 50 * losses.rkd_angle(s, t)


class Arms:
    """The arms of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def trial(
        self,
        seed: int,
        program: Step | Method,
        lr: float | None = None,
        *,
        data: Callable[[Data], Any] = lambda data: data.train,
        teachers: Callable[[World], dict[str, nn.Module]] = lambda world: {"teacher": world.teachers[0]},
        stages: int = 1,
        batch: int | None = None,
        **others: Optim,
    ) -> Trial:
        """A student after one program: a step on a source, or a whole method on splits, whose stages share the steps."""
        task, world = self.task, self.task.world(seed)
        m = Roles(student=seeded(1000 + seed, task.student), **teachers(world))
        optim = {"student": task.optim if lr is None else replace(task.optim, lr=lr), **others}
        source = data(world.data)
        settings = {"steps": task.steps // stages, "batch_size": batch or task.batch, "seed": seed}
        first = next(part for part in m.student.module.modules() if isinstance(part, nn.Linear | nn.Conv2d))
        with count_passes(
            learning=True, student=first
        ) as passes:  # which all arms run, whatever they do to the last layer
            fit(program, m, source, optim, **settings)
        return Trial(accuracy(m, world.data.validation), accuracy(m, world.data.test), dict(passes))

    def all(self) -> dict[str, Arm]:
        """By name; those with a pool are marked +."""
        task, trial = self.task, self.trial

        def logits(name: str, make: Callable[[float], Loss], grid: tuple[float, ...]) -> Arm:
            return Arm(lambda seed, v: trial(seed, partial(on_logits, make(v))), name, grid)

        def features(loss: Callable[[Tensor, Tensor], Tensor], grid: tuple[float, ...]) -> Arm:
            return Arm(lambda seed, w: trial(seed, partial(on_features, loss, w, task.tap)), "weight", grid)

        def method(name: str, make: Callable[[Any], Method], grid: tuple[Any, ...], **how: Any) -> Arm:
            return Arm(lambda seed, v: trial(seed, make(v), **how), name, grid)

        def rates(make: Callable[[], Step | Method], **how: Any) -> Arm:
            return Arm(lambda seed, lr: trial(seed, make(), lr, **how), "lr", task.rates)

        labelled, pool = {"data": only_train}, {"data": with_pool}
        half = task.batch // 2  # a step on pairs looks at a labelled and an unlabelled half
        arms = {
            "labels alone": rates(lambda: supervised),
            "label smoothing": Arm(
                lambda seed, s: trial(seed, partial(supervised, smoothing=s)), "smoothing", (0.05, 0.1, 0.2, 0.4)
            ),
            "kd": Arm(lambda seed, tau: trial(seed, partial(plain_kd, temperature=tau)), "temperature", TEMPERATURES),
            "logit MSE": logits("label_weight", lambda w: partial(mixed, losses.logit_mse, w), (0.0, 0.1, 0.5, 0.9)),
            "dkd": logits("temperature", lambda tau: partial(losses.dkd, temperature=tau), TEMPERATURES),
            "dist": logits("temperature", lambda tau: partial(with_labels, losses.dist, tau), TEMPERATURES),
            "sp": features(losses.similarity_preserving, (1.0, 10.0, 100.0, 1000.0)),
            "pkt": features(losses.pkt, (1.0, 10.0, 100.0, 1000.0)),
            "rkd": features(relations, (0.1, 0.3, 1.0, 3.0)),
            "pld": Arm(lambda seed, tau: trial(seed, PLD(temperature=tau).step), "temperature", (0.5, 1.0, 2.0, 4.0)),
            "lelp": method(
                "temperature", lambda tau: LELP(subclasses=3, temperature=tau), TEMPERATURES, **labelled
            ),
            "meal_v2": rates(
                lambda: MEALV2().step, teachers=lambda world: {"teacher": Ensemble(list(world.teachers))}
            ),
            "self_distillation": rates(
                lambda: SelfDistillation(generations=2, label_weight=0.5), teachers=nobody, stages=3, **labelled
            ),
            "kd +": Arm(
                lambda seed, tau: trial(seed, KD(temperature=tau).step, data=everything), "temperature", TEMPERATURES
            ),
            "ssld +": rates(lambda: SSLD(finetune_epochs=0, duplicates=1.0), **pool),
        }  # fmt: skip
        if task.world is not digits:
            return arms
        return arms | {
            "kd3 +": method("cutoff", lambda c: KD3(cutoff=c, contrastive_weight=0.0), (0.0, 0.5, 0.8, 0.95), **pool),
            "wad +": rates(
                lambda: WAD(promotions=0), teachers=lambda _: {"teacher": nn.Identity()}, batch=half, **pool
            ),
            "distill_nearest +": rates(lambda: DistillNearest(), teachers=other_tasks, batch=half, **pool),
            "distill_weighted +": rates(lambda: DistillWeighted(power=1.0), teachers=other_tasks, batch=half, **pool),
        }  # fmt: skip


def only_train(data: Data) -> Data:
    """The labelled images, as splits."""
    return Data(train=data.train)


def with_pool(data: Data) -> Data:
    """The labelled and the unlabelled images, as splits."""
    return Data(train=data.train, unlabelled=data.unlabelled)


def everything(data: Data) -> Concatenated:
    """Both without labels, as one source."""
    return Concatenated(data.train, data.unlabelled)


def nobody(world: World) -> dict[str, nn.Module]:
    """No teacher."""
    return {}


def other_tasks(world: World) -> dict[str, nn.Module]:
    """The classifiers of other tasks."""
    return {f"teacher_{i}": source for i, source in enumerate(world.sources)}


def main() -> None:
    """Run the comparison of one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[given.task]
    arms = Arms(task).all()
    proof = Proof(
        claim="A comparison, not a claim: what each method adds to the labels alone",
        task=task.about,
        metric="accuracy (%)",
        arms=arms,
        comparisons=[Comparison(name, "labels alone", asserted=name == "kd") for name in list(arms)[1:]],
    )
    name = f"classify-{given.task}"
    found = run_proof(proof, name, given.seeds, Path("runs") / name, Path(__file__).parent)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
