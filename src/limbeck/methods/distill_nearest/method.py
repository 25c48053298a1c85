"""DistillNearest: of several classifiers of other tasks, the most related one teaches."""

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.methods.other_tasks import OtherTasks


@dataclass(frozen=True)
class DistillNearest(OtherTasks):
    r"""The one source that is most similar to the task teaches a student of which few labels are known.

    $w\, \mathrm{CE}(y, g(f(x))) + (1 - w)\, \mathrm{CE}(p_{s^*}(x), \mathrm{softmax}(g_{s^*}(f(x))))$ with
    $s^* = \arg\max_s e_s$ (Borup, Phoo and Hariharan 2023, section 3), where $e_s$ is the similarity of the features of source s
    to the labels, f the student's feature, g its classifier and $g_s$ a linear head for the classes of the source, which is
    dropped after training. The first mean is over labelled samples, the second over labelled and unlabelled ones.
    There is no public code: `w = 0.8` is inferred. It is `distill_weighted` at an infinite power.

    Args:
        similarity: What `e_s` is, measured once: a function of `limbeck.evaluate.similarity`, of features and labels; "leep", of
            the source's answers, is its exponential.
        label_weight: `w` in [0, 1], the share of the labels.
        probe: Labelled samples that the similarity is measured on, at most; 3 or more.
        normalise: Divide the source's loss by the logarithm of its number of classes.

    Example:
        >>> DistillNearest().weigh([0.3, 0.9, -0.2])
        [0.0, 1.0, 0.0]
    """

    def weigh(self, scores: Sequence[float]) -> list[float]:
        """All to the most similar source; to the first of equals."""
        best = max(range(len(scores)), key=scores.__getitem__)
        return [float(i == best) for i in range(len(scores))]
