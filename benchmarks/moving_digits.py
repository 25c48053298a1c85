"""MCM on digits that move: clips that look worse than the single images that are at hand.

    python benchmarks/moving_digits.py --out benchmarks/results/moving-digits.json

A clip is six frames of 12 x 12 of a digit (scikit-learn's, 8 x 8) that goes straight on and bounces at the border; the clips
are dim, blurred and noisy, the images clean digits at rest. One denoiser is trained on the clips; students begin as it is,
and all their weights learn. Arms of equally many updates: LCM; LCM with a discriminator of frames; and MCM, with the paper's
learned motion (a head of 16 channels) and batches of the student's own clips in half of the steps. On seed 100 LCM is tuned
in its rate, which all arms have, and the others in the discriminator's weight, by the sum of `motion` and `frames`, mean over
one, two and four steps. Cells are written one by one, networks lie in `runs/moving-digits`: stopped and started again, it
goes on. `--picture` draws clips of the first seed.

- `motion`: energy distance from other clips of the path of the digit's centre, less its mean, and of the changes of its way from
  frame to frame, in per cent of that of clips at rest.
- `bends`: how large these changes are, in pixels; clips bounce, and so it is above 0 for them.
- `frames`: Frechet distance from clean frames on features of a classifier, in per cent of that of the clips' own frames.
- `confidence`: of the same classifier, and `same`: how many frames of a clip are the digit that most of them are; per cent.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from cells import Cells, kept
from measuring import machine
from sklearn.datasets import load_digits
from tokens import Tokens
from torch import Tensor, nn

from limbeck import Batch, Optim, Roles, Update
from limbeck.data import Data, TensorSource
from limbeck.diffusion import Cosine, Denoiser, Draws, few_step, flow
from limbeck.diffusion.consistency import sampling_times
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.samples import energy_distance, frechet_distance
from limbeck.methods.mcm.method import MCM
from limbeck.nn.discriminator import FeatureDiscriminator
from limbeck.nn.motion import SpatialHead
from limbeck.prove import fit, seeded

FRAMES, SIDE, JUDGED, STEPS, SCHEDULE = 6, 12, 500, (1, 2, 4), Cosine()
PARTS = {"clips": (0, 500), "images": (500, 1000), "judge": (1000, 1500), "compare": (1500, 1797)}  # of the digits
SETTINGS: dict[str, Any] = {
    "judged": JUDGED, "denoiser": {"rounds": [[1500, 2e-3], [700, 1e-3]], "batch": 64},
    "students": {"updates": 200, "batch": 32, "rates": [3e-4, 1e-3], "weights": [0.1, 0.3], "seeds": 3},
}  # fmt: skip
ARMS = {"lcm": ("raw", 0.0, False), "lcm, discriminator": ("raw", 0.0, True), "mcm": ("learn", 0.5, True)}
FOLDER = Path("runs/moving-digits")


@cache
def digits(part: str) -> tuple[Tensor, Tensor]:
    """Digits `[N, 1, 8, 8]` in 0 .. 1 and their labels."""
    found, rows = load_digits(), slice(*PARTS[part])
    return torch.tensor(found.images[rows] / 16, dtype=torch.float32)[:, None], torch.tensor(found.target[rows])


def placed(x: Tensor, places: Tensor) -> Tensor:
    """Digits `[N, 1, 8, 8]` on an empty canvas, their corners at places `[N, 2]`: `[N, 1, SIDE, SIDE]`."""
    at = torch.arange(SIDE).float()
    columns, rows = at - places[:, :1], at - places[:, 1:]  # [N, SIDE], in pixels of the digit
    grid = torch.stack([columns[:, None].expand(-1, SIDE, -1), rows[:, :, None].expand(-1, -1, SIDE)], -1)
    return F.grid_sample(x, (2 * grid + 1) / 8 - 1, align_corners=False)


def degraded(frames: Tensor, g: torch.Generator) -> Tensor:
    """Dim, blurred and noisy frames `[N, 1, SIDE, SIDE]`."""
    line = torch.tensor([0.25, 0.5, 0.25])
    blurred = F.conv2d(F.pad(frames, (1, 1, 1, 1)), (line[:, None] * line)[None, None])
    return 0.7 * blurred + 0.05 * torch.randn(frames.shape, generator=g)


def scaled(light: Tensor) -> Tensor:
    """What networks see of a brightness in 0 .. 1: of the clips' frames with a mean of about 0."""
    return 4 * light - 0.4


