"""What the network of SiD's proof does in one and in four steps before it is distilled, on the test noise of the proof.

python benchmarks/sid_undistilled.py --out benchmarks/results/sid-undistilled.json
"""

import json
from pathlib import Path

from measuring import machine, options, report
from torch import Tensor, nn

from limbeck.convert.steps import ToSampler
from limbeck.diffusion import flow
from limbeck.evaluate.compare import paired_interval
from limbeck.methods.mixture_proof import FLOW, begun, coverage, distance

PROOF = Path(__file__).parents[1] / "src/limbeck/methods/sid/proof.json"


class Euler(nn.Module):
    """Four steps along the flow."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return flow(self.denoiser, z, FLOW, 4, condition)


def main() -> None:
    """Judge the networks, and compare them with the student of four steps, seed by seed."""
    given = options(__doc__ or "", seeds=5)
    makes = {
        "1 step": lambda net: ToSampler((1.0,))(net)[0],
        "4 steps, noise again": lambda net: ToSampler((1.0, 0.75, 0.5, 0.25))(net)[0],
        "4 steps, flow": Euler,
    }
    on_mode: dict[str, list[float]] = {name: [] for name in makes}
    distances: dict[str, list[float]] = {name: [] for name in makes}
    for seed in range(given.seeds):
        net = begun(seed, "ring")
        for name, make in makes.items():
            on_mode[name].append(coverage(make(net), "ring", 3000 + seed)["on_mode"])
            distances[name].append(distance(make(net), "ring", 3000 + seed))
    student = json.loads(PROOF.read_text())["arms"]["sid, 4 steps"][: given.seeds]
    gaps = {name: vars(paired_interval(student, values)) for name, values in on_mode.items()}
    found = {"on_mode": on_mode, "energy distance x 100": distances, "sid, 4 steps, less it": gaps}
    report({**found, "machine": machine()}, given.out)


if __name__ == "__main__":
    main()
