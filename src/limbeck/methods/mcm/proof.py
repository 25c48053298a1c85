"""Clips that look worse than images, under an exact teacher: motion from the clips, appearance from the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Role, Roles
from limbeck.core.update import Update
from limbeck.data.data import Data
from limbeck.data.sources import TensorSource
from limbeck.diffusion import Cosine, Denoiser, Draws, GaussianMixture, few_step
from limbeck.diffusion.consistency import sampling_times
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.mcm.method import MCM
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

FRAMES, DIM, MOTIONS, STEPS, BATCH = 8, 4, 6, 400, 128
LOW, HIGH, NOISE = -0.8, 0.8, 0.1
SCHEDULE = Cosine()
RATES, WEIGHTS = (1e-3, 3e-3), (0.1, 0.3)


def motions() -> Tensor:
    """Movements that begin and end elsewhere, without their mean `[motions * amplitudes, frames, dim]`."""
    g = torch.Generator().manual_seed(0)
    time = torch.linspace(0, 1, FRAMES)[None, :, None]
    slope, swing, phase = torch.randn(3, MOTIONS, 1, DIM, generator=g)
    path = slope * time + 0.7 * swing * torch.sin(2 * math.pi * time + 3 * phase)
    path = path - path.mean(1, keepdim=True)
    return torch.cat([size * path for size in (0.5, 1.0, 1.5)])


def appearances(centre: float, spread: float) -> Tensor:
    """Places that stay the same through a clip `[5, dim]`."""
    corners = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [-1, 1, 0, 0], [1, -1, 0, 0], [-1, -1, 0, 0]])
    return torch.tensor([centre, centre, 0, 0]) + spread * corners


def world(centre: float, spread: float) -> GaussianMixture:
    """Clips of every motion at every place."""
    means = motions()[:, None] + appearances(centre, spread)[None, :, None]
    return GaussianMixture(means.flatten(0, 1).flatten(1), NOISE, SCHEDULE)


def drawn(seed: int, count: int, high: bool = False) -> Tensor:
    """Clips `[N, frames, dim]`: low, with places far apart, as the teacher knows them; or high, with places close together."""
    known = world(HIGH, 0.1) if high else world(LOW, 0.4)
    return known.sample(count, torch.Generator().manual_seed(seed)).view(count, FRAMES, DIM)


def images(seed: int, count: int) -> Tensor:
    """Single frames of high clips `[N, dim]`."""
    g = torch.Generator().manual_seed(seed + 1)
    return drawn(seed, count, high=True)[torch.arange(count), torch.randint(FRAMES, (count,), generator=g)]


@lru_cache(maxsize=1)
def data(seed: int) -> Data:
    """20,000 clips and as many images."""
    return Data(train=TensorSource(drawn(seed, 20_000)), unlabelled=TensorSource(images(seed + 50, 20_000)))


def network() -> nn.Module:
    """A denoiser of clips."""
    return Denoiser(TimeMLP(FRAMES * DIM, 128), SCHEDULE, "v_prediction")


def denoise(m: Roles, batch: Batch) -> Update:
    """What the network was trained by first: the clips."""
    return Update("student", denoising_loss(m, "student", Draws(m, batch), batch.x, weight=_one))


def _one(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(alpha)


@lru_cache(maxsize=1)
def trained(seed: int) -> Mapping[str, Tensor]:
    """A network trained on the clips: where students begin."""
    m = Roles(student=seeded(seed, network))
    optim = {"student": Optim("adam", lr=2e-3, schedule="cosine")}
    fit(denoise, m, data(seed).train, optim, steps=1000, batch_size=256, seed=seed)
    return m.student.module.state_dict()


@torch.no_grad()
def made(student: Role | nn.Module, seed: int, steps: int, count: int = 1000) -> Tensor:
    """A student's clips in some steps."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, FRAMES, DIM, generator=g)
    times = sampling_times(SCHEDULE, steps)
    return few_step(student, z, SCHEDULE, times, fresh=lambda i: torch.randn(z.shape, generator=g))


