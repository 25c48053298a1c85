"""A table in which one group is preferred: what a classifier makes of rows drawn from a fair latent space."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data.categorical import Columns, biased_table
from limbeck.data.sources import TensorSource
from limbeck.evaluate.budget import Passes
from limbeck.evaluate.fairness import downstream, ratios, synthesise
from limbeck.methods.fair_latent.method import FairLatent, TakeDecoder
from limbeck.nn.vae import TableVAE
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

STEPS, RATES = 300, (1e-3, 3e-3, 1e-2)
FAIR, PLAIN = FairLatent(fairness=20.0), FairLatent(fairness=0.0)


@lru_cache(maxsize=2)
def splits(seed: int) -> tuple[Columns, TensorSource, TensorSource, TensorSource]:
    """The columns; 2000 rows to learn from, 1000 to choose by, 1500 to report."""
    table, groups = biased_table(4500, seed=seed)
    cut = [(0, 2000), (2000, 3000), (3000, 4500)]
    parts = [({k: v[a:b] for k, v in table.items()}, groups[a:b]) for a, b in cut]
    columns = Columns.of(parts[0][0])
    return columns, *(columns.source(*part) for part in parts)  # type: ignore[return-value]


def model(seed: int, hidden: int) -> nn.Module:
    """An encoder of some width in front of a decoder of 64 units."""
    return seeded(seed, lambda: TableVAE(splits(seed)[0].sizes, 2, latent=8, hidden=hidden))


@lru_cache(maxsize=8)
def taught(seed: int, method: FairLatent, hidden: int, lr: float) -> nn.Module:
    """A model under the first stage's loss."""
    m = Roles(teacher=model(seed, hidden))
    optim = {"teacher": Optim("adam", lr=lr)}
    fit(_only(method.teach), m, splits(seed)[1], optim, steps=STEPS, batch_size=200, seed=seed)
    return m.teacher.module


def _only(step: Callable[[Roles, Batch], Any]) -> Callable[[Roles, Batch], Any]:
    return lambda m, batch: step(m, batch)


def scores(net: Any, seed: int, split: int, literal: bool) -> dict[str, float]:
    """The numbers of a logistic regression on a model's rows."""
    _, train, *others = splits(seed)
    other = others[split - 2]
    batch, real = train.batch(torch.arange(len(train)), 0), other.batch(torch.arange(len(other)), 0)
    rows = net.codes(batch.x) if net.decoder is None else synthesise(net, batch.x, batch.y, seed, literal)[0]
    true = net.codes(real.x)
    return ratios(downstream(rows, true, net.sizes, net.target), true[:, net.target], real.y)


def run(how: str, seed: int, lr: float) -> Trial:
    """One way to rows."""
    net: Any
    if how == "real rows":
        net = model(seed, 8)
        net.decoder = None  # rows as they are
    elif how in ("plain vae", "fair teacher", "literal decoding"):
        net = taught(seed, PLAIN if how == "plain vae" else FAIR, 64, lr)
    elif how == "small from scratch":
        net = taught(seed, FAIR, 8, lr)
    else:
        teacher = taught(seed, FAIR, 64, lr)
        m = Roles(teacher=teacher, student=TakeDecoder(teacher)(model(seed + 50, 8))[0])
        fit(FAIR.step, m, splits(seed)[1], {"student": Optim("adam", lr=lr)}, steps=STEPS, batch_size=200, seed=seed)
        net = m.student.module
    validation, test = (scores(net, seed, k, how == "literal decoding") for k in (2, 3))
    also = {"accuracy": 100 * test["accuracy"], "equalised odds": 100 * test["equalized_odds_ratio"]}
    passes = {"student": Passes(STEPS, STEPS, 0)}
    return Trial(100 * validation["demographic_parity_ratio"], 100 * test["demographic_parity_ratio"], passes, also)


PROOF = Proof(
    claim="Rows drawn from a fair latent space give a classifier that treats groups alike where the real rows do not, also where "
    "the encoder is a small one that learned from a big one (Sikder et al. 2024)",
    task="2000 drawn rows of 8 columns whose decision prefers one group; autoencoders of 64 units and 8 latents, small encoders "
    f"of 8; {STEPS} steps of 200; a logistic regression on synthetic rows without the group, judged on 1500 real ones",
    metric="demographic parity ratio (%)",
    arms={
        name: Arm(partial(run, name), "lr", RATES)
        for name in ("real rows", "literal decoding", "plain vae", "small from scratch", "fair teacher", "student")
    },
    comparisons=[
        Comparison("student", "real rows"),
        Comparison("student", "literal decoding"),
        Comparison("student", "fair teacher", margin=3.0),
        Comparison("fair teacher", "plain vae", asserted=False),
        Comparison("student", "small from scratch", asserted=False),
    ],
)
