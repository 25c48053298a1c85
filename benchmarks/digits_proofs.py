"""Two proofs on digits: SwiftBrush beside SDS and regression, and whether Phased DMD keeps the classes that nobody asks for.

    python benchmarks/digits_proofs.py --out benchmarks/results/digits-proofs.json

The teacher is a U-Net as in `fewstep.py`. SwiftBrush and its baselines are given classes, and judged by the Frechet distance in
the features of a classifier that is trained on the images. Phased DMD and its baselines are given none: what counts is how far
the shares of the classes, by that classifier, are from those of the teacher in 50 steps. All arms have as many updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from fewstep import TASKS, generate, judge, judged, once, teacher
from fewstep_models import CLASSES, FLOW
from measuring import machine, options, report
from torch import Tensor, nn

from limbeck import Optim, Roles
from limbeck.convert.steps import ToExperts
from limbeck.core.source import Source
from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import flow
from limbeck.evaluate.budget import Passes
from limbeck.methods.phased_dmd.method import PhasedDMD
from limbeck.methods.phased_dmd.proof import ByTime
from limbeck.methods.swiftbrush.method import SwiftBrush
from limbeck.methods.swiftbrush.proof import GUIDANCE, regress, sds
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, run_proof, seeded

NAME, STEPS, RATES, COUNT = "digits-unet", 240, (1e-4, 3e-4), 2000
TASK = TASKS[NAME]
SWIFTBRUSH = SwiftBrush(guidance=GUIDANCE)
PHASED = PhasedDMD(guidance=1.0, fake_steps=1, weight="dmd")


def begun() -> nn.Module:
    """The teacher's network and weights."""
    net = seeded(0, TASK.network)
    net.load_state_dict(teacher(NAME).state_dict())
    return net


def train(program: Any, m: Roles, data: Source | Data, lr: float, seed: int, steps: int = STEPS) -> dict[str, Passes]:
    """Adam for the student, its rate falling, and for what follows it, where something does."""
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05, warmup=10)}
    if "fake" in m:
        optim["fake"] = Optim("adam", lr=1e-3)
    passes = fit(program, m, data, optim, steps=steps, batch_size=TASK.batch, seed=seed)
    m.student.module.eval()
    return passes


# With classes


@cache
def pairs(seed: int) -> TensorSource:
    """Noise, and where 10 steps of the teacher's flow end from it: as many evaluations as the others' guided ones."""
    count = 2 * STEPS * TASK.batch // 10
    z = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % CLASSES
    with torch.no_grad():
        x = torch.cat(
            [flow(teacher(NAME), a, FLOW, 10, b) for a, b in zip(z.split(256), y.split(256), strict=True)]
        )  # fmt: skip
    return TensorSource(torch.cat([z, x], 1), y)


def conditional(program: Any, follows: bool, seed: int, lr: float) -> Trial:
    """A student of one call."""
    m = Roles(teacher=teacher(NAME), student=begun())
    if follows:
        m.fake = begun()
    data = pairs(seed) if program is regress else Noise((1, 8, 8), 100 * TASK.batch, CLASSES, seed=seed)
    passes = train(program, m, data, lr, seed)
    return with_classes(once(m.student.module)[0], passes, seed)


def with_classes(call: Callable[[Tensor, Tensor], Tensor], passes: Mapping[str, Passes], seed: int) -> Trial:
    """The distance on validation and test images; whether samples are of their classes, and lie near images."""
    validation, test = (judged(TASK, *generate(TASK, call, COUNT, s + seed), k) for s, k in ((2000, 1), (3000, 2)))
    return Trial(validation["frechet"], test.pop("frechet"), passes, test)


def swiftbrush() -> Proof:
    """What the paper compares with."""

    def arm(program: Any, follows: bool = False) -> Arm:
        return Arm(partial(conditional, program, follows), "lr", RATES)

    return Proof(
        claim="One call of a network that follows the gap of two scores makes better digits than one that follows the drawn "
        "noise (SDS), or that learns where the teacher's flow ends (Nguyen and Tran 2024)",
        task=f"a U-Net of scikit-learn's digits at 8 px, given the class; {STEPS} updates of {TASK.batch}",
        metric="Frechet distance to test images in a classifier's features",
        arms={"sds": arm(sds), "regression": arm(regress), "swiftbrush": arm(SWIFTBRUSH.step, follows=True)},
        comparisons=[Comparison("swiftbrush", "sds"), Comparison("swiftbrush", "regression")],
        better="lower",
        budget="updates",
    )