def brightness(x: Tensor) -> Tensor:
    return (x + 0.4) / 4


def clips(seed: int, count: int, part: str = "clips", bad: bool = True) -> Tensor:
    """Clips `[N, 1, FRAMES, SIDE, SIDE]`."""
    g, (x, _) = torch.Generator().manual_seed(seed), digits(part)
    room, speed = SIDE - 8, 0.5 + 0.7 * torch.rand(count, 1, generator=g)
    angle = 2 * math.pi * torch.rand(count, 1, generator=g)
    way = speed * torch.cat([angle.cos(), angle.sin()], 1)
    path = room * torch.rand(count, 1, 2, generator=g) + torch.arange(FRAMES).view(-1, 1) * way[:, None]
    path = room - (path.remainder(2 * room) - room).abs()  # [N, FRAMES, 2], thrown back at the border
    chosen = x[torch.randint(len(x), (count,), generator=g)].repeat_interleave(FRAMES, 0)
    frames = placed(chosen, path.flatten(0, 1))
    frames = degraded(frames, g) if bad else frames
    return scaled(frames).view(count, 1, FRAMES, SIDE, SIDE)


def images(seed: int, count: int, part: str = "images", bad: float = 0.0) -> tuple[Tensor, Tensor]:
    """Digits at rest `[N, 1, SIDE, SIDE]`, a share of them as bad as the clips' frames, and their labels."""
    g, (x, y) = torch.Generator().manual_seed(seed), digits(part)
    rows = torch.randint(len(x), (count,), generator=g)
    frames = placed(x[rows], (SIDE - 8) * torch.rand(count, 2, generator=g))
    worse = torch.rand(count, 1, 1, 1, generator=g) < bad
    return scaled(torch.where(worse, degraded(frames, g), frames)), y[rows]


class Clips(nn.Module):
    """A transformer whose tokens are the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tokens(SIDE * SIDE, 192, depth=4, places=FRAMES)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Clips `[B, 1, FRAMES, SIDE, SIDE]` at times `[B]`."""
        return self.net(x[:, 0].flatten(2), t).view_as(x)


def network() -> nn.Module:
    return Denoiser(Clips(), SCHEDULE, "v_prediction")


def denoise(m: Roles, batch: Batch) -> Update:
    def weight(alpha: Tensor, sigma: Tensor) -> Tensor:
        return (1 / sigma**2).clamp(max=100.0)

    return Update("student", denoising_loss(m, "student", Draws(m, batch), batch.x, weight=weight))


