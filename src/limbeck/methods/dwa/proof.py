"""Five digits of each class: does the step towards forgetting, and it alone, keep slots apart?"""

import os
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from limbeck.core.roles import Roles
from limbeck.data.condensed import from_source
from limbeck.data.slots import Slots, slots_of
from limbeck.methods.digits_recovered_proof import EACH, diversity, judged, made, real, splits, teacher
from limbeck.methods.dwa.method import DWA
from limbeck.prove import Arm, Comparison, Proof, Trial
from limbeck.teachers.statistics import called


@dataclass(frozen=True)
class Undirected(DWA):
    """As far, in a random direction."""

    def adjust(self, slots: Slots, m: Roles, folder: str | os.PathLike[str]) -> dict[str, list[float]]:
        """Write the weights of every slot."""
        own = {name: p.detach() for name, p in m.teacher.module.named_parameters()}
        small, found = m.student.module, {"after": [0.0] * len(slots)}
        for slot, rows in enumerate(slots.rows):
            g = torch.Generator().manual_seed(1000 * m.seed + slot)
            drawn = {name: torch.randn(w.shape, generator=g) for name, w in own.items()}
            norm = torch.stack([d.square().sum() for d in drawn.values()]).sum().sqrt()
            there = {name: w + self.rho / norm * drawn[name] for name, w in own.items()}
            save_file(there, Path(folder) / f"slot-{slot:05d}.safetensors")
            logits = called(m.teacher, small.x[rows], there)  # type: ignore[index]
            found["after"][slot] = float(F.cross_entropy(logits, small.y[rows]))  # type: ignore[index]
        return found


DIRECTED = DWA(
    rho=0.05, adjustment_steps=12, bn_weight=0.05, variance_weight=5.0, label_epochs=20, label_batch_size=50,
    label_operations=(), temperature=10.0,
)  # fmt: skip
WEIGHED = replace(DIRECTED, rho=0.0)
SRE2L = replace(WEIGHED, variance_weight=1.0)
RANDOM = Undirected(**vars(DIRECTED))
RATES = (0.03, 0.1)


def run(method: DWA, noise: bool, seed: int, lr: float) -> Trial:
    """A set; how far apart its images are for the network that made them, and for another one, which counts."""
    net, other = teacher(seed), teacher(seed, 0, 1)
    small = from_source(splits(seed).train, EACH, seed, noise) if noise else real(seed)
    if noise:
        small.x.data.mul_(0.25).add_(0.5).clamp_(0, 1)
    m, after = Roles(teacher=net, student=small), 0.0
    m.seed = seed
    if method.rho:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            losses = method.adjust(slots_of(small), m, folder)["after"]
        after = sum(losses) / len(losses)
    small = made(method, seed, lr, small, net)
    _, accuracy, passes = judged(seed, small)
    also = {"accuracy (%)": accuracy, "loss of the first images after the step": after}
    return Trial(diversity(net, small.x.detach(), small.y), diversity(other, small.x.detach(), small.y), passes, also)


PROOF = Proof(
    claim="Networks that were led to forget where a slot begins give more diverse images than the same network for all slots, or "
    "networks as far off in a random direction (Du et al. 2024)",
    task="8x8 digits, 5 images of each class from as many real ones, 100 iterations, a network of three blocks of 32 with batch "
    "normalisation, rho = 0.05, K = 12; the diversity of the images in the features of a second network, which took no part",
    metric="mean cosine distance within a class (x 100)",
    arms={
        "sre2l, from noise": Arm(partial(run, SRE2L, True), "lr", RATES),
        "sre2l": Arm(partial(run, SRE2L, False), "lr", RATES),
        "variance weighed": Arm(partial(run, WEIGHED, False), "lr", RATES),
        "random direction": Arm(partial(run, RANDOM, False), "lr", RATES),
        "dwa": Arm(partial(run, DIRECTED, False), "lr", RATES),
    },
    comparisons=[
        Comparison("dwa", "variance weighed"),
        Comparison("dwa", "random direction"),
        Comparison("variance weighed", "sre2l", asserted=False),
        Comparison("random direction", "variance weighed", asserted=False),
    ],
)
