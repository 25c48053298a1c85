"""Five sources, two of them related to the task: do sources teach more, the more similar ones the more?"""

from collections.abc import Callable
from typing import Any

from limbeck.methods.distill_weighted.method import DistillWeighted
from limbeck.methods.other_tasks_proof import ABOUT, RATES, SOURCES, by_similarity, one_of, student
from limbeck.prove import Arm, Comparison, Proof, Trial


def with_fields(**fields: Any) -> Callable[[int, float], Trial]:
    """The method with these fields."""
    return lambda seed, lr: student(seed, lr, DistillWeighted(**{"label_weight": 0.5, **fields}))


def alone(seed: int, lr: float, source: int) -> Trial:
    """One source, whatever its similarity."""
    return student(seed, lr, DistillWeighted(label_weight=0.5, weights=one_of(source)))


PROOF = Proof(
    claim="With few labels, sources of other tasks teach more than the labels alone where they are weighted by their similarity "
    "to the task, and more than with equal weights (Borup, Phoo and Hariharan 2023)",
    task=ABOUT,
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(with_fields(label_weight=1.0), "lr", RATES),
        "farthest": Arm(lambda seed, lr: alone(seed, lr, by_similarity(seed)[-1]), "lr", RATES),
        "random source": Arm(lambda seed, lr: alone(seed, lr, seed % SOURCES), "lr", RATES),
        "nearest": Arm(lambda seed, lr: alone(seed, lr, by_similarity(seed)[0]), "lr", RATES),
        "equal weights": Arm(with_fields(weights=(1.0,) * SOURCES), "lr", RATES),
        "power 1": Arm(with_fields(power=1.0), "lr", RATES),
        "power 4": Arm(with_fields(power=4.0), "lr", RATES),
        "distill_weighted": Arm(with_fields(power=12.0), "lr", RATES),
    },
    comparisons=[
        Comparison("distill_weighted", "labels alone"),
        Comparison("distill_weighted", "equal weights"),
        Comparison("distill_weighted", "farthest", asserted=False),
        Comparison("distill_weighted", "random source", asserted=False),
        Comparison("distill_weighted", "nearest", asserted=False),
        Comparison("power 4", "nearest", asserted=False),
        Comparison("power 1", "equal weights", asserted=False),
    ],
)
