"""Two proofs on harder mixtures: SiD on a grid of 25 unequal modes, and VSD's points in space, seen by three cameras.

    python benchmarks/mixtures.py --out benchmarks/results/mixtures.json

Run as proofs are: trials are kept in `runs/mixtures`, and done again when the code that they depend on changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, options, report
from torch import Tensor, nn

from limbeck import Batch, Optim, Roles
from limbeck.data import TensorSource
from limbeck.diffusion import Cosine, Denoiser, GaussianMixture
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.sid.proof import on
from limbeck.methods.vsd.method import VSD
from limbeck.methods.vsd.proof import METHOD, POINTS, RATES, SDS
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, run_proof, seeded

CAMERAS, STEPS = 3, 1500


@lru_cache(maxsize=1)
def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Six modes in space, and the planes and shifts of the cameras: projections without stretching, so that modes stay round."""
    g = torch.Generator().manual_seed(0)
    corners = 2.0 * torch.cat([torch.eye(3), -torch.eye(3)])
    planes = torch.linalg.qr(torch.randn(CAMERAS, 3, 3, generator=g))[0][:, :2]
    return corners, planes, torch.randn(CAMERAS, 2, generator=g)


def seen(points: Tensor, camera: Tensor) -> Tensor:
    """Points `[B, 3]` as cameras `[B]` see them `[B, 2]`."""
    _, planes, shifts = scene()
    return torch.einsum("bij,bj->bi", planes[camera], points) + shifts[camera]


def teacher() -> GaussianMixture:
    """Of what a camera sees of the modes, given the camera."""
    corners, camera = scene()[0].repeat(CAMERAS, 1), torch.arange(CAMERAS).repeat_interleave(6)
    return GaussianMixture(seen(corners, camera), 0.25, Cosine(), labels=camera)


class Points(nn.Module):
    """Points in space, called with a batch of their numbers and cameras."""

    takes_batch = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.points = nn.Parameter(0.5 * torch.randn(POINTS, 3, generator=torch.Generator().manual_seed(seed)))

    def forward(self, batch: Batch) -> Tensor:
        """What the cameras see of them `[B, 2]`."""
        return seen(self.points[batch.x], batch.y)


def network() -> nn.Module:
    return Denoiser(TimeMLP(2, 64, classes=CAMERAS), Cosine(), "sample", null=CAMERAS)


def apart(points: Tensor, seed: int) -> tuple[float, float]:
    """Energy distances to the truth, times 100: of what the cameras see, in the mean, and in space."""
    g = torch.Generator().manual_seed(seed)
    corners, _, _ = scene()
    true = corners[torch.randint(6, (2000,), generator=g)] + 0.25 * torch.randn(2000, 3, generator=g)
    views = [
        energy_distance(*(seen(p, torch.full((len(p),), c)) for p in (points, true))) for c in range(CAMERAS)
    ]  # fmt: skip
    return 100 * sum(views) / CAMERAS, 100 * energy_distance(points, true)


def moved(method: VSD, seed: int, lr: float) -> Trial:
    """The points after training, each seen by every camera in every step."""
    points = Points(seed)
    m = Roles(teacher=teacher(), student=points)
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05)}
    if method.score == "learned":
        m.fake, optim["fake"] = seeded(seed, network), Optim("adam", lr=3e-3)
    x, y = torch.arange(POINTS).repeat(CAMERAS), torch.arange(CAMERAS).repeat_interleave(POINTS)
    passes = fit(method.step, m, TensorSource(x, y), optim, steps=STEPS, batch_size=len(x), seed=seed)
    found = points.points.detach()
    views, space = apart(found, 3000 + seed)
    return Trial(apart(found, 2000 + seed)[0], views, passes, {"in space": space})


def cameras() -> Proof:
    """What VSD's proof shows, where points are seen by cameras."""

    def arm(method: VSD) -> Arm:
        return Arm(partial(moved, method), "lr", RATES)

    return Proof(
        claim="Points that are seen by cameras alone end as samples in space under the gap of two scores, and as few equal ones "
        "under the noise that was drawn (SDS; Wang et al. 2023)",
        task=f"6 Gaussians at the corners of an octahedron, three cameras, the teacher of what they see exact; {POINTS} points, "
        f"{STEPS} steps of all of them and all cameras",
        metric="energy distance times 100, mean over the cameras",
        arms={"sds": arm(SDS), "vsd": arm(METHOD)},
        comparisons=[Comparison("vsd", "sds")],
        better="lower",
    )


PROOFS: dict[str, Callable[[], Proof]] = {
    "sid-grid": partial(on, "grid", "25 Gaussians on a grid, the weight of each nine tenths of the one before"),
    "vsd-cameras": cameras,
}


def main() -> None:
    """Run both."""
    given = options(__doc__ or "", seeds=5)
    found: dict[str, Any] = {
        name: run_proof(make(), name, given.seeds, Path("runs/mixtures") / name, Path(__file__).parent)
        for name, make in PROOFS.items()
    }
    report({**found, "machine": machine()}, given.out)


if __name__ == "__main__":
    main()
