"""What proofs of few-step methods share: exact teachers in two dimensions, networks that begin as denoisers, and distances."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.optim import Optim
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Step
from limbeck.core.update import Update
from limbeck.data.sources import TensorSource
from limbeck.diffusion import Denoiser, Draws, GaussianMixture, RectifiedFlow, grid, ring
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.budget import Passes
from limbeck.evaluate.samples import energy_distance, mode_coverage
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import fit, seeded

FLOW = RectifiedFlow()
CLASSES = {"classes": 4, "many": 8}


def truth(kind: str) -> GaussianMixture:
    """`ring`: 8 modes of deviation 0.1 at radius 2; `grid`: 25 modes whose weights fall by a tenth each; `classes`: 8 modes of
    4 classes; `many`: 24 scattered modes of 8 classes."""
    if kind == "many":
        g = torch.Generator().manual_seed(0)
        means = 2 * torch.randn(24, 2, generator=g)
        return GaussianMixture(means, 0.15, FLOW, labels=torch.arange(24) % 8)
    if kind == "grid":
        return grid(5, 1.0, 0.08, FLOW, falling=True)
    return ring(8, 2.0, 0.1 if kind == "ring" else 0.15, FLOW, classes=4 if kind == "classes" else None)


def network(kind: str = "ring", hidden: int = 64) -> nn.Module:
    """A denoiser of two numbers, 3 layers."""
    classes = CLASSES.get(kind, 0)
    net = TimeMLP(2, hidden, classes=classes)
    return Denoiser(net, FLOW, "flow_prediction", null=classes or None)


@lru_cache(maxsize=4)
def drawn(seed: int, kind: str) -> TensorSource:
    """20,000 samples of the mixture."""
    known = truth(kind)
    y = torch.arange(20_000) % CLASSES[kind] if kind in CLASSES else None
    return TensorSource(known.sample(20_000, torch.Generator().manual_seed(seed), y), y)


def denoise(m: Roles, batch: Batch) -> Update:
    """What a network is trained by first: the velocity at samples with noise."""
    loss = denoising_loss(m, "student", Draws(m, batch), batch.x, batch.get("y"), dropout=0.1, weight=_velocity)
    return Update("student", loss)


def _velocity(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (1 / sigma**2).clamp(max=100.0)


@lru_cache(maxsize=4)
def trained(seed: int, kind: str, hidden: int = 64, steps: int = 2000) -> Mapping[str, Tensor]:
    """The weights of a network trained on samples: where students, and what follows them, begin."""
    m = Roles(student=seeded(seed, lambda: network(kind, hidden)))
    optim = {"student": Optim("adam", lr=2e-3, schedule="cosine")}
    fit(denoise, m, drawn(seed, kind), optim, steps=steps, batch_size=256, seed=seed)
    return m.student.module.state_dict()


def begun(seed: int, kind: str, hidden: int = 64) -> nn.Module:
    """A network with these weights."""
    net = network(kind, hidden)
    net.load_state_dict(dict(trained(seed, kind, hidden)))
    return net


def distil(
    program: Step, m: Roles, data: Source, rates: Mapping[str, float], steps: int, batch: int, seed: int
) -> dict[str, Passes]:
    """Train the roles that have rates, by Adam, the student's falling; the passes through all roles."""
    final = {"student": 0.05}
    optim = {n: Optim("adam", lr=lr, schedule="cosine", final=final.get(n, 1.0)) for n, lr in rates.items()}
    passes = fit(program, m, data, optim, steps=steps, batch_size=batch, seed=seed)
    m.student.module.eval()
    return passes


@torch.no_grad()
def samples(student: Role | nn.Module, seed: int, count: int = 2000, y: Tensor | None = None) -> Tensor:
    """A student's samples, always of the same noise for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of noise between steps too
        return student(torch.randn(count, 2), condition=y)


def distance(student: Role | nn.Module, kind: str, seed: int, count: int = 2000) -> float:
    """Energy distance to the mixture, times 100; of classes the mean over them."""
    known, total = truth(kind), 0.0
    for c in range(CLASSES[kind]) if kind in CLASSES else [None]:
        y = None if c is None else torch.full((count,), c)
        true = known.sample(count, torch.Generator().manual_seed(seed + 1), y)
        total += energy_distance(samples(student, seed, count, y), true) / CLASSES.get(kind, 1)
    return 100 * total


def coverage(student: Role | nn.Module, kind: str, seed: int, count: int = 2000) -> dict[str, float]:
    """How its samples lie on the modes; `weights`, the total variation between the shares of the modes and the true ones."""
    known, x = truth(kind), samples(student, seed, count)
    found = mode_coverage(x, known.means, known.std)
    near = torch.cdist(x, known.means).argmin(1)
    shares = torch.bincount(near, minlength=len(known.means)) / len(x)
    return {"on_mode": 100 * found["on_mode"], "weights": 100 * float((shares - known.weights).abs().sum() / 2)}
