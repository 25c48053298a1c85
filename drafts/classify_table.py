"""Classic losses and the classify family on one task: the same teacher, student, data, steps and size of grid for all.

    python benchmarks/classify.py digits --out benchmarks/results/classify-digits.json
    LIMBECK_DATA=path python benchmarks/classify.py cifar10 --out benchmarks/results/classify-cifar10.json

Each arm is tuned over four values on validation data, for each seed anew, and reported on test data. Trials are kept in
`runs/classify-TASK`: stopped and started again, it goes on. Methods that need more than labelled data and one teacher
(unlabelled pools, several sources, classes that come later) cannot be compared here; their proofs are in their cards.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import Batch, Engine, Method, Optim, Roles, losses
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.evaluate.baselines import plain_kd, supervised
from limbeck.evaluate.budget import count_passes
from limbeck.methods.kd import proof as kd_proof
from limbeck.methods.lelp.method import LELP
from limbeck.methods.pld.method import PLD
from limbeck.methods.ssld.method import SSLD
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, run_proof, seeded

TAP = {"digits": "1", "cifar10": "features"}  # the layer before the classifier


class Task:
    """One data set with its models and budget."""

    name = "digits"
    optim = kd_proof.OPTIM
    rates = (0.001, 0.003, 0.01, 0.03)
    engine: ClassVar[dict[str, Any]] = {"epochs": 150, "batch_size": 20}
    about = kd_proof.PROOF.task

    def make(self, seed: int) -> tuple[Data, nn.Module]:
        return kd_proof.task(seed)

    def student(self) -> nn.Module:
        return mlp(64, 32, 10)


class Convolutional(nn.Module):
    """Three convolutions, each followed by normalisation and pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Cifar(Task):
    name = "cifar10"
    optim = Optim("adamw", lr=0.003, weight_decay=0.05, schedule="cosine")
    rates = (0.001, 0.003, 0.006, 0.01)
    engine: ClassVar[dict[str, Any]] = {"epochs": 10, "batch_size": 50}
    about = (
        "CIFAR-10, 32 px, no augmentation; teacher CNN 32-64-128 trained on 10,000 images for 8 epochs, student CNN 8-16-32 on "
        "2,000 of them for 400 steps of 50; 1,000 images to tune on, 2,000 to test"
    )

    @lru_cache(maxsize=1)  # noqa: B019
    def make(self, seed: int) -> tuple[Data, nn.Module]:
        images = cifar()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        m = Roles(student=seeded(seed, lambda: Convolutional(32)))
        optim = {"student": Optim("adamw", lr=0.003, weight_decay=0.05, schedule="cosine")}
        fit(supervised, m, images.subset(order[:10_000]), optim, epochs=8, batch_size=100, seed=seed)
        cuts = {"train": order[:2000], "validation": order[10_000:11_000], "test": order[11_000:13_000]}
        return Data(**{name: images.subset(rows) for name, rows in cuts.items()}), m.student.module

    def student(self) -> nn.Module:
        return Convolutional(8)


