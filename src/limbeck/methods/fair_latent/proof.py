"""A table in which one group is preferred: what a classifier makes of rows drawn from a fair latent space."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data.categorical import biased_table, table_data
from limbeck.data.data import Data
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.evaluate.fairness import fit_rows, group_probe, judge_predictions, synthesise
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import TableVAE
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

STEPS, BATCH, ROWS, TABLES = 300, 200, 4500, 3
RATES = (3e-3, 1e-2, 3e-2)
FAIR = FairLatent(fairness=20.0, kl_weight=0.2)
PLAIN = FairLatent(fairness=0.0, kl_weight=0.2)


@lru_cache(maxsize=2)
def splits(seed: int) -> Data:
    """2000 rows to learn from, 1000 to choose by, 1500 to report, about."""
    return table_data(biased_table(ROWS, seed=seed), "group", "y", validation=2 / 9, test=3 / 9, seed=seed)


@lru_cache(maxsize=2)
def merits(seed: int) -> Tensor:
    """What all decisions would be if no group were preferred."""
    return torch.tensor(biased_table(ROWS, bias=0.0, seed=seed)["y"])


def model(seed: int, hidden: int) -> nn.Module:
    """An encoder of some width in front of a decoder of 64 units."""
    return seeded(seed, lambda: TableVAE(splits(seed).train.columns.sizes, 2, latent=8, hidden=hidden))


def train(step: Step, m: Roles, role: str, seed: int, lr: float) -> Passes:
    """One stage; the passes through the encoder that learns."""
    encoder: Any = m[role].module.encoder
    with count_passes(student=encoder) as passes:
        fit(step, m, splits(seed).train, {role: Optim("adam", lr=lr)}, steps=STEPS, batch_size=BATCH, seed=seed)
    return passes["student"]


@lru_cache(maxsize=16)
def taught(seed: int, method: FairLatent, hidden: int, lr: float) -> tuple[Any, Passes]:
    """A model under the first stage's loss."""
    m = Roles(teacher=model(seed, hidden))
    passes = train(method.teach, m, "teacher", seed, lr)
    return m.teacher.module.eval(), passes


def distilled(seed: int, lr: float) -> tuple[Any, Passes]:
    """A small encoder in front of the decoder of the teacher at the same rate."""
    teacher, _ = taught(seed, FAIR, 64, lr)
    m = Roles(teacher=teacher, student=TakeDecoder(teacher)(model(seed + 50, 8))[0])
    passes = train(FAIR.step, m, "student", seed, lr)
    return m.student.module.eval(), passes


def numbers(seed: int, split: str, tables: list[Tensor], steps: int) -> dict[str, float]:
    """What a logistic regression on rows makes of real ones, in per cent; the mean over tables."""
    other, columns = splits(seed)[split], splits(seed).train.columns
    real, found = codes(other), []
    for rows in tables:
        scores = fit_rows(rows, columns.sizes, len(columns.sizes) - 1, steps)(real)
        merit = float(((scores > 0).long() == merits(seed)[other.ids]).double().mean())
        found.append({**judge_predictions(scores, real[:, -1], other.labels), "accuracy_on_merit": merit})
    return {name: 100 * sum(row[name] for row in found) / len(found) for name in found[0]}


def codes(source: Any) -> Tensor:
    """Real rows as category numbers."""
    return torch.stack([part.argmax(1) for part in source.x.split(list(source.columns.sizes), 1)], 1)


@torch.no_grad()
def told(net: Any, seed: int) -> dict[str, float]:
    """How well the group is told from latents, in per cent."""
    latents = {}
    for name in ("train", "test"):
        source = splits(seed)[name]
        mean, logvar = net.encode(source.x, source.labels)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        latents[name] = (mean + (0.5 * logvar).exp() * noise, source.labels)
    ways = {"group_from_latent": False, "group_from_latent_and_products": True}
    return {k: 100 * group_probe(*latents["train"], *latents["test"], squares=s) for k, s in ways.items()}


def run(how: str, seed: int, value: float) -> Trial:
    """One way to rows, chosen by accuracy, judged by parity."""
    source, steps = splits(seed).train, 300
    if how == "real rows":
        tables, steps = [codes(source)], int(value)
        passes, latent = Passes(STEPS, STEPS, STEPS * BATCH), {}  # as many steps that change nothing
    else:
        if how == "student":
            net, passes = distilled(seed, value)
        else:
            hidden = 8 if how == "small from scratch" else 64
            net, passes = taught(seed, PLAIN if how == "plain vae" else FAIR, hidden, value)
        latent, literal = told(net, seed), how == "literal decoding"
        draws = range(seed, seed + 1000 * TABLES, 1000)
        tables = [synthesise(net, source.x, source.labels, draw, literal)[0] for draw in draws]
    validation, test = (numbers(seed, split, tables, steps) for split in ("validation", "test"))
    parity = test.pop("demographic_parity_ratio")
    return Trial(validation["accuracy"], parity, {"student": passes}, test | latent)


def arm(how: str) -> Arm:
    """At three rates; real rows at three lengths of the classifier's training."""
    if how == "real rows":
        return Arm(partial(run, how), "steps of the classifier", (100, 300, 1000))
    return Arm(partial(run, how), "lr", RATES)


PROOF = Proof(
    claim="Rows drawn from a fair latent space give a classifier that treats groups alike where the real rows do not, also where "
    "the encoder is a small one that learned from a big one (Sikder et al. 2024)",
    task="2000 drawn rows of 8 columns whose decision prefers one group; autoencoders of 64 units and 8 latents, small encoders "
    f"of 8; {STEPS} steps of {BATCH}; a logistic regression on the rows without the group, judged on 1500 real ones, the mean of "
    f"{TABLES} tables; each arm is tuned for accuracy",
    metric="demographic parity ratio (%)",
    arms={
        name: arm(name)
        for name in ("real rows", "literal decoding", "plain vae", "small from scratch", "fair teacher", "student")
    },
    comparisons=[
        Comparison("student", "real rows"),
        Comparison("student", "literal decoding"),
        Comparison("student", "fair teacher", margin=2.0),
        Comparison("fair teacher", "plain vae", asserted=False),
        Comparison("student", "small from scratch", asserted=False),
    ],
)
