"""A teacher that has seen labels, and a student that sees images: do images without labels help, and which?"""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import require
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Step
from limbeck.data import Data, TensorSource
from limbeck.data.combine import Concatenated
from limbeck.data.pool import top_per_class
from limbeck.evaluate.baselines import plain_kd, supervised
from limbeck.evaluate.tasks import predict
from limbeck.methods.ssld.method import SSLD
from limbeck.nn.mlp import mlp
from limbeck.prove import Arm, Comparison, Proof, Trial, accuracy, fit, seeded

OPTIM = Optim("adam", lr=0.003, schedule="cosine")
STEPS, BATCH, LABELLED, TAKEN = 1200, 50, 100, 500
RATES = (0.001, 0.003, 0.01, 0.03)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def noisy(step: Step) -> Step:
    """The same step on images with noise of standard deviation 0.1, which teacher and student both see."""

    def program(m: Roles, batch: Batch) -> object:
        noise = torch.randn(batch.x.shape, generator=m.rng("noise"))
        return step(m, batch.replace(x=batch.x + 0.1 * noise))

    return program  # type: ignore[return-value]


def strangers(digits: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Images `[count, 64]` that are no digits: the pixels of digits in a random order of its own."""
    rows = torch.randint(len(digits), (count,), generator=g)
    return digits[rows].gather(1, torch.rand(count, 64, generator=g).argsort(1))


@lru_cache(maxsize=1)
def task(seed: int) -> tuple[Data, nn.Module]:
    """A teacher of 900 images; of these 100 with labels and the others without for the student; 300 to tune on, 597 to test."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    seen, validation, test = order.split([900, 300, 597])
    images = TensorSource(x, y)
    m = Roles(student=seeded(seed, lambda: mlp(64, 256, 10)))
    fit(noisy(supervised), m, images.subset(seen), {"student": OPTIM}, steps=STEPS, batch_size=BATCH, seed=seed)
    rest = x[seen[LABELLED:]]
    ids = torch.arange(10_000, 10_000 + 3 * len(rest))
    mixed = torch.cat([rest, strangers(rest, 2 * len(rest), g)])
    data = Data(
        train=images.subset(seen[:LABELLED]),
        unlabelled=TensorSource(rest, ids=ids[: len(rest)]),
        mixed=TensorSource(mixed, ids=ids),
        validation=images.subset(validation),
        test=images.subset(test),
    )
    return data, m.student.module


def pseudo_labels(m: Roles, batch: Batch) -> Tensor:
    """Cross-entropy with the teacher's likeliest class."""
    with torch.no_grad():
        label = m.teacher(batch).argmax(-1)
    return nn.functional.cross_entropy(m.student(batch), label)


def chosen(data: Data, teacher: nn.Module, best: bool) -> TensorSource | object:
    """As many images of the pool with strangers as `top_per_class` takes, by it or at random."""
    scores = predict(Roles(teacher=teacher).teacher, data.mixed)[0].softmax(-1)
    g = torch.Generator().manual_seed(0)
    rows = top_per_class(scores, TAKEN // 10)
    count = len(rows) // BATCH * BATCH  # whole batches, so that all arms see equally many images
    rows = rows[torch.randperm(len(rows), generator=g)] if best else torch.randperm(len(data.mixed), generator=g)
    return data.mixed.subset(rows[:count])


def student(seed: int, step: Step, pool: str | None = None, lr: float = OPTIM.lr, finetune: float = 0.0) -> Trial:
    """A student trained by one step program: on the 100 images, or on these and a pool; the last steps on the 100."""
    data, teacher = task(seed)
    m = Roles(student=seeded(1000 + seed, lambda: mlp(64, 24, 10)), teacher=teacher)
    source = data.train
    if pool is not None:
        extra = data.unlabelled if pool == "all" else chosen(data, teacher, pool == "best")
        source = Concatenated(data.train, extra)
    optim = replace(OPTIM, lr=lr)
    last = int(finetune * STEPS)
    settings = {"batch_size": BATCH, "seed": seed}
    passes = fit(noisy(step), m, source, {"student": optim}, steps=STEPS - last, **settings)
    if last:
        more = fit(noisy(step), m, data.train, {"student": replace(optim, lr=lr / 100)}, steps=last, **settings)
        for role, found in more.items():
            for name, count in vars(found).items():
                setattr(passes[role], name, getattr(passes[role], name) + count)
    return Trial(accuracy(m, data.validation), accuracy(m, data.test), passes)


PROOF = Proof(
    claim="Without any label, the teacher's probabilities on few images teach a student more than their labels do, and images "
    "without labels add to that (Cui et al. 2021)",
    task="scikit-learn's digits: a teacher MLP 64-256-10 of 900 labelled images; students MLP 64-24-10 with 100 of them, or with "
    "the other 800 too, without labels; a pool of these 800 and twice as many images of shuffled pixels; 1200 steps of 50, noise "
    "0.1; 300 images to tune on, 597 to test",
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: student(seed, supervised, lr=lr), "lr", RATES),
        "kd": Arm(lambda seed, tau: student(seed, partial(plain_kd, temperature=tau)), "temperature", TEMPERATURES),
        "ssld, no pool": Arm(lambda seed, lr: student(seed, SSLD().step, lr=lr), "lr", RATES),
        "pseudo-labels": Arm(lambda seed, lr: student(seed, pseudo_labels, "all", lr), "lr", RATES),
        "soft labels": Arm(lambda seed, lr: student(seed, SSLD(variant="kl").step, "all", lr), "lr", RATES),
        "js": Arm(lambda seed, lr: student(seed, SSLD(variant="paper").step, "all", lr), "lr", RATES),
        "random of pool": Arm(lambda seed, lr: student(seed, SSLD().step, "random", lr), "lr", RATES),
        "best of pool": Arm(lambda seed, lr: student(seed, SSLD().step, "best", lr), "lr", RATES),
        "ssld, finetuned": Arm(lambda seed, lr: student(seed, SSLD().step, "all", lr, 1 / 12), "lr", RATES),
        "ssld": Arm(lambda seed, lr: student(seed, SSLD().step, "all", lr), "lr", RATES),
    },
    comparisons=[
        Comparison("ssld", "ssld, no pool"),
        Comparison("ssld, no pool", "labels alone"),
        Comparison("ssld", "kd"),
        Comparison("ssld, no pool", "kd", asserted=False),
        Comparison("best of pool", "random of pool", asserted=False),
        Comparison("ssld", "pseudo-labels", asserted=False),
        Comparison("ssld", "soft labels", asserted=False),
        Comparison("ssld", "js", asserted=False),
        Comparison("ssld, finetuned", "ssld", asserted=False),
    ],
)
