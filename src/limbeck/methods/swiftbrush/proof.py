"""A ring of classes under an exact teacher: one call of a small network in the place of fifty."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Step
from limbeck.core.update import Update
from limbeck.data.noise import Noise
from limbeck.data.sources import TensorSource
from limbeck.diffusion import Denoiser, Draws, GaussianMixture, RectifiedFlow, flow, ring
from limbeck.diffusion.objectives import surrogate, vsd_gradient
from limbeck.diffusion.scores import denoising_loss, noisy, predicted, schedule_of
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.swiftbrush.method import SwiftBrush
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

CLASSES, STEPS, BATCH, GUIDANCE = 4, 1500, 128, 2.0
RATES = (3e-4, 1e-3, 3e-3)
FLOW = RectifiedFlow()


def teacher() -> GaussianMixture:
    """Eight modes, two of each class on opposite sides."""
    return ring(8, 2.0, 0.15, FLOW, classes=CLASSES)


def network() -> nn.Module:
    """A denoiser of two numbers."""
    return Denoiser(TimeMLP(2, 64, classes=CLASSES), FLOW, "flow_prediction", null=CLASSES)


def denoise(m: Roles, batch: Batch) -> Update:
    """What the network was trained by first: samples, a tenth of them without class."""
    return Update("student", denoising_loss(m, "student", Draws(m, batch), batch.x, batch.y, dropout=0.1, weight=_one))


def _one(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(alpha)


@lru_cache(maxsize=1)
def trained(seed: int) -> dict[str, Tensor]:
    """A network that was trained on samples of the mixture: where student and `fake` begin."""
    m = Roles(student=seeded(seed, network))
    fit(
        denoise,
        m,
        drawn(seed),
        {"student": Optim("adam", lr=2e-3, schedule="cosine")},
        steps=2000,
        batch_size=256,
        seed=seed,
    )
    return m.student.module.state_dict()


@lru_cache(maxsize=1)
def drawn(seed: int) -> TensorSource:
    """20,000 samples of the mixture with their classes."""
    y = torch.arange(20_000) % CLASSES
    return TensorSource(teacher().sample(len(y), torch.Generator().manual_seed(seed), y), y)


@lru_cache(maxsize=1)
def pairs(seed: int) -> TensorSource:
    """Noise and where the teacher's flow ends from it, in 10 steps each: half of the evaluations that distilling takes."""
    count = STEPS * BATCH // 10  # under guidance, distilling evaluates it twice for each sample
    y = torch.arange(count) % CLASSES
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    known = teacher()
    x = flow(known, z, FLOW, 10, y, known.null_like(y), 1.0)
    return TensorSource(torch.cat([z, x], 1), y)


def regress(m: Roles, batch: Batch) -> Update:
    """One call to where the teacher's flow ends."""
    z, target = batch.x.chunk(2, 1)
    return Update("student", F.mse_loss(m.student(z, t=torch.ones(len(z)), condition=batch.y), target))


def sds(m: Roles, batch: Batch) -> Update:
    """The drawn noise in the place of the score of the samples."""
    draws, method = Draws(m, batch), SwiftBrush()
    x = method.generate(m, batch)
    x_t, t = noisy(schedule_of(m.teacher), draws, "student", x.detach(), *method.times)
    with torch.no_grad():
        real = predicted(m.teacher, x_t, t, batch.y, GUIDANCE)
        alpha, sigma = FLOW.factors(t, x)
    return Update("student", surrogate(x, vsd_gradient(real, x, alpha, sigma)))


def judged(seed: int, m: Roles, generator_seed: int) -> float:
    """The mean energy distance over the classes, of 1,000 samples each."""
    generator, known = torch.Generator().manual_seed(generator_seed + seed), teacher()
    total = 0.0
    for c in range(CLASSES):
        y = torch.full((1000,), c)
        z, true = torch.randn(1000, 2, generator=generator), known.sample(1000, generator, y)
        with torch.no_grad():
            total += energy_distance(m.student(z, t=torch.ones(1000), condition=y), true)
    return 100 * total / CLASSES


def run(seed: int, lr: float, program: Step, source: Source | None = None, fake: bool = False) -> Trial:
    """A student under one program."""
    m = Roles(teacher=teacher(), student=seeded(seed, network))
    m.student.module.load_state_dict(trained(seed))
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05)}
    if fake:
        m.fake = seeded(seed, network)
        m.fake.module.load_state_dict(trained(seed))
        optim["fake"] = Optim("adam", lr=3e-3)
    data = source or Noise((2,), 64 * BATCH, CLASSES, seed=seed)
    passes = fit(program, m, data, optim, steps=STEPS, batch_size=BATCH, seed=seed)
    m.student.module.eval()
    return Trial(judged(seed, m, 2000), judged(seed, m, 3000), passes)


def distilled(method: SwiftBrush) -> Arm:
    """The method at three rates of the student."""
    return Arm(lambda seed, lr: run(seed, lr, method.step, fake=True), "lr", RATES)


PROOF = Proof(
    claim="The gap of two scores, both guided, makes a generator of one step out of a diffusion model without data, nearer "
    "to its distribution than the drawn noise does (SDS), where one call of the model itself is nowhere (Nguyen and Tran 2024)",
    task=f"8 Gaussians on a ring in {CLASSES} classes, the teacher exact; a network of 3 x 64 trained on samples of it before; "
    f"{STEPS} steps of {BATCH}; regression has half as many evaluations of the teacher",
    metric="energy distance to the class's distribution, times 100, mean over classes, one call of the student",
    arms={
        "more denoising": Arm(lambda seed, lr: run(seed, lr, denoise, drawn(seed)), "lr", RATES),
        "regression": Arm(lambda seed, lr: run(seed, lr, regress, pairs(seed)), "lr", RATES),
        "sds": Arm(lambda seed, lr: run(seed, lr, sds), "lr", RATES),
        "teacher alone guided": distilled(SwiftBrush(guidance=GUIDANCE, guide_fake=False)),
        "swiftbrush": distilled(SwiftBrush(guidance=GUIDANCE)),
    },
    comparisons=[
        Comparison("swiftbrush", "more denoising"),
        Comparison("swiftbrush", "sds"),
        Comparison("swiftbrush", "regression", asserted=False),
        Comparison("swiftbrush", "teacher alone guided", asserted=False),
    ],
    better="lower",
)