def denoiser() -> nn.Module:
    """Trained on the clips, in rounds."""
    net, how = seeded(7, network), SETTINGS["denoiser"]
    for k, (steps, lr) in enumerate(how["rounds"]):

        def train(net: nn.Module, seed: int = 7 + k, steps: int = steps, lr: float = lr) -> object:
            optim = {"student": Optim("adam", lr=lr, schedule="cosine", clip=1.0)}
            source = TensorSource(clips(seed, steps * how["batch"] // 8))
            return fit(denoise, Roles(student=net), source, optim, steps=steps, batch_size=how["batch"], seed=seed)

        net = kept(FOLDER / f"denoiser-{k + 1}.pt", net, train)
    return net


class Eye(nn.Module):
    """A classifier of frames; `features` are what its convolutions give, and `seen` what its last layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 64), nn.ReLU())
        self.last = nn.Linear(64, 10)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of frames `[N, 1, SIDE, SIDE]`: 16 channels of the whole size, 32 of the half."""
        first = self.first(x)
        return [first, self.second(first)]

    def seen(self, x: Tensor) -> Tensor:
        """`[N, 64]`."""
        return self.third(self.features(x)[1])

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[N, 10]`."""
        return self.last(self.seen(x))


class Maps(nn.Module):
    """What the discriminator sees: the maps of an eye."""

    def __init__(self, eye: Eye) -> None:
        super().__init__()
        self.eye = eye

    def forward(self, x: Tensor) -> list[Tensor]:
        """Of frames `[N, 1, SIDE, SIDE]`."""
        return self.eye.features(x)


@cache
@torch.enable_grad()
def eye(part: str, bad: float) -> Eye:
    """Trained on one part of the digits, at rest."""
    x, y = images(13, 6000, part, bad)

    def train(net: nn.Module) -> object:
        def step(m: Roles, batch: Batch) -> Tensor:
            return F.cross_entropy(m.student(batch.x), batch.y)

        optim = {"student": Optim("adam", lr=3e-3, schedule="cosine")}
        return fit(step, Roles(student=net), TensorSource(x, y), optim, steps=500, batch_size=64)

    found = kept(FOLDER / f"eye-{part}.pt", seeded(len(part), Eye), train)
    assert isinstance(found, Eye)
    return found


def student(teacher: nn.Module, arm: str, seed: int, lr: float, weight: float) -> tuple[nn.Module, int]:
    """A student, and how many updates made it."""
    how, (motion, mixed, game) = SETTINGS["students"], ARMS[arm]
    method = MCM(motion=motion, mixed=mixed, adversarial_weight=weight if game else 0.0, lora=0)  # type: ignore[arg-type]
    m = Roles(teacher=teacher, student=copy.deepcopy(teacher).requires_grad_(True))
    if motion == "learn":
        m.head = seeded(seed, lambda: SpatialHead(1, hidden=16))
    if game:
        m.features = Maps(eye("clips", 0.5))
        m.discriminator = seeded(seed, lambda: FeatureDiscriminator([16, 32]))
    final = {"discriminator": 1.0}
    values = {"student": lr, "head": 1e-3, "discriminator": 1e-3}
    optim = {n: Optim("adam", lr=v, schedule="cosine", final=final.get(n, 0.05)) for n, v in values.items() if n in m}
    count = 20 * how["batch"]
    data = Data(train=TensorSource(clips(1000 + seed, count)), unlabelled=TensorSource(images(2000 + seed, count)[0]))
    passes = fit(method, m, data, optim, steps=how["updates"], batch_size=how["batch"], seed=seed)
    sampler: Any = m.student.module
    return sampler.denoiser.eval(), passes["student"].backward


@torch.no_grad()
def made(net: nn.Module, steps: int, seed: int, count: int = JUDGED) -> Tensor:
    """Clips of a student in few steps."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 1, FRAMES, SIDE, SIDE, generator=g)
    times = sampling_times(SCHEDULE, steps)
    return few_step(net, z, SCHEDULE, times, fresh=lambda i: torch.randn(z.shape, generator=g))


def along(net: nn.Module, steps: int, seed: int, count: int = JUDGED) -> Tensor:
    """Clips along the flow of the denoiser."""
    z = torch.randn(count, 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return flow(net, z, SCHEDULE, steps)


def centres(x: Tensor) -> Tensor:
    """Where the digits are `[N, FRAMES, 2]`, in pixels: the centre of what is above a fifth of the brightness."""
    bright = (brightness(x[:, 0]) - 0.2).clamp_min(0) + 1e-6  # [N, FRAMES, SIDE, SIDE]
    at = torch.arange(SIDE).float()
    return (
        torch.stack([(bright * at).sum((2, 3)), (bright * at[:, None]).sum((2, 3))], -1) / bright.sum((2, 3))[..., None]
    )


def ways(x: Tensor) -> Tensor:
    """Of each clip the path of the centre, less its mean, and the changes of its way `[N, 2 FRAMES - 2, 2]`."""
    found = centres(x)
    return torch.cat([found - found.mean(1, keepdim=True), bends(x)], 1)


def bends(x: Tensor) -> Tensor:
    return centres(x).diff(n=2, dim=1)


@cache
def reference(seed: int) -> dict[str, Any]:
    """What clips are compared with: the ways of others, the features of clean frames, and how far bad ones are from those."""
    see, found = eye("judge", 0.0), ways(clips(seed, JUDGED))
    with torch.no_grad():
        clean = see.seen(images(seed + 1, 1500, "compare")[0])
        own = see.seen(clips(seed + 2, JUDGED).transpose(1, 2).flatten(0, 1))
    still = energy_distance(torch.zeros_like(found), found)
    return {"ways": found, "clean": clean, "still": still, "own": frechet_distance(own, clean)}


@torch.no_grad()
def judge(x: Tensor, seed: int) -> dict[str, float]:
    """See the top of the file."""
    known, see = reference(seed), eye("judge", 0.0)
    frames = x.transpose(1, 2).flatten(0, 1)
    features = see.seen(frames)
    shares = see.last(features).softmax(1)
    votes = F.one_hot(shares.argmax(1), 10).view(len(x), FRAMES, 10).sum(1)
    return {
        "motion": 100 * energy_distance(ways(x), known["ways"]) / known["still"],
        "bends": float(bends(x).norm(dim=2).mean()),
        "frames": 100 * frechet_distance(features, known["clean"]) / known["own"],
        "confidence": 100 * float(shares.amax(1).mean()),
        "same": 100 * float((votes.amax(1) / FRAMES).mean()),
    }


def rounded(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {k: {name: round(value, 3) for name, value in row.items()} for k, row in rows.items()}


def score(rows: dict[str, dict[str, float]]) -> float:
    """What settings are chosen by."""
    return mean(row["motion"] + row["frames"] for row in rows.values())


def spread(values: list[float]) -> list[float]:
    """Mean and deviation."""
    return [round(mean(values), 2), round(stdev(values), 2) if len(values) > 1 else 0.0]


def summary(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and deviation over seeds, of each number, and over the numbers of steps."""
    names = rows[0]["1"]
    rows = [{**row, "mean": {n: mean(row[str(k)][n] for k in STEPS) for n in names}} for row in rows]
    return {k: {n: spread([row[k][n] for row in rows]) for n in names} for k in rows[0]}


def measure(out: Path | None) -> None:
    how = SETTINGS["students"]
    cells = Cells(out, SETTINGS, machine=machine("scikit-learn"))
    teacher, seeds = denoiser(), range(how["seeds"])
    others = {"other clips": True, "clean clips": False}
    for name, bad in others.items():
        cells(name, lambda bad=bad: judge(clips(77, JUDGED, "clips" if bad else "compare", bad), 6000))  # type: ignore[misc]
    cells("denoiser, 50 steps", lambda: rounded({"50": judge(along(teacher, 50, 5000), 6000)}))
    cells("denoiser, few steps", lambda: rounded({str(k): judge(made(teacher, k, 5000), 6000) for k in STEPS}))

    def cell(arm: str, seed: int, lr: float, weight: float) -> dict[str, Any]:
        def one() -> dict[str, Any]:
            net, updates = student(teacher, arm, seed, lr, weight)
            torch.save(net.state_dict(), FOLDER / f"{arm}, seed {seed}, {lr:g}, {weight:g}.pt")
            found = {str(k): judge(made(net, k, 5000 + seed), 6000 + seed) for k in STEPS}
            return {"updates": updates, "steps": rounded(found)}

        return cells(f"{arm}, lr {lr:g}, weight {weight:g}, seed {seed}", one)["steps"]

    chosen, found = {}, {}
    rate = how["rates"][0]
    for arm, (_, _, game) in ARMS.items():
        grid = [(rate, w) for w in how["weights"]] if game else [(lr, 0.0) for lr in how["rates"]]
        tried = {pair: score(cell(arm, 100, *pair)) for pair in grid}
        rate, weight = min(tried, key=lambda pair: tried[pair])  # LCM's rate is then that of all arms
        on = {f"lr {a:g}, weight {b:g}": round(v, 2) for (a, b), v in tried.items()}
        chosen[arm] = {"lr": rate, "weight": weight, "score on seed 100": on}
    rows: dict[str, list[Any]] = {arm: [] for arm in chosen}
    for seed in seeds:
        for arm, own in rows.items():
            own.append(cell(arm, seed, chosen[arm]["lr"], chosen[arm]["weight"]))
            found[arm] = {**chosen[arm], "seeds": len(own), **summary(own)}
        cells.write(students=found)


def picture(out: Path | None, path: Path) -> None:
    """Three clips of each in a row."""
    from pictures import filmstrips

    cells = Cells(out, SETTINGS)
    teacher = denoiser()
    still = images(3, 18)[0].view(3, 6, 1, SIDE, SIDE).transpose(1, 2)
    rows = {"clips": clips(77, 3), "images": still, "denoiser, 50 steps": along(teacher, 50, 5000)[:3]}
    for arm, found in cells.result["students"].items():
        net = network()
        name = f"{arm}, seed 0, {found['lr']:g}, {found['weight']:g}.pt"
        net.load_state_dict(torch.load(FOLDER / name, weights_only=True))
        rows |= {f"{arm}, {k} step{'s' * (k > 1)}": made(net.eval(), k, 5000)[:3] for k in (1, 4)}
    filmstrips({name: brightness(x) for name, x in rows.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON that is written, and read where it is there")
    parser.add_argument("--picture", type=Path, help="draw this instead, from the JSON and the networks")
    args = parser.parse_args()
    measure(args.out) if args.picture is None else picture(args.out, args.picture)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
