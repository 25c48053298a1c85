"""MDT-dist on clouds of points: a flow of five kinds of shapes, by a small set transformer, in one and two steps.

    python benchmarks/shapes.py --out benchmarks/results/shapes.json

A cloud is 48 points on the surface of a sphere, box, torus, cylinder or cone of random size, turned about the upright axis. One
flow, conditional on the class, is trained on fresh clouds; its network is where students begin. Arms of equally many backward
passes, as in the method's proof: consistency, velocity matching alone, and MDT-dist, whose second loss joins for the last 30 % of
its steps and has a pass of its own. The rate of each is chosen on seed 100 by the energy distance under the Chamfer distance,
mean of one and two steps. Cells are written one by one, the flow lies in `runs/shapes`: stopped and started again, it goes on.
`--picture` draws real clouds and those of the flow and of the first student.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cells, kept
from measuring import machine
from tokens import Tokens
from torch import Tensor, nn

from limbeck import Batch, Optim, Roles, Update
from limbeck.core.stages import Step
from limbeck.data import TensorSource
from limbeck.diffusion import Denoiser, Draws, RectifiedFlow, flow
from limbeck.diffusion.objectives import per_sample
from limbeck.diffusion.scores import denoising_loss
from limbeck.methods.mdt_dist.method import MDTDist, velocity
from limbeck.prove import fit, seeded

KINDS, POINTS, JUDGED, FLOW = ("sphere", "box", "torus", "cylinder", "cone"), 48, 200, RectifiedFlow()
METHOD = MDTDist(vd_start=0.7, vd_weight=3.0)  # as in its proof
SETTINGS: dict[str, Any] = {
    "points": POINTS, "judged": JUDGED, "flow": {"steps": 1600, "batch": 64, "lr": 2e-3},
    "students": {"passes": 260, "batch": 32, "rates": [3e-4, 1e-3], "seeds": 3},
}  # fmt: skip
FOLDER = Path("runs/shapes")


def clouds(y: Tensor, g: torch.Generator, points: int = POINTS) -> Tensor:
    """Clouds `[N, points, 3]` of kinds `[N]`, uniform on the surfaces, coordinates of deviation about 1."""
    x = torch.stack([surface(points, len(y), g) for surface in (sphere, box, torus, cylinder, cone)], 1)
    x = x[torch.arange(len(y)), y]
    angle = 2 * math.pi * torch.rand(len(y), 1, generator=g)
    turned = [angle.cos() * x[..., 0] - angle.sin() * x[..., 1], angle.sin() * x[..., 0] + angle.cos() * x[..., 1]]
    return 1.75 * torch.stack([*turned, x[..., 2]], -1)


def between(low: float, high: float, count: int, g: torch.Generator) -> Tensor:
    """A size for each cloud `[N, 1]`."""
    return low + (high - low) * torch.rand(count, 1, generator=g)


def sphere(points: int, count: int, g: torch.Generator) -> Tensor:
    x = F.normalize(torch.randn(count, points, 3, generator=g), dim=2)
    return between(0.7, 1.3, count, g)[..., None] * x


def box(points: int, count: int, g: torch.Generator) -> Tensor:
    half = between(0.4, 1.1, 3 * count, g).view(count, 1, 3)
    area = half.prod(2, keepdim=True) / half  # of the faces across each axis
    across = F.one_hot(area[:, 0].multinomial(points, True, generator=g), 3).bool()
    x = 2 * torch.rand(count, points, 3, generator=g) - 1
    return half * torch.where(across, x.sign(), x)


def torus(points: int, count: int, g: torch.Generator) -> Tensor:
    big, small = between(0.8, 1.2, count, g), between(0.2, 0.4, count, g)
    tries = 2 * math.pi * torch.rand(count, points, 8, generator=g)  # the outer side has more surface
    taken = torch.rand(count, points, 8, generator=g) < (1 + (small / big)[..., None] * tries.cos()) / 1.5
    inner = tries.gather(2, taken.byte().argmax(2, keepdim=True))[..., 0]
    outer = 2 * math.pi * torch.rand(count, points, generator=g)
    out = big + small * inner.cos()
    return torch.stack([out * outer.cos(), out * outer.sin(), small * inner.sin()], 2)


def cylinder(points: int, count: int, g: torch.Generator) -> Tensor:
    radius, half = between(0.4, 0.8, count, g), between(0.7, 1.2, count, g)
    angle = 2 * math.pi * torch.rand(count, points, generator=g)
    cap = torch.rand(count, points, generator=g) < radius / (radius + 2 * half)
    z = 2 * torch.rand(count, points, generator=g) - 1
    out = radius * torch.where(cap, torch.rand(count, points, generator=g).sqrt(), torch.ones(()))
    return torch.stack([out * angle.cos(), out * angle.sin(), half * torch.where(cap, z.sign(), z)], 2)


def cone(points: int, count: int, g: torch.Generator) -> Tensor:
    radius, half = between(0.7, 1.1, count, g), between(0.7, 1.1, count, g)
    angle = 2 * math.pi * torch.rand(count, points, generator=g)
    foot = torch.rand(count, points, generator=g) < radius / (radius + torch.hypot(radius, 2 * half))
    share = torch.rand(count, points, generator=g).sqrt()
    out = radius * share
    z = half * torch.where(foot, torch.full((), -1.0), 1 - 2 * share)
    return torch.stack([out * angle.cos(), out * angle.sin(), z], 2)


def drawn(seed: int, count: int) -> TensorSource:
    """Clouds of all kinds alike."""
    y = torch.arange(count) % len(KINDS)
    return TensorSource(clouds(y, torch.Generator().manual_seed(seed)), y, classes=list(KINDS))


def network() -> nn.Module:
    return Denoiser(Tokens(3, 64, classes=len(KINDS)), FLOW, "flow_prediction")


def denoise(m: Roles, batch: Batch) -> Update:
    def weight(alpha: Tensor, sigma: Tensor) -> Tensor:
        return (1 / sigma**2).clamp(max=100.0)

    return Update("student", denoising_loss(m, "student", Draws(m, batch), batch.x, batch.y, weight=weight))


def train_flow(net: nn.Module) -> object:
    how = SETTINGS["flow"]
    optim = {"student": Optim("adam", lr=how["lr"], schedule="cosine", clip=1.0)}
    source = drawn(7, how["steps"] * how["batch"] // 4)
    return fit(denoise, Roles(student=net), source, optim, steps=how["steps"], batch_size=how["batch"], seed=7)


def consistency(m: Roles, batch: Batch) -> Update:
    """`x_0` at t is to be that at `t - dt` on the flow, without gradient: the method's times, noise and dt."""
    draws = Draws(m, batch)
    t, noise = METHOD.times(draws), draws.normal("noise", batch.x)
    x_t = FLOW.add_noise(batch.x, noise, t)
    with torch.no_grad():
        v = velocity(m.teacher, x_t, t, batch.y)
        target = m.student(x_t - METHOD.dt * v, t=t - METHOD.dt, condition=batch.y)
    return Update("student", per_sample((m.student(x_t, t=t, condition=batch.y) - target).square()).mean())


