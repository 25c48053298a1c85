"""Five sources, two of them related to the task: does the most similar one teach more than the labels, and more than another?"""

from limbeck.methods.distill_nearest.method import DistillNearest
from limbeck.methods.other_tasks import OtherTasks
from limbeck.methods.other_tasks_proof import ABOUT, RATES, SOURCES, by_similarity, one_of, student
from limbeck.prove import Arm, Comparison, Proof, Trial


class Chosen(OtherTasks):
    """One source, whatever its similarity."""

    source = 0

    def weigh(self, scores: object) -> list[float]:
        """All to that source."""
        return list(one_of(self.source))


def alone(seed: int, lr: float, source: int) -> Trial:
    """A student of one source."""
    kind = type("Chosen", (Chosen,), {"source": source})
    return student(seed, lr, kind(label_weight=0.5))


PROOF = Proof(
    claim="With few labels, the source of another task that is most similar to the task teaches more than the labels alone, and "
    "a wrong choice costs much (Borup, Phoo and Hariharan 2023)",
    task=ABOUT,
    metric="accuracy (%)",
    arms={
        "labels alone": Arm(lambda seed, lr: student(seed, lr, DistillNearest(label_weight=1.0)), "lr", RATES),
        "farthest": Arm(lambda seed, lr: alone(seed, lr, by_similarity(seed)[-1]), "lr", RATES),
        "random source": Arm(lambda seed, lr: alone(seed, lr, seed % SOURCES), "lr", RATES),
        "second": Arm(lambda seed, lr: alone(seed, lr, by_similarity(seed)[1]), "lr", RATES),
        "distill_nearest": Arm(lambda seed, lr: student(seed, lr, DistillNearest(label_weight=0.5)), "lr", RATES),
    },
    comparisons=[
        Comparison("distill_nearest", "labels alone"),
        Comparison("distill_nearest", "farthest"),
        Comparison("distill_nearest", "random source", asserted=False),
        Comparison("distill_nearest", "second", asserted=False),
        Comparison("farthest", "labels alone", asserted=False),
    ],
)
