"""Two networks under two schedules on a ring of classes: how steady a generator of one step is late in its training."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.update import Update
from limbeck.data.noise import Noise
from limbeck.data.sources import TensorSource
from limbeck.diffusion import Cosine, Denoiser, Draws, GaussianMixture, RectifiedFlow, Schedule, ring
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.budget import Passes, total_passes
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.snoopi.method import SNOOPI
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

CLASSES, STEPS, BATCH, RANGE = 4, 600, 128, (0.5, 4.0)
LATE, EVERY, COUNT = 400, 10, 500
RATES = (1e-3, 3e-3)
BACKBONES: tuple[tuple[int, Schedule], ...] = ((32, RectifiedFlow()), (64, Cosine()))


def teacher(schedule: Schedule) -> GaussianMixture:
    """Eight modes, two of each class on opposite sides."""
    return ring(8, 2.0, 0.15, schedule, classes=CLASSES)


def network(hidden: int, schedule: Schedule) -> nn.Module:
    """A denoiser of two numbers."""
    return Denoiser(TimeMLP(2, hidden, classes=CLASSES), schedule, "v_prediction", null=CLASSES)


def denoise(m: Roles, batch: Batch) -> Update:
    """What the network was trained by first: samples, a tenth of them without class."""
    return Update("student", denoising_loss(m, "student", Draws(m, batch), batch.x, batch.y, dropout=0.1, weight=_one))


def _one(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(alpha)


@lru_cache(maxsize=2)
def trained(seed: int, backbone: int) -> dict[str, Tensor]:
    """A network that was trained on samples of the mixture: where student and `fake` begin."""
    hidden, schedule = BACKBONES[backbone]
    y = torch.arange(20_000) % CLASSES
    source = TensorSource(teacher(schedule).sample(len(y), torch.Generator().manual_seed(seed), y), y)
    m = Roles(student=seeded(seed, lambda: network(hidden, schedule)))
    optim = {"student": Optim("adam", lr=2e-3, schedule="cosine")}
    fit(denoise, m, source, optim, steps=1000, batch_size=256, seed=seed)
    return m.student.module.state_dict()


@torch.no_grad()
def judged(net: nn.Module, known: GaussianMixture, seed: int) -> float:
    """The mean energy distance over the classes, times 100."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for c in range(CLASSES):
        y = torch.full((COUNT,), c)
        z, true = torch.randn(COUNT, 2, generator=generator), known.sample(COUNT, generator, y)
        total += energy_distance(net(z, condition=y), true)
    return 100 * total / CLASSES


def training(seed: int, lr: float, method: SNOOPI, backbone: int) -> tuple[Tensor, Tensor, dict[str, Passes]]:
    """Distances late in one training, by draws for validation and for the test."""
    hidden, schedule = BACKBONES[backbone]
    known = teacher(schedule)
    m = Roles(teacher=known, **{name: seeded(seed, lambda: network(hidden, schedule)) for name in ("student", "fake")})
    for name in ("student", "fake"):
        m[name].module.load_state_dict(trained(seed, backbone))
    found: list[tuple[float, float]] = []

    def program(m: Roles, batch: Batch) -> Iterator[Update]:
        if m.step >= LATE and m.step % EVERY == 0:
            net = m.student.module
            found.append((judged(net, known, 2000 + seed), judged(net, known, 3000 + seed)))
        yield from method.step(m, batch)

    optim = {"student": Optim("adam", lr=lr), "fake": Optim("adam", lr=3e-3)}
    data = Noise((2,), 64 * BATCH, CLASSES, seed=seed)
    passes = fit(program, m, data, optim, steps=STEPS, batch_size=BATCH, seed=seed)
    validation, test = torch.tensor(found).T
    return validation, test, passes


def run(seed: int, lr: float, guidance: tuple[float, float]) -> Trial:
    """Both networks; rates are constant, so that the end shows how steady the training is."""
    runs = [training(seed, lr, SNOOPI(guidance=guidance), k) for k in range(len(BACKBONES))]
    tests = torch.stack([test for _, test, _ in runs])  # [networks, times]
    also = {
        "deviation": float(tests.std(1).mean()),
        "worst": float(tests.amax(1).mean()),
        "final": float(tests[:, -1].mean()),
    }
    validation = float(torch.stack([found for found, _, _ in runs]).mean())
    return Trial(validation, float(tests.mean()), total_passes(passes for _, _, passes in runs), also)


def fixed(k: float) -> Arm:
    """One scale for all samples, at two rates of the student."""
    return Arm(lambda seed, lr: run(seed, lr, (k, k)), "lr", RATES)


PROOF = Proof(
    claim="Under random scales of guidance, the same for both scores, a generator of one step is trained more steadily than "
    "under one high scale, whatever the network (Nguyen et al. 2024)",
    task=f"8 Gaussians on a ring in {CLASSES} classes, the teacher exact; networks of 3 x 32 under a rectified flow and 3 x 64 "
    f"under a cosine schedule, trained on samples before; {STEPS} steps of {BATCH} each at a constant rate",
    metric=f"energy distance to the class's distribution, times 100, mean over the last {STEPS - LATE} steps and both networks",
    arms={
        "k = 1": fixed(1.0),
        "k = 2.25": fixed(2.25),
        "k = 3": fixed(3.0),
        "k = 4.5": fixed(4.5),
        "snoopi": Arm(lambda seed, lr: run(seed, lr, RANGE), "lr", RATES),
    },
    comparisons=[
        Comparison("snoopi", "k = 4.5"),
        Comparison("snoopi", "k = 1", asserted=False),
        Comparison("snoopi", "k = 2.25", asserted=False),
        Comparison("snoopi", "k = 3", asserted=False),
    ],
    better="lower",
)
