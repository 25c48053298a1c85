"""A table in which one group is preferred: what a classifier makes of rows drawn from a fair latent space."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import TensorSource
from limbeck.data.categorical import biased_table, table_data
from limbeck.data.data import Data
from limbeck.evaluate.budget import Passes, count_passes
from limbeck.evaluate.fairness import group_probe, judge_predictions, synthesise
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import TableVAE
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

STEPS, BATCH, ROWS, TRAIN, TABLES = 300, 128, 4500, 15 * 128, 2
RATES = (3e-3, 1e-2, 3e-2)
CLASSIFIER_RATES = (1e-2, 3e-2, 1e-1)
FAIR = FairLatent(fairness=20.0, kl_weight=0.2)
PLAIN = FairLatent(fairness=0.0, kl_weight=0.2)


@lru_cache(maxsize=2)
def splits(seed: int) -> Data:
    """1920 rows to learn from, so that all batches are full; 1000 to choose by and 1500 to report, about."""
    data = table_data(biased_table(ROWS, seed=seed), "group", "y", validation=0.22, test=0.33, seed=seed)
    train = TensorSource(data.train.x[:TRAIN], data.train.labels[:TRAIN], data.train.ids[:TRAIN])
    return Data(train=train, validation=data.validation, test=data.test)


@lru_cache(maxsize=2)
def merits(seed: int) -> Tensor:
    """What all decisions would be if no group were preferred."""
    return torch.tensor(biased_table(ROWS, bias=0.0, seed=seed)["y"])


def model(seed: int, hidden: int) -> nn.Module:
    """An encoder of some width in front of a decoder of 64 units."""
    return seeded(seed, lambda: TableVAE(splits(seed)["validation"].columns.sizes, 2, latent=8, hidden=hidden))


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


def distilled(seed: int, lr: float) -> tuple[Any, dict[str, Passes]]:
    """A small encoder in front of the decoder of the teacher at the same rate; the passes through both."""
    teacher, before = taught(seed, FAIR, 64, lr)
    m = Roles(teacher=teacher, student=TakeDecoder(teacher)(model(seed + 50, 8))[0])
    passes = train(FAIR.step, m, "student", seed, lr)
    return m.student.module.eval(), {"encoder": passes, "teacher's encoder": before}


def divided(x: Tensor) -> tuple[Tensor, Tensor]:
    """All columns but the decision, which is the last one, and the decision."""
    return x[:, :-2], x[:, -1].long()


def entropy(m: Roles, batch: Batch) -> Tensor:
    """The loss of a logistic regression."""
    return F.binary_cross_entropy_with_logits(m.student(batch)[:, 0], batch.y.float())


def classified(rows: Tensor, seed: int, lr: float) -> tuple[nn.Module, Passes]:
    """A logistic regression on rows, which is what all arms give the same passes to."""
    x, y = divided(rows)
    m = Roles(student=seeded(seed, lambda: nn.Linear(x.shape[1], 1)))
    source = TensorSource(x, y, torch.arange(len(x)))
    optim = {"student": Optim("adam", lr=lr)}
    return m.student.module, fit(entropy, m, source, optim, steps=STEPS, batch_size=BATCH, seed=seed)["student"]


@torch.no_grad()
def right(classifier: nn.Module, source: Any) -> float:
    """Accuracy on the decisions of real rows, in per cent."""
    x, y = divided(source.x)
    return 100 * float(((classifier(x)[:, 0] > 0) == y).double().mean())


@torch.no_grad()
def numbers(seed: int, classifiers: Sequence[nn.Module]) -> dict[str, float]:
    """What classifiers make of the test's rows, in per cent; the mean over them."""
    other, found = splits(seed)["test"], []
    x, y = divided(other.x)
    for classifier in classifiers:
        scores = classifier(x)[:, 0]
        merit = float(((scores > 0).long() == merits(seed)[other.ids]).double().mean())
        found.append({**judge_predictions(scores, y, other.labels), "accuracy_on_merit": merit})
    return {name: 100 * sum(row[name] for row in found) / len(found) for name in found[0]}


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
    source, draws = splits(seed).train, range(seed, seed + 1000 * TABLES, 1000)
    encoder: dict[str, Passes] = {}
    latent: dict[str, float] = {}
    if how == "real rows":
        tables, rate = [source.x] * TABLES, value
    else:
        if how == "student":
            net, encoder = distilled(seed, value)
        else:
            hidden = 8 if how == "small from scratch" else 64
            net, encoder["encoder"] = taught(seed, PLAIN if how == "plain vae" else FAIR, hidden, value)
        latent, rate = told(net, seed), CLASSIFIER_RATES[1]
        tables = [synthesise(net, source, seed=draw, literal=how == "literal decoding")[0] for draw in draws]
    classifiers, passes = zip(*(classified(t, d, rate) for t, d in zip(tables, draws, strict=True)), strict=True)
    validation = sum(right(c, splits(seed)["validation"]) for c in classifiers) / TABLES
    test = numbers(seed, classifiers)
    parity = test.pop("demographic_parity_ratio")
    return Trial(validation, parity, {"student": sum(passes, Passes()), **encoder}, test | latent)


def arm(how: str) -> Arm:
    """At three rates: the classifier's for real rows, else those of the autoencoders."""
    if how == "real rows":
        return Arm(partial(run, how), "lr of the classifier", CLASSIFIER_RATES)
    return Arm(partial(run, how), "lr", RATES)


PROOF = Proof(
    claim="Rows drawn from a fair latent space give a classifier that treats groups alike where the real rows do not, also where "
    "the encoder is a small one that learned from a big one (Sikder et al. 2024)",
    task=f"{TRAIN} drawn rows of 8 columns whose decision prefers one group; autoencoders of 64 units and 8 latents, small "
    f"encoders of 8; {STEPS} steps of {BATCH}; a logistic regression on the rows without the group, as many steps in all arms, "
    f"judged on 1500 real ones, the mean of {TABLES} tables; each arm is tuned for accuracy on validation rows",
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
