"""Two classes of eight clusters each: does what the teacher's embedding tells of the clusters help a small student?"""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from limbeck.convert.subclasses import AddSubclasses, subclass_path
from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import Data, TensorSource
from limbeck.evaluate.baselines import plain_kd, supervised
from limbeck.evaluate.budget import count_passes
from limbeck.losses import kl
from limbeck.methods.lelp.method import LELP
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

OPTIM = Optim("adamw", lr=0.01, weight_decay=0.01, schedule="cosine")
CLUSTERS, SIZES = 8, {"teacher": 2000, "validation": 1000, "test": 2000}


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module, Tensor]:
    """2000 points for the teacher, of which the student sees 300; 1000 to tune on, 2000 to test; and, by sample id, the
    log-probability of each cluster if the class were known `[N, 2, 8]`, up to a constant."""
    g = torch.Generator().manual_seed(seed)
    means = 1.6 * torch.randn(2 * CLUSTERS, 10, generator=g)
    cluster = torch.randint(2 * CLUSTERS, (sum(SIZES.values()),), generator=g)
    x = means[cluster] + torch.randn(len(cluster), 10, generator=g)
    fits = -((x[:, None] - means) ** 2).sum(-1) / 2  # [N, 16]
    turn, _ = torch.linalg.qr(torch.randn(20, 20, generator=g))
    x = torch.cat([x, torch.randn(len(x), 10, generator=g)], 1) @ turn
    rows = torch.arange(len(x))
    points = TensorSource(x, cluster // CLUSTERS, ids=rows)
    cuts = dict(zip(SIZES, rows.split(list(SIZES.values())), strict=True))
    m = Roles(student=seeded(seed, lambda: mlp(20, 256, 64, 2)))
    fit(
        supervised,
        m,
        points.subset(cuts["teacher"]),
        {"student": replace(OPTIM, lr=0.003)},
        epochs=30,
        batch_size=100,
        seed=seed,
    )
    data = Data(
        train=points.subset(cuts["teacher"][:300]), **{n: points.subset(cuts[n]) for n in ("validation", "test")}
    )
    return data, m.student.module, fits.unflatten(1, (2, CLUSTERS))


def split(m: Roles, batch: Batch, within: Tensor) -> Tensor:
    """Distillation at temperature 1 on subclasses that are given: log-probabilities within each class, by sample id."""
    with torch.no_grad():
        classes = m.teacher(batch).log_softmax(-1).unsqueeze(-1)  # [B, C, 1]
        target = (classes + within[batch.id].log_softmax(-1)).flatten(1)  # [B, C S]
    path = subclass_path(m.student.module)
    return kl(m.student.features(batch, path)[1][path], target)


def given(seed: int, oracle: bool, lr: float) -> Trial:
    """The student of subclasses that are the clusters, or that mean nothing."""
    _, _, clusters = task(seed)
    noise = torch.randn(clusters.shape, generator=torch.Generator().manual_seed(seed)) / OURS.subclass_temperature
    m = roles(seed)
    m.convert("student", AddSubclasses(CLUSTERS))
    return train(seed, m, partial(split, within=clusters if oracle else noise), lr)


def roles(seed: int) -> Roles:
    """The teacher, and a student before training."""
    m = Roles(student=seeded(1000 + seed, lambda: mlp(20, 64, 2)), teacher=task(seed)[1])
    m.seed = seed
    return m


def train(seed: int, m: Roles, step: Step, lr: float = OPTIM.lr) -> Trial:
    """The student trained by one step program; passes are counted at its first layer."""
    data, *_ = task(seed)
    with count_passes(student=m.student.module.get_submodule("0")) as passes:
        fit(step, m, data.train, {"student": replace(OPTIM, lr=lr)}, epochs=60, batch_size=30, seed=seed)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), dict(passes))


def plain(seed: int, step: Step, lr: float = OPTIM.lr) -> Trial:
    """The student without subclasses."""
    return train(seed, roles(seed), step, lr)


def lelp(seed: int, method: LELP) -> Trial:
    """The method's student."""
    m = roles(seed)
    method.prepare(m, task(seed)[0].train)
    return train(seed, m, method.step)


KD = partial(plain_kd, label_weight=0.0)
OURS = LELP(subclasses=CLUSTERS)
RATES, BETAS, TEMPERATURES = (0.001, 0.003, 0.01, 0.03), (0.1, 0.25, 0.5, 1.0), (1.0, 2.0, 4.0, 8.0)

PROOF = Proof(
    claim="At one temperature, pseudo-subclasses from the teacher's embedding teach a student of two classes more than "
    "distillation, and less than the true subclasses; subclasses that mean nothing do harm (Loo et al. 2024)",
    task="2 classes of 8 Gaussian clusters in 10 of 20 dimensions; teacher MLP 20-256-64-2 trained on 2000 points, student MLP "
    "20-64-2 (16 outputs with subclasses) trained on 300 of them for 600 steps of 30, without labels; 1000 points to tune on, "
    "2000 to test. 'at 1': temperature 1; 'kd' and 'lelp' are tuned in it",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: plain(seed, supervised, lr), "lr", RATES),
        "random split at 1": Arm(lambda seed, lr: given(seed, False, lr), "lr", RATES),
        "true clusters at 1": Arm(lambda seed, lr: given(seed, True, lr), "lr", RATES),
        "kd at 1": Arm(lambda seed, lr: plain(seed, partial(KD, temperature=1.0), lr), "lr", RATES),
        "lelp at 1, whole embedding": Arm(
            lambda seed, beta: lelp(seed, replace(OURS, subclass_temperature=beta, null_space=False)), "beta", BETAS
        ),
        "lelp at 1": Arm(lambda seed, beta: lelp(seed, replace(OURS, subclass_temperature=beta)), "beta", BETAS),
        "kd": Arm(lambda seed, tau: plain(seed, partial(KD, temperature=tau)), "temperature", TEMPERATURES),
        "lelp": Arm(lambda seed, tau: lelp(seed, replace(OURS, temperature=tau)), "temperature", TEMPERATURES),
    },
    comparisons=[
        Comparison("true clusters at 1", "lelp at 1"),
        Comparison("lelp at 1", "kd at 1"),
        Comparison("kd at 1", "random split at 1"),
        Comparison("lelp", "kd", asserted=False),
        Comparison("lelp", "labels alone", asserted=False),
        Comparison("lelp at 1", "lelp at 1, whole embedding", asserted=False),
    ],
)
