"""Images that several networks vote on, and labels from the statistics of the batch that will be seen."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.condensed import Become, Condensed
from limbeck.data.coresets import mosaics
from limbeck.data.ids import numbers
from limbeck.data.slots import Slots, slots_of
from limbeck.methods.checks import check_field
from limbeck.methods.recovery import Recovered, total
from limbeck.teachers.committee import CHOICES, Choice, seats, votes
from limbeck.teachers.relabel import mean_logits


@dataclass(frozen=True)
class CVDD(Recovered):
    r"""Committee voting (Cui et al. 2025); with one teacher it is SRe2L++, its base.

    A slot, one image of each class, is recovered by some members S of the committee:
    $\sum_{m \in S} w_m (\mathrm{CE}(f_m(x), y) + r_{bn} \sum_l c_l (\lVert \mu_l - m_l \rVert + \lVert s_l - v_l \rVert))$,
    all of them on one view, with $w_m = e^{a_m / T} / \sum_{k \in S} e^{a_k / T}$. Labels are the members' mean logits,
    weighed over the whole committee, on the very batches that a training will see, normalised by the statistics of these
    (BSSL).

    Args:
        init: Images to begin with: `mosaics` of real patches of medium difficulty, or `real`, as they are given.
        members: Teachers of a slot; at most as many as there are.
        priors: `a_m` of each teacher, in PER CENT: the accuracy of a network trained on what that teacher alone distils, on
            validation data; the method `dwa` with `rho=0, variance_weight=1` tells it. None for equal votes.
        choice: `all`: the combinations in turn; `random`: one for each slot; `best`: those with the largest priors.
        vote_temperature: `T` of the images' votes.
        label_vote_temperature: That of the labels'.
        classes_at_once: Classes of a slot at most; None for all.
        variant: `paper`: a batch is labelled, and shown to networks that are trained on the set, as it is; `code`: in two
            halves, each with statistics of its own.

    Example:
        >>> import torch
        >>> from limbeck import Roles
        >>> from limbeck.data.condensed import Condensed
        >>> nets = {f"teacher_{i}": torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)) for i in range(3)}
        >>> m = Roles(**nets, student=Condensed(torch.rand(4, 4), torch.tensor([0, 0, 1, 1])))
        >>> slots = slots_of(m.student.module)
        >>> [update.apply for update in CVDD(operations=()).step(slots, m, slots(0, m.rng()))]
        [False, True]
    """

    averages: ClassVar[bool] = False

    operations: tuple[str, ...] = ("crop", "flip", "roll")
    label_batch_size: int = 16
    label_operations: tuple[str, ...] = ("crop", "flip")
    label_statistics: Literal["running", "batch"] = "batch"
    init: Literal["mosaics", "real"] = "mosaics"
    members: int = 2
    priors: tuple[float, ...] | None = None
    choice: Choice = "all"
    vote_temperature: float = 5.0
    label_vote_temperature: float = 10.0
    classes_at_once: int | None = None
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field("init", self.init, self.init in ("mosaics", "real"), "mosaics | real")
        check_field("members", self.members, self.members >= 1, "1 or more")
        check_field("choice", self.choice, self.choice in CHOICES, " | ".join(CHOICES))
        for name in ("vote_temperature", "label_vote_temperature"):
            check_field(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")
        enough = self.variant == "paper" or self.label_batch_size >= 4
        check_field("label_batch_size", self.label_batch_size, enough, "4 or more, two samples for each half")
        at_once = self.classes_at_once
        check_field("classes_at_once", at_once, at_once is None or at_once >= 2, "2 or more, or none for all")

    def check(self, m: Roles, batch: Batch) -> None:
        """As the base class, there is one prior for each teacher, and mosaics are of images."""
        super().check(m, batch)
        if self.init == "mosaics" and (not isinstance(batch.x, Tensor) or batch.x.ndim != 4):
            raise UsageError(
                "mosaics are made of images", where="method.init", found=repr(batch), expected="samples [C, H, W]",
                fix="set init to real",
            )  # fmt: skip
        if self.priors is not None and len(self.priors) != len(m.teachers):
            raise UsageError(
                "priors and teachers differ in number", where="method.priors", found=len(self.priors),
                expected=f"{len(m.teachers)}, one for each teacher in their order",
            )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Images to begin with, images, labels."""
        small: Any = m.student.module
        slots = slots_of(small, self.classes_at_once)
        begun = self.begun(small)
        if self.init == "mosaics":
            check_patches(data.train, small.images_per_class)
            made = yield Collect("mosaics", partial(self.mosaics, data.train))
            if made.value is not None:
                begun = Condensed(made.value.to(small.x), small.y, info=begun.info)
        yield Convert("student", Become(begun), name="images to begin with")
        step = partial(self.step, slots)
        yield Train(step, roles={"student": None}, frozen=list(m.teachers), data=slots, name="recover")
        yield from self.labelled(m, 2 if self.variant == "code" else 1)

    def mosaics(self, source: Source, m: Roles, folder: Any) -> Tensor:
        """Patches that the committee knows neither best nor least, as images `[N, C, H, W]` in the order of the set."""
        small: Any = m.student.module
        each, device = small.images_per_class, small.x.device
        answer = mean_logits(list(m.teachers.values()))
        found = mosaics(source, lambda x: answer(x.to(device)).cpu(), each, difficulty="medium", seed=m.seed)
        order = small.y.argsort(stable=True).argsort().cpu()
        return found[order]

    def step(self, slots: Slots, m: Roles, batch: Batch) -> Iterator[Update]:  # type: ignore[override]
        """One step of the images of all slots, one member of each slot after the other: only one graph is held."""
        small: Any = m.student.module
        teachers, priors = len(m.teachers), self.known(len(m.teachers))
        count, chunks = min(self.members, teachers), len(slots.rows) // small.images_per_class
        own = numbers(batch.x)
        chosen = [seats(slot // chunks, teachers, count, self.choice, priors, m.seed) for slot in own]
        weights = [votes([priors[j] for j in members], self.vote_temperature) for members in chosen]
        for k in range(count):
            rows = [slots.rows[slot] for slot in own]
            units = [(members[k], small.x[r], small.y[r]) for members, r in zip(chosen, rows, strict=True)]
            losses = [w[k] * loss for w, loss in zip(weights, self.losses(m, batch, units), strict=True)]
            yield Update("student", total(losses, small, len(slots)), apply=k == count - 1)

    def known(self, teachers: int) -> tuple[float, ...]:
        """The priors, equal ones where none are given."""
        return self.priors or (0.0,) * teachers

    def weights(self, m: Roles) -> Tensor:
        """The votes of the whole committee in the labels."""
        return votes(self.known(len(m.teachers)), self.label_vote_temperature)


def check_patches(source: Source, images_per_class: int, factor: int = 2) -> None:
    """Each patch of a mosaic is of another image, so classes have as many.

    Raises:
        UsageError: A class has fewer.
    """
    labels = getattr(source, "labels", None)
    if type(labels) is not Tensor:  # of a plan
        return
    counts, needed = labels.bincount().tolist(), images_per_class * factor**2
    if short := [c for c, count in enumerate(counts) if 0 < count < needed]:
        raise UsageError(
            "a class has too few images for mosaics", where=f"data.train, class {short[0]}", found=counts[short[0]],
            expected=f">= {needed}, {factor**2} for each of {images_per_class} mosaics",
            fix="ask for fewer images of each class, or set init to real",
        )  # fmt: skip