@lru_cache(maxsize=1)
def cifar() -> TensorSource:
    """13,000 training images of the shared data, standardised."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(Path(os.environ["LIMBECK_DATA"]) / "cifar10" / "train.parquet").slice(0, 13_000)
    columns = table.column_names
    image, label = (next(c for c in columns if n in c) for n in ("im", "label"))
    pixels = [np.asarray(Image.open(io.BytesIO(v["bytes"]))) for v in table[image].to_pylist()]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)))
    return TensorSource((x - mean) / std, torch.tensor(table[label].to_pylist()))


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student's and teacher's logits, labels


def on_logits(loss: Loss, m: Roles, batch: Batch) -> Tensor:
    with torch.no_grad():
        teacher = m.teacher(batch)
    return loss(m.student(batch), teacher, batch.y)


def on_features(
    loss: Callable[[Tensor, Tensor], Tensor], weight: float, tap: str, m: Roles, batch: Batch
) -> Tensor:
    """Cross-entropy, and a loss between the layers before the classifiers."""
    with torch.no_grad():
        _, teacher = m.teacher.features(batch, tap)
    logits, student = m.student.features(batch, tap)
    return F.cross_entropy(logits, batch.y) + weight * loss(student[tap].flatten(1), teacher[tap].flatten(1))


class Trials:
    """Runs arms on a task."""

    def __init__(self, task: Task) -> None:
        self.task, self.tap = task, TAP[task.name]

    def roles(self, seed: int) -> tuple[Data, Roles]:
        data, teacher = self.task.make(seed)
        return data, Roles(student=seeded(1000 + seed, self.task.student), teacher=teacher)

    def step(self, seed: int, step: Any, lr: float | None = None) -> Trial:
        data, m = self.roles(seed)
        optim = self.task.optim if lr is None else replace(self.task.optim, lr=lr)
        passes = fit(step, m, data.train, {"student": optim}, seed=seed, **self.task.engine)
        return Trial(accuracy(m, data.validation), accuracy(m, data.test), passes)

    def method(self, seed: int, method: Method) -> Trial:
        """A whole program; a converted copy of the student counts its passes too."""
        data, m = self.roles(seed)
        with count_passes(student=m.student.module) as passes:
            execute(
                method,
                m,
                Data(train=data.train),
                Engine(device="cpu", evaluate_every=0, seed=seed, **self.task.engine),
                optim={"student": self.task.optim},
            )
        return Trial(accuracy(m, data.validation), accuracy(m, data.test), passes)

    def arms(self) -> dict[str, Arm]:
        step, tap = self.step, self.tap
        taus = (1.0, 2.0, 4.0, 8.0)

        def logits(name: str, make: Callable[[float], Loss], grid: tuple[float, ...]) -> Arm:
            return Arm(lambda seed, v: step(seed, partial(on_logits, make(v))), name, grid)

        def features(loss: Callable[[Tensor, Tensor], Tensor], grid: tuple[float, ...]) -> Arm:
            return Arm(lambda seed, w: step(seed, partial(on_features, loss, w, tap)), "weight", grid)

        return {
            "labels alone": Arm(lambda seed, lr: step(seed, supervised, lr), "lr", self.task.rates),
            "label smoothing": Arm(
                lambda seed, s: step(seed, partial(supervised, smoothing=s)), "smoothing", (0.05, 0.1, 0.2, 0.4)
            ),
            "kd": Arm(lambda seed, tau: step(seed, partial(plain_kd, temperature=tau)), "temperature", taus),
            "logit MSE": logits("label_weight", lambda w: partial(mixed, losses.logit_mse, w), (0.0, 0.1, 0.5, 0.9)),
            "dkd": logits("temperature", lambda tau: partial(losses.dkd, temperature=tau), taus),
            "dist": logits("temperature", lambda tau: partial(with_labels, losses.dist, tau), taus),
            "sp": features(losses.similarity_preserving, (1.0, 10.0, 100.0, 1000.0)),
            "pkt": features(losses.pkt, (1.0, 10.0, 100.0, 1000.0)),
            "rkd": features(relations, (0.1, 0.3, 1.0, 3.0)),
            "pld": Arm(lambda seed, tau: step(seed, PLD(temperature=tau).step), "temperature", (0.5, 1.0, 2.0, 4.0)),
            "ssld": Arm(
                lambda seed, loss: self.method(seed, SSLD(loss=loss, finetune_epochs=0)),
                "loss",
                ("jeffreys", "js", "kl", "soft_ce"),
            ),
            "lelp": Arm(lambda seed, tau: self.method(seed, LELP(subclasses=3, temperature=tau)), "temperature", taus),
        }


def mixed(loss: Callable[[Tensor, Tensor], Tensor], w: float, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return w * F.cross_entropy(s, y) + (1 - w) * loss(s, t)


def with_labels(loss: Callable[..., Tensor], tau: float, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(s, y) + loss(s, t, temperature=tau)


def relations(s: Tensor, t: Tensor) -> Tensor:
    return 25 * losses.rkd_distance(s, t) + 50 * losses.rkd_angle(s, t)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("digits", "cifar10"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = Task() if given.task == "digits" else Cifar()
    arms = Trials(task).arms()
    proof = Proof(
        claim="A comparison, not a claim: what each loss adds to the labels",
        task=task.about,
        metric="accuracy (%)",
        arms=arms,
        comparisons=[Comparison(name, "labels alone", asserted=name == "kd") for name in list(arms)[1:]],
    )
    found = run_proof(proof, f"classify-{task.name}", given.seeds, Path("runs") / f"classify-{task.name}", Path(__file__).parent)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
