"""Real images, and additive ones that all classes share."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.augment import Mix
from limbeck.data.condensed import Become, Condensed
from limbeck.data.ids import numbers
from limbeck.data.slots import Slots, slots_of
from limbeck.methods.checks import check_field
from limbeck.methods.recovery import Recovered, total
from limbeck.teachers.statistics import Recovery


@dataclass(frozen=True)
class INFER(Recovered):
    r"""Inter-class feature compensators (Zhang et al. 2025).

    Of M teachers each learns one image u for each slot of k real images of every class, which is added to all of them:
    $\frac{1}{C} \sum_c \mathrm{CE}(f_m(x_c + u), c) + r_{bn} \sum_l c_l (\lVert \mu_l - m_l \rVert + \lVert s_l - v_l \rVert)$.
    It costs as much as one image and gives C of them. The n images of each class that the student begins with are a budget of
    storage: $k = \lfloor n / (1 + M/C) \rfloor$ real images of each class are kept, so that these and the $k M$ compensators are
    not more, and $k (M + 1)$ of each class are trained on.

    Labels are the mean of the teachers' logits: one table for the images as they are (`label_epochs=0`, INFER), or one for
    each epoch (INFER+Dyn).

    u itself is free, as in the authors' code: only sums are clipped, where they are made.

    Args:
        variant: `paper`: all layers of batch normalisation count; `code`: the second one of the third network does not, which
            the authors' program for CIFAR leaves out without a word.

    Example:
        >>> nets = {f"teacher_{i}": torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)) for i in range(2)}
        >>> small = Condensed(torch.rand(8, 4), torch.arange(8) // 4)
        >>> compensated = INFER().compensated(small, 2)
        >>> compensated.bytes()["x"] + compensated.bytes()["compensators"] <= small.bytes()["x"], len(compensated)
        (True, 12)
    """

    averages: ClassVar[bool] = False

    bn_weight: float = 1.0
    label_epochs: int = 0
    label_batch_size: int = 64
    mixing: Mix = "mixup"
    alpha: float = 0.8
    temperature: float = 30.0
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field("variant", self.variant, self.variant in ("paper", "code"), "paper | code")

    def recovery_of(self, k: int) -> Recovery:
        """What the compensators of the k-th network learn by."""
        return Recovery(self.bn_weight, skipped=(1,) if self.variant == "code" and k == 2 else ())

    def check(self, m: Roles, batch: Batch) -> None:
        """As the base class, and the budget is enough for one image of each class and its compensators."""
        super().check(m, batch)
        self.compensated(m.student.module, len(m.teachers))  # type: ignore[arg-type]

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Compensators, labels."""
        teachers, small = len(m.teachers), self.compensated(m.student.module, len(m.teachers))  # type: ignore[arg-type]
        assert small.compensators is not None
        parts = torch.arange(len(small.x)).chunk(len(small.compensators) // teachers)
        slots = Slots(parts, units=teachers)
        yield Convert("student", Become(small), name="make compensators")
        step = partial(self.step, slots)
        yield Train(step, roles={"student": None}, frozen=list(m.teachers), data=slots, name="compensate")
        yield from self.labelled(m)

    def compensated(self, small: Condensed, teachers: int) -> Condensed:
        """The real images that the budget leaves, slot by slot, with compensators of zeros.

        Raises:
            UsageError: It leaves none, or the set has compensators.
        """
        if small.composed is not None:
            raise UsageError("this set has compensators", where="student", expected="real images, condensed:N")
        slots = slots_of(small)
        classes, budget = len(slots.rows[0]), len(slots)
        count = kept(budget, classes, teachers)
        if not count:
            raise UsageError(
                "the budget leaves no real image", where="student", found=f"condensed:{budget}",
                expected=f"condensed:{1 - (-teachers // classes)} or more for {teachers} teachers and {classes} classes",
            )  # fmt: skip
        rows = torch.cat(slots.rows[:count])
        x, y = small.x.detach()[rows], small.y[rows]
        each = torch.arange(count * classes)
        number = each // classes * teachers  # of the first compensator of its slot
        pairs = [torch.stack([each, torch.full_like(each, -1)], 1)]
        pairs += [torch.stack([each, number + k], 1) for k in range(teachers)]
        zeros = torch.zeros(count * teachers, *x.shape[1:])
        info = small.info | self.told | {"images_per_class": count, "budget": budget}
        composed = torch.cat(pairs)
        return Condensed(
            x, y.repeat(teachers + 1), compensators=zeros, composed=composed, learn=("compensators",), info=info
        )

    def step(self, slots: Slots, m: Roles, batch: Batch) -> Update:  # type: ignore[override]
        """One step of all compensators, each on the images of its slot and the network of its number."""
        small: Any = m.student.module
        units = []
        for unit in numbers(batch.x):
            slot, k = divmod(unit, slots.units)
            rows = slots.rows[slot]
            units.append((k, small.x[rows] + small.compensators[unit], small.y[rows]))
        losses = self.losses(m, batch, units)
        return Update("student", total(losses, small, len(slots)))

    def after_update(self, m: Roles, role: str) -> None:
        """Compensators have no bounds."""


def kept(budget: int, classes: int, teachers: int) -> int:
    """Real images of each class that a budget of images leaves beside their compensators: `floor(n C / (C + M))`.

    Example:
        >>> kept(10, 10, 4), kept(10, 100, 4), kept(10, 1000, 3), kept(5, 10, 0)
        (7, 9, 9, 5)
    """
    return budget * classes // (classes + teachers)