def arms(passes: int) -> dict[str, tuple[Step, int]]:
    """Programs and their steps, so that each has as many backward passes."""
    late = round(passes / (1 / (1 - METHOD.vd_start) + 1))
    return {
        "consistency": (consistency, passes),
        "velocity matching": (MDTDist(vd_weight=0.0).step, passes),
        "mdt_dist": (METHOD.step, passes - late),
    }


def student(teacher: nn.Module, arm: str, seed: int, lr: float) -> tuple[nn.Module, int]:
    """A student, and how many backward passes made it."""
    how = SETTINGS["students"]
    program, steps = arms(how["passes"])[arm]
    m = Roles(teacher=teacher, student=copy.deepcopy(teacher).requires_grad_(True))
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05, clip=1.0)}
    source = drawn(1000 + seed, 40 * how["batch"])
    passes = fit(program, m, source, optim, steps=steps, batch_size=how["batch"], seed=seed)
    return m.student.module.eval(), passes["student"].backward


@torch.no_grad()
def made(net: nn.Module, steps: int, seed: int, count: int = JUDGED) -> Tensor:
    """Clouds of all kinds alike, in Euler steps: of an average velocity too."""
    z = torch.randn(count, POINTS, 3, generator=torch.Generator().manual_seed(seed))
    return flow(net, z, FLOW, steps, condition=torch.arange(count) % len(KINDS))


@torch.no_grad()
def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """The Chamfer distance `[N, M]`: how far each point is from the nearest of the other cloud, mean over both ways."""
    flat, rows = y.flatten(0, 1), []
    for own in x:  # [P, 3]
        d = torch.cdist(own, flat).unflatten(1, (len(y), -1))  # [P, M, Q]
        rows.append((d.amin(2).mean(0) + d.amin(0).mean(1)) / 2)
    return torch.stack(rows)


@cache
def real(seed: int) -> tuple[Tensor, Tensor]:
    """Clouds to compare with, and their distances among each other."""
    x = drawn(seed, JUDGED).batch(torch.arange(JUDGED), 0).x
    return x, chamfer(x, x)


class PointNet(nn.Module):
    """Layers on each point, the maximum, layers on that (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128))
        self.whole = nn.Sequential(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, len(KINDS)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[B, classes]` of clouds `[B, N, 3]`."""
        return self.whole(self.points(x).amax(1))


@cache
@torch.enable_grad()
def pointnet() -> nn.Module:
    """Trained on real clouds."""
    net: nn.Module = seeded(0, PointNet)

    def step(m: Roles, batch: Batch) -> Tensor:
        return F.cross_entropy(m.student(batch.x), batch.y)

    optim = {"student": Optim("adam", lr=2e-3, schedule="cosine")}
    fit(step, Roles(student=net), drawn(11, 10_000), optim, steps=400, batch_size=64)
    return net.eval()