def scores(x: Tensor, seed: int) -> tuple[float, float]:
    """How far the motion is from the teacher's, of 100 for still clips; and frames from the images, of 100 for the clips' own."""
    clips, others = drawn(seed, len(x)), drawn(seed + 7, len(x))
    frame = torch.randint(FRAMES, (len(x),), generator=torch.Generator().manual_seed(seed))
    rows, wanted = torch.arange(len(x)), images(seed + 3, len(x))
    motion = energy_distance(x.diff(dim=1), clips.diff(dim=1))
    still = energy_distance(torch.zeros_like(x).diff(dim=1), clips.diff(dim=1))
    looks = energy_distance(x[rows, frame], wanted)
    unchanged = energy_distance(others[rows, frame], wanted)
    return 100 * motion / still, 100 * looks / unchanged


def run(seed: int, method: MCM, lr: float = 1e-3) -> Trial:
    """A student under one program, judged in one, two and four steps."""
    m = Roles(teacher=world(LOW, 0.4), student=seeded(seed, network))
    m.student.module.load_state_dict(trained(seed))
    rates = {"student": lr, "head": 1e-3, "discriminator": 1e-3}
    final = {"student": 0.05, "head": 0.05}
    optim = {n: Optim("adam", lr=r, schedule="cosine", final=final.get(n, 1.0)) for n, r in rates.items()}
    passes = fit(method, m, data(seed), optim, steps=STEPS, batch_size=BATCH, seed=seed)
    m.student.module.eval()
    validation, _ = judged(m.student, 2000 + seed, 4000 + seed)
    test, also = judged(m.student, 3000 + seed, 5000 + seed)
    return Trial(validation, test, passes, also)


def judged(student: Role, noise: int, truth: int) -> tuple[float, dict[str, float]]:
    """The mean over one, two and four steps; and its parts."""
    found = {f"{k} steps": scores(made(student, noise, k), truth) for k in (1, 2, 4)}
    motion, appearance = (sum(pair[i] for pair in found.values()) / 3 for i in (0, 1))
    parts = {name: sum(pair) for name, pair in found.items()}
    return motion + appearance, {"motion": motion, "appearance": appearance, **parts}


def method(motion: str, weight: float, mixed: float) -> MCM:
    """The method on clips of few numbers."""
    return MCM(motion=motion, frames=1, lora=0, steps=2, mixed=mixed, adversarial_weight=weight)  # type: ignore[arg-type]


def arm(motion: str, mixed: float) -> Arm:
    """With the discriminator of frames, by its weight."""
    return Arm(lambda seed, weight: run(seed, method(motion, weight, mixed)), "adversarial_weight", WEIGHTS)


PROOF = Proof(
    claim="Where consistency distillation compares motion alone, a discriminator of frames gives a video generator of few steps "
    "the looks of better images, and the motion of the clips is kept (Zhai et al. 2024)",
    task=f"clips of {FRAMES} frames of {DIM} numbers, {MOTIONS} motions at 5 places, the teacher exact, frames of better clips "
    f"as images; networks of 3 x 128 trained on the clips before; {STEPS} steps of {BATCH}; only lcm is tuned in its rate",
    metric="energy distance of the motion to the clips', in per cent of that of still clips, plus that of frames to the images', "
    "in per cent of that of the clips' own frames; mean over one, two and four steps",
    arms={
        "lcm": Arm(lambda seed, lr: run(seed, method("raw", 0.0, 0.0), lr), "lr", RATES),
        "lcm, discriminator": arm("raw", 0.0),
        "mcm, differences": arm("diff", 0.5),
        "mcm, not mixed": arm("learn", 0.0),
        "mcm": arm("learn", 0.5),
    },
    comparisons=[
        Comparison("mcm", "lcm"),
        Comparison("mcm", "lcm, discriminator"),
        Comparison("mcm", "mcm, not mixed", asserted=False),
        Comparison("mcm", "mcm, differences", asserted=False),
    ],
    better="lower",
    budget="updates",
)
