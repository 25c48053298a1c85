"""DepS on CIFAR-10: when should the sub-networks of a small ResNet join the training, at equal passes?

    LIMBECK_DATA=path python benchmarks/deps_cifar10.py --out benchmarks/results/deps-cifar10.json

Trials are kept in `runs/deps-cifar10`: stopped and started again, it goes on.
"""

from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from measuring import options, report
from shared_images import cifar10_images
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from limbeck import Optim, Roles
from limbeck.data import Data, TensorSource
from limbeck.evaluate.budget import Passes
from limbeck.evaluate.recalibrate import recalibrate
from limbeck.methods.deps.method import DepS
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, run_proof, seeded

FOLDER = Path("runs/deps-cifar10")
BATCH, PASSES, RATES = 64, 1932, (0.01, 0.02, 0.05)
OPTIM = Optim("sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, schedule="cosine", clip=5.0)
METHOD = DepS(expand=(0.25, 0.5, 1.0), depth=(1, 2, 3), divisor=4, ramp=5 / 60)
JUDGED = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 2))  # places of width and depth among their choices


def resnet() -> nn.Module:
    """torchvision's ResNet with three stages of three blocks, 16, 32 and 64 channels, for small images."""
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    net.inplanes = 16
    net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Identity()
    stages = [net._make_layer(BasicBlock, width, 3, stride) for width, stride in ((16, 1), (32, 2), (64, 2))]
    net.layer1, net.layer2, net.layer3 = stages
    net.layer4, net.fc = nn.Identity(), nn.Linear(64, 10)
    return net


@cache
def images() -> TensorSource:
    return cifar10_images(9000)


@lru_cache(maxsize=1)
def task(seed: int) -> Data:
    """4,000 images to train on, 1,000 to tune on, 4,000 to test."""
    order = torch.randperm(9000, generator=torch.Generator().manual_seed(seed))
    train, validation, test = (images().subset(rows) for rows in order.split([4000, 1000, 4000]))
    return Data(train=train, validation=validation, test=test)


def steps_for(method: DepS) -> int:
    """The most steps within PASSES batches through the student: one each before sub-networks join, then all."""
    start = max(0.0, method.delay - method.ramp)
    return max(
        steps for steps in range(PASSES)
        if method.subnets * steps - (method.subnets - 1) * round(start * steps) <= PASSES
    )  # fmt: skip


@lru_cache(maxsize=64)
def trained(seed: int, method: DepS, lr: float) -> tuple[list[float], list[float], Passes]:
    """Accuracy of the judged sub-networks on validation and test data, each with statistics of its own."""
    data, m = task(seed), Roles(student=seeded(seed, resnet))
    optim = {"student": replace(OPTIM, lr=lr)}
    passes = fit(method, m, data, optim, steps=steps_for(method), batch_size=BATCH, seed=seed)
    elastic = m.student.module
    inputs = [data.train.batch(rows, 0).x for rows in torch.arange(1000).split(200)]
    scores: tuple[list[float], list[float]] = ([], [])
    for width, depth in JUDGED:
        arch = {n: sizes[width if n.endswith("channels") else depth] for n, sizes in elastic.space.choices.items()}
        small = Roles(student=recalibrate(elastic.extract(arch), inputs))
        for found, split in zip(scores, ("validation", "test"), strict=True):
            found.append(accuracy(small, data[split]))
    return *scores, passes["student"]


def trial(seed: int, method: DepS, lr: float, place: int | None = None) -> Trial:
    """The mean over the judged sub-networks, or one of them; rates are chosen by the mean."""
    validation, test, passes = trained(seed, method, lr)
    return Trial(sum(validation) / 5, sum(test) / 5 if place is None else test[place], {"student": passes})


def arm(method: DepS, place: int | None = None) -> Arm:
    return Arm(lambda seed, lr: trial(seed, method, lr, place), "lr", RATES)


ARMS = {"early": replace(METHOD, delay=0.0, ramp=0.0), "deps": METHOD, "deps, 75 %": replace(METHOD, delay=0.75)}
PROOF = Proof(
    claim="Sub-networks that join when the whole network is half trained end better, on the whole, than those that train from "
    "the start at equal cost",
    task="CIFAR-10 at 16 px: 4,000 images to train on, 1,000 to tune on, 4,000 to test; a ResNet of 3 stages of 3 blocks, "
    f"sub-networks have 1 to 3 blocks of a quarter, half or all inner channels; {PASSES} passes of {BATCH} images",
    metric="accuracy (%), mean of five sub-networks; 'smallest' and 'largest': of that one alone",
    arms={name: arm(method) for name, method in ARMS.items()}
    | {f"{name}, smallest": arm(method, 0) for name, method in ARMS.items()}
    | {f"{name}, largest": arm(method, 4) for name, method in ARMS.items()},
    comparisons=[
        Comparison("deps", "early"),
        Comparison("deps, smallest", "deps, 75 %, smallest", asserted=False),
        Comparison("deps, smallest", "early, smallest", asserted=False),
        Comparison("deps, largest", "early, largest", asserted=False),
    ],
)


def main() -> None:
    """Run the comparison and write its result."""
    given = options(__doc__ or "", seeds=3)
    torch.set_num_threads(1)
    report(run_proof(PROOF, "deps on CIFAR-10", given.seeds, FOLDER, Path(__file__).parent), given.out)


if __name__ == "__main__":
    main()