@torch.no_grad()
def judge(x: Tensor, seed: int) -> dict[str, float]:
    """Clouds against as many real ones: what nearest neighbours tell, in per cent; and the energy distance, times 100."""
    y, within = real(seed)
    own, across = chamfer(x, x), chamfer(x, y)
    count, far = len(x), torch.eye(len(x)) * 1e9
    whole = torch.cat([torch.cat([own + far, across], 1), torch.cat([across.T, within + far], 1)])
    origin = torch.arange(2 * count) < count
    told = origin[whole.argmin(1)] == origin
    energy = 2 * across.mean() - (own.sum() + within.sum()) / (count * (count - 1))
    agrees = pointnet()(x).argmax(1) == torch.arange(count) % len(KINDS)
    return {
        "nearest neighbour": 100 * float(told.double().mean()),
        "coverage": 100 * len(across.argmin(1).unique()) / count,
        "class": 100 * float(agrees.double().mean()),
        "energy": 100 * float(energy),
    }


def judged(net: nn.Module, steps: tuple[int, ...], seed: int) -> dict[str, dict[str, float]]:
    found = {str(k): judge(made(net, k, 5000 + seed), 6000 + seed) for k in steps}
    return {k: {name: round(value, 2) for name, value in row.items()} for k, row in found.items()}


def rates(net: nn.Module) -> dict[str, float]:
    """Clouds a second of CPU, by steps."""
    found = {}
    for steps in (1, 2, 50):
        made(net, 1, 0)
        began = time.process_time()
        made(net, steps, 0)
        found[str(steps)] = round(JUDGED / (time.process_time() - began), 1)
    return found


def spread(values: list[float]) -> list[float]:
    """Mean and deviation."""
    return [round(mean(values), 2), round(stdev(values), 2) if len(values) > 1 else 0.0]


def summary(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and deviation over seeds, of each number."""
    return {k: {n: spread([row[k][n] for row in rows]) for n in found} for k, found in rows[0].items()}


def measure(out: Path | None) -> None:
    how = SETTINGS["students"]
    cells = Cells(out, SETTINGS, machine=machine())
    teacher = kept(FOLDER / "flow.pt", seeded(7, network), train_flow)
    seeds = range(how["seeds"])
    cells("pointnet on real clouds", lambda: {"class": judge(real(6100)[0], 6000)["class"]})
    cells("other real clouds", lambda: {"by seed": [judge(real(6100 + s)[0], 6000 + s) for s in seeds]})
    cells("clouds a second", lambda: rates(teacher))
    before = [cells(f"flow, seed {s}", lambda s=s: judged(teacher, (1, 2, 50), s)) for s in seeds]  # type: ignore[misc]
    for row in before:
        row.pop("cpu_s")
    cells.write(flow=summary(before))

    def cell(arm: str, seed: int, lr: float) -> dict[str, Any]:
        def one() -> dict[str, Any]:
            net, passes = student(teacher, arm, seed, lr)
            if arm == "mdt_dist" and seed == 0:
                torch.save(net.state_dict(), FOLDER / "student.pt")
            return {"passes": passes, "steps": judged(net, (1, 2), seed)}

        return cells(f"{arm}, lr {lr:g}, seed {seed}", one)["steps"]

    chosen, found = {}, {}
    for arm in arms(how["passes"]):
        tried = {lr: round(mean(row["energy"] for row in cell(arm, 100, lr).values()), 2) for lr in how["rates"]}
        chosen[arm] = {"lr": min(tried, key=lambda rate: tried[rate]), "energy on seed 100": tried}
    rows: dict[str, list[Any]] = {arm: [] for arm in chosen}
    for seed in seeds:
        for arm, own in rows.items():
            own.append(cell(arm, seed, chosen[arm]["lr"]))
            found[arm] = {**chosen[arm], "seeds": len(own), **summary(own)}
        cells.write(students=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON that is written, and read where it is there")
    parser.add_argument("--picture", type=Path, help="draw this instead")
    args = parser.parse_args()
    if args.picture is None:
        return measure(args.out)
    from pictures import clouds_in_rows

    nets = [network() for _ in range(2)]
    for net, name in zip(nets, ("flow.pt", "student.pt"), strict=True):
        net.load_state_dict(torch.load(FOLDER / name, weights_only=True))
    flow_net, fast = (net.eval() for net in nets)
    many = {"real": real(6000)[0], "flow, 50 steps": made(flow_net, 50, 5000), "flow, 1 step": made(flow_net, 1, 5000)}
    many |= {f"MDT-dist, {k} step{'s' * (k > 1)}": made(fast, k, 5000) for k in (1, 2)}
    clouds_in_rows({name: x[:10] for name, x in many.items()}, args.picture)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
