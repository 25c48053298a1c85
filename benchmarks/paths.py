"""How samples travel: the exact teacher in many and few steps, and students of it, on eight Gaussians in the plane.

python benchmarks/paths.py --out docs/img/paths.svg
"""

from typing import Any

import torch
from measuring import options
from torch import Tensor, nn

from limbeck import Optim, Roles
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import flow
from limbeck.methods.mixture_proof import begun, distance, truth
from limbeck.methods.phased_dmd.method import PhasedDMD
from limbeck.methods.sid.method import SiD
from limbeck.prove import fit
from limbeck.report.chart import Scale, Svg

KIND, SIDE, GAP, TOP, REACH, SHOWN = "ring", 220, 12, 40, 3.4, 80


class Recorded(nn.Module):
    """A denoiser that notes where its samples are whenever it is asked."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser, self.places = denoiser, list[Tensor]()
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor | None = None, condition: Tensor | None = None, **more: Any) -> Tensor:
        """The denoiser's samples."""
        self.places.append(x_t.detach())
        found: Tensor = self.denoiser(x_t, t=t, condition=condition, **more)
        return found


def trained(method: Any, steps: int) -> nn.Module:
    """A student, from the weights that all proofs on mixtures begin with."""
    m = Roles(teacher=truth(KIND), student=begun(0, KIND), fake=begun(0, KIND))
    optim = {"student": Optim("adam", lr=1e-3, schedule="cosine", final=0.05), "fake": Optim("adam", lr=3e-3)}
    fit(method, m, Data(train=Noise((2,), 64 * 128)), optim, steps=steps, batch_size=128)
    return m.student.module.eval()


def along(denoiser: Any, z: Tensor, steps: int) -> list[Tensor]:
    """Where samples are on their way along the flow."""
    seen = Recorded(denoiser)
    end = flow(seen, z, denoiser.schedule, steps)
    return [*seen.places, end]


def own(student: Any, z: Tensor) -> list[Tensor]:
    """The same in a student's own steps."""
    seen = student.denoiser = Recorded(student.denoiser)
    end = student(z)
    student.denoiser = seen.denoiser
    return [*seen.places, end]


def panel(svg: Svg, left: float, title: str, places: list[Tensor], note: str) -> None:
    """Ways of some samples, from grey to red, over the rings of the modes."""
    x, y = Scale(-REACH, REACH, left, left + SIDE), Scale(-REACH, REACH, TOP + SIDE, TOP)
    svg.text(left, 16, title, "strong").text(left, 32, note, "soft")
    for mean in truth(KIND).means.tolist():
        svg.add("circle", cx=x(mean[0]), cy=y(mean[1]), r=x(0.2) - x(0), cls="track")
    ways = torch.stack([p[:SHOWN] for p in places], 1).tolist()  # [N, steps + 1, 2]
    for way in ways:
        svg.path([(x(a), y(b)) for a, b in way], "s1 thin")
    for way in ways:
        svg.add("circle", cx=x(way[0][0]), cy=y(way[0][1]), r=1.3, cls="f5")
        svg.add("circle", cx=x(way[-1][0]), cy=y(way[-1][1]), r=2, cls="f0")


def main() -> None:
    """Train the students and draw."""
    given = options(__doc__.splitlines()[0], steps=1200)
    torch.set_num_threads(1)
    z, teacher = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)), truth(KIND)
    students = {
        "SiD, 1 step": trained(SiD(steps=1, guidance=1.0), given.steps),
        "Phased DMD, 4 steps": trained(PhasedDMD(guidance=1.0, fake_steps=4, weight="dmd"), given.steps // 2),
    }
    with torch.no_grad():
        panels = {f"Teacher, {n} step{'s' * (n > 1)}": along(teacher, z, n) for n in (50, 4, 1)}
        panels |= {name: own(student, z) for name, student in students.items()}
        far = {name: distance(student, KIND, 3000, 4000) for name, student in students.items()}
    svg = Svg(len(panels) * (SIDE + GAP) + GAP, TOP + SIDE + GAP, "ways of samples from noise to eight modes")
    for k, (name, places) in enumerate(panels.items()):
        note = f"energy distance x 100: {far[name]:.1f}" if name in far else ""
        panel(svg, GAP + k * (SIDE + GAP), name, places, note)
    given.out.write_text(svg.render(standalone=True), encoding="utf-8")


if __name__ == "__main__":
    main()
