"""One digit of each class, and experts that are good: can a set follow them?"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from limbeck.core.errors import RunError
from limbeck.data.coresets import medoids
from limbeck.methods.ast.method import AST
from limbeck.methods.digits_condensed_proof import begun, condense, experts, judged, planned, splits, unchanged
from limbeck.methods.ftd.method import FTD
from limbeck.optim.unroll import call_flat
from limbeck.prove import Arm, Comparison, Proof, Trial
from limbeck.teachers.trajectories import ExpertTraining

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
WHOLE = AST(
    experts=4, epochs=14, expert_lr=0.02, expert_batch_size=64, penalty=0.05, student_steps=10, starts=10,
    perturbation=0.0, step_size=0.02, step_size_lr=1e-4, form="full",
)  # fmt: skip
BARE = replace(WHOLE, balanced=False, intermediate="none", init="real")


def plain(method: AST) -> ExpertTraining:
    """Experts with momentum and decay, and nothing that smooths them."""
    return replace(method.expert_training, ramp=False, penalty=0.0, drop=1.0)


@lru_cache(maxsize=2)
def representatives(seed: int) -> Tensor:
    """Rows of the digits nearest to the centres of an expert's logits, one of each class."""
    known, source = experts(seed, WHOLE.expert_training), splits(seed).train
    x = source.batch(torch.arange(len(source)), 0).x
    with torch.no_grad():
        logits = call_flat(known.network, known(0, WHOLE.epochs), x)
    return medoids(logits, source.labels, 1, 1, seed)


def run(method: AST | FTD, training: ExpertTraining, seed: int, lr: float) -> Trial:
    """A set, and what networks make of it."""
    rows = representatives(seed) if isinstance(method, AST) and method.init == "medoids" else None
    try:
        small, passes = condense(seed, lr, method, experts(seed, training), begun(seed, BARE.step_size, rows), 4)
    except RunError:  # it diverged at this rate, which is never chosen
        return Trial(math.nan, math.nan, planned(method))
    return Trial(*judged(seed, small), passes)


@lru_cache(maxsize=2)
def untouched(seed: int) -> Trial:
    """Real samples, and what networks make of them: there is no rate."""
    return Trial(*judged(seed, begun(seed, BARE.step_size)), unchanged())


MTT = FTD(
    radius=0.0, experts=4, epochs=14, expert_lr=0.05, expert_batch_size=64, student_steps=10, starts=10, step_size=0.02,
    step_size_lr=1e-4, ema=0.0, form="full",
)  # fmt: skip

PROOF = Proof(
    claim="Good experts, with momentum and decay, are hard to match as they are, and can be matched when they are smoothed; what "
    "is learned teaches more where the student's loss is balanced (Shen, Yang and Lam 2023)",
    task="8x8 digits, 1 sample of each class, 64-64-10 MLP, 4 experts of 14 epochs, 250 iterations of N = 10, M = 2; three "
    "networks trained from scratch on each set, 300 steps; no perturbation, which is of convolutions",
    metric="accuracy (%)",
    arms={
        "real samples": Arm(lambda seed, lr: untouched(seed), "lr", RATES),
        "mtt, plain experts": Arm(partial(run, MTT, MTT.expert_training), "lr", RATES),
        "strong experts": Arm(partial(run, BARE, plain(BARE)), "lr", RATES),
        "smooth experts": Arm(partial(run, BARE, BARE.expert_training), "lr", RATES),
        "ast, not balanced": Arm(partial(run, replace(WHOLE, balanced=False), WHOLE.expert_training), "lr", RATES),
        "ast": Arm(partial(run, WHOLE, WHOLE.expert_training), "lr", RATES),
    },
    comparisons=[
        Comparison("smooth experts", "strong experts"),
        Comparison("ast", "smooth experts"),
        Comparison("ast", "ast, not balanced"),
        Comparison("ast", "real samples"),
        Comparison("mtt, plain experts", "real samples"),
        Comparison("ast", "mtt, plain experts", asserted=False),
    ],
)
