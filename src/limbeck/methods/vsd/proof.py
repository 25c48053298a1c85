"""64 points on the plane under an exact teacher: do they end as samples of its mixture, or as copies of its modes?"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import TensorSource
from limbeck.diffusion import Cosine, Denoiser, GaussianMixture, ring
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.vsd.method import VSD
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, seeded

POINTS, STEPS = 64, 1500
RATES = (0.01, 0.03, 0.1)
METHOD = VSD(guidance=1.0, dropout=0.0, late=0.5, anneal=1.0)


class Particles(nn.Module):
    """Points that are parameters, called with their numbers."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(start)

    def forward(self, rows: Tensor) -> Tensor:
        """The points `[B, D]` of rows `[B]`."""
        return self.points[rows]


class Kernel(nn.Module):
    """The exact score of what the points are: every point a component without width."""

    def __init__(self, particles: Particles) -> None:
        super().__init__()
        self.schedule, self.seen = Cosine(), [particles]  # in a list: not a part of it

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """`E[x_0 | x_t]` `[B, D]`."""
        points = self.seen[0].points.detach()
        return GaussianMixture(points, 1e-4, self.schedule)(x_t, t)


@dataclass(frozen=True)
class Oracle(VSD):
    """VSD with the exact score of the points: nothing learns but them."""

    def step(self, m, batch):  # type: ignore[no-untyped-def]
        """The update of the points alone."""
        yield next(super().step(m, batch))


def denoiser() -> nn.Module:
    """What follows the points."""
    return Denoiser(TimeMLP(2, 64), Cosine(), "sample")


@lru_cache(maxsize=1)
def truth(seed: int) -> tuple[Tensor, Tensor]:
    """Draws of the teacher's mixture, to tune on and to test."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return ring(5, 2.0, 0.25).sample(2000, generator), ring(5, 2.0, 0.25).sample(2000, generator)


def moved(seed: int, method: VSD, lr: float) -> Trial:
    """How far from the mixture the points are after training."""
    start = 0.5 * torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(seed))
    particles = Particles(start)
    m = Roles(teacher=ring(5, 2.0, 0.25), student=particles)
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05)}
    if isinstance(method, Oracle):
        m.fake = Kernel(particles)
    elif method.score == "learned":
        m.fake = seeded(seed, denoiser)
        optim["fake"] = Optim("adam", lr=3e-3)
    source = TensorSource(torch.arange(POINTS), ids=torch.arange(POINTS))
    passes = fit(method.step, m, source, optim, steps=STEPS, batch_size=POINTS, seed=seed)
    x = particles.points.detach()
    first, second = (100 * energy_distance(x, y) for y in truth(seed))
    return Trial(first, second, passes)


def arm(method: VSD) -> Arm:
    """The method at three learning rates of the points."""
    return Arm(lambda seed, lr: moved(seed, method, lr), "lr", RATES)


SDS = replace(METHOD, score="noise")
PROOF = Proof(
    claim="Points under the gap of two scores end as samples of the teacher's distribution; under the noise that was drawn (SDS) "
    "they end as few equal ones (Wang et al. 2023)",
    task=f"a mixture of 5 Gaussians on a ring, the teacher exact; {POINTS} points that start around its centre, {STEPS} steps of "
    "all of them, cosine schedule of noise; what follows the points is an MLP of 3 x 64, or exact ('oracle')",
    metric="energy distance to the teacher's mixture, times 100",
    arms={
        "sds": arm(SDS),
        "sds, annealed": arm(replace(SDS, anneal=0.2)),
        "vsd, oracle": arm(Oracle(**vars(METHOD))),
        "vsd, annealed": arm(replace(METHOD, anneal=0.2)),
        "vsd": arm(METHOD),
    },
    comparisons=[
        Comparison("vsd", "sds"),
        Comparison("vsd", "sds, annealed"),
        Comparison("vsd, annealed", "vsd", asserted=False),
        Comparison("vsd, oracle", "vsd", asserted=False),
    ],
    better="lower",
)
