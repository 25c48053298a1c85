"""The world in which DistillNearest and DistillWeighted are tried: four concepts, and five sources of which two are related."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import Data, TensorSource
from limbeck.data.procedural import concepts
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.similarity import parc
from limbeck.evaluate.tasks import predict
from limbeck.nn.mlp import mlp
from limbeck.prove import Trial, accuracy, fit, seeded

ABOUT = (
    "points in 24 dimensions that mix four concepts of 8 values; five sources MLP 24-64-32-8 of 2000 points, one for "
    "each concept and one for random labels; 8 classes, coarse in two of the concepts, with 60 labels and 1500 points"
    " without; students MLP 24-48-8, 400 steps of 50 labelled and 50 unlabelled points, label weight 0.5; 300 points "
    "to tune on, 2000 to test. 'kd' cannot be used across tasks: one source through a head of its own is its form "
    "here"
)
OPTIM = Optim("adam", lr=0.003)
STEPS, BATCH, SOURCES = 400, 50, 5
RATES = (0.001, 0.003, 0.01, 0.03)


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, list[nn.Module], list[float]]:
    """60 labels of 8 classes, 1500 points without labels; the sources, the last one of noise; their similarities to the task."""
    (x, values), few, pool, validation, test = concepts(seed, 2000, 60, 1500, 300, 2000)
    g = torch.Generator().manual_seed(seed)
    targets = [*values.unbind(1), torch.randint(0, 8, (len(x),), generator=g)]
    sources = []
    for i, y in enumerate(targets):
        m = Roles(student=seeded(10 * seed + i, lambda: mlp(24, 64, 32, 8)))
        fit(supervised, m, TensorSource(x, y), {"student": OPTIM}, epochs=15, batch_size=100, seed=seed)
        sources.append(m.student.module)

    def labelled(part: tuple[torch.Tensor, torch.Tensor]) -> TensorSource:
        return TensorSource(part[0], 2 * (part[1][:, 0] // 2) + part[1][:, 1] // 4)

    data = Data(
        train=labelled(few), unlabelled=TensorSource(pool[0]), validation=labelled(validation), test=labelled(test)
    )
    return data, sources, [_score(source, data) for source in sources]


def _score(source: nn.Module, data: Data) -> float:
    features, labels = predict(Roles(teacher=source[:-1]).teacher, data.train)  # type: ignore[index]
    assert labels is not None
    return float(parc(features, labels))


def student(seed: int, lr: float, method: Method) -> Trial:
    """A student taught by the sources; each step looks at labelled and unlabelled samples in one pass."""
    data, sources, _ = task(seed)
    roles = {f"teacher_{i}": source for i, source in enumerate(sources)}
    m = Roles(**roles, student=seeded(1000 + seed, lambda: mlp(24, 48, 8)))
    optim = {"student": replace(OPTIM, lr=lr), "heads": replace(OPTIM, lr=lr)}
    splits = Data(train=data.train, unlabelled=data.unlabelled)
    passes = fit(method, m, splits, optim, steps=STEPS, batch_size=BATCH, seed=seed)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), {"student": passes["student"]})


def by_similarity(seed: int) -> list[int]:
    """The sources, the most similar first."""
    _, _, scores = task(seed)
    return sorted(range(SOURCES), key=scores.__getitem__, reverse=True)


def one_of(source: int) -> tuple[float, ...]:
    """Weights that are those of one source alone."""
    return tuple(float(i == source) for i in range(SOURCES))