# Without classes


def alone(method: PhasedDMD, seed: int, lr: float) -> Trial:
    """All steps in one phase; of several, two experts learn together."""
    phase = method.plan(FLOW)[0]
    several = ToExperts((0.625,) if method.steps > 1 else ())(begun())[0]
    m = Roles(teacher=teacher(NAME), student=ByTime(several, phase.times, "ddim"), fake=begun())
    source = Noise((1, 8, 8), 100 * TASK.batch, seed=seed)
    passes = train(partial(method.step, phase=phase), m, source, lr, seed)
    return without(m.student.module, passes, seed)


def phased(method: PhasedDMD, seed: int, lr: float) -> Trial:
    """The method, each phase with its share of the updates."""
    m = Roles(teacher=teacher(NAME), student=begun(), fake=begun())
    data = Data(train=Noise((1, 8, 8), 100 * TASK.batch, seed=seed))
    passes = train(method, m, data, lr, seed, STEPS // method.phases)
    return without(m.student.module, passes, seed)


@torch.no_grad()
def drawn(call: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """Samples without a class."""
    return generate(TASK, lambda z, y: call(z), COUNT, seed)[0]


@torch.no_grad()
def shares(x: Tensor) -> Tensor:
    """Of the classes `[10]`, by the classifier."""
    return judge(TASK.splits, TASK.judge)(x).argmax(1).bincount(minlength=CLASSES) / len(x)


@lru_cache(maxsize=1)
def expected() -> Tensor:
    """The shares of the teacher's samples in 50 steps."""
    return shares(drawn(lambda z: flow(teacher(NAME), z, FLOW, 50), 999))


def without(student: Callable[[Tensor], Tensor], passes: Mapping[str, Passes], seed: int) -> Trial:
    """The total variation, of noise to choose by and of noise to report; the entropy, and how near the samples are to images."""
    validation, test = (drawn(student, first + seed) for first in (2000, 3000))
    far = [100 * float((shares(x) - expected()).abs().sum() / 2) for x in (validation, test)]
    near = judged(TASK, test, torch.zeros(COUNT, dtype=torch.long), 2)
    del near["agreement"]  # with classes that were not asked for
    return Trial(far[0], far[1], passes, {"entropy": float(torch.special.entr(shares(test)).sum()), **near})


def phases() -> Proof:
    """What the paper compares with."""
    return Proof(
        claim="Four steps in two phases, an expert for each, keep more of the teacher's variety than one step, or than four "
        "of which a random one is the last (Fan et al. 2025)",
        task=f"a U-Net of scikit-learn's digits at 8 px, given no class; {STEPS} updates of {TASK.batch}",
        metric="total variation between the shares of the classes and the teacher's, per cent",
        arms={
            "one step": Arm(partial(alone, replace(PHASED, steps=1, phases=1)), "lr", RATES),
            "one phase, two experts": Arm(partial(alone, replace(PHASED, phases=1)), "lr", RATES),
            "phased_dmd": Arm(partial(phased, PHASED), "lr", RATES),
        },
        comparisons=[Comparison("phased_dmd", "one phase, two experts"), Comparison("phased_dmd", "one step")],
        better="lower",
        budget="updates",
    )


def main() -> None:
    """The proofs, and the teacher's own numbers beside them."""
    given = options(__doc__ or "", seeds=3)
    torch.set_num_threads(1)
    teacher(NAME), judge(TASK.splits, TASK.judge)  # they learn here, where gradients are on
    rows: dict[str, Any] = {}
    for n in (50, 4, 1):
        told, free = (
            with_classes(lambda z, y, n=n: flow(teacher(NAME), z, FLOW, n, y), {}, 0),
            without(lambda z, n=n: flow(teacher(NAME), z, FLOW, n), {}, 0),
        )
        rows[f"teacher, {n} step{'s' * (n > 1)}"] = {
            "swiftbrush": {"test": told.test, **told.also},
            "phased_dmd": {"test": free.test, **free.also},
        }
    print(rows, flush=True)
    results = {
        name: run_proof(
            make(), f"{name} on digits", given.seeds, Path("runs/digits-proofs") / name, Path(__file__).parent
        )
        for name, make in (("swiftbrush", swiftbrush), ("phased_dmd", phases))
    }
    report({**results, "teacher": rows, "machine": machine("diffusers")}, given.out)


if __name__ == "__main__":
    main()
