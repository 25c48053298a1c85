"""What DWA, CV-DD and INFER share: images from the batch statistics of trained networks, and labels by the same networks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Convert, Stage
from limbeck.data.augment import Mix, Views, augment
from limbeck.data.condensed import Condensed
from limbeck.diffusion.draws import Draws
from limbeck.methods.checks import check_field
from limbeck.teachers.relabel import GiveLabels, collect_labels
from limbeck.teachers.statistics import Recovery, batch_norms


@dataclass(frozen=True)
class Recovered(Method):
    """Base of the methods that recover images from what trained networks remember, and let these label them.

    Args:
        bn_weight: `r_bn`, of the distance between the batch's statistics and the running ones.
        operations: Views of each slot, one draw for all of its images at every step, see `limbeck.data.augment`.
        clip: Lowest and highest value of the images, put back after every step; None for data without bounds.
        label_epochs: Tables of soft labels, one for each epoch of a training; 0 for a single one, of the images as they are.
        label_batch_size: Batch of a training, where there are several tables.
        label_operations: Its augmentation.
        mixing: How it mixes pairs of images.
        alpha: Of the Beta distribution of the shares.
        temperature: Of labels and networks in a training; its loss is not multiplied by the square.
        label_statistics: Whether labels come from the networks' running statistics or from those of the batch.
    """

    logits: ClassVar[tuple[str, ...]] = ("teacher",)
    reads: ClassVar[tuple[str, ...] | None] = ("teacher",)
    frozen: ClassVar[tuple[str, ...]] = ()

    bn_weight: float = 0.01
    operations: tuple[str, ...] = ("roll",)
    clip: tuple[float, float] | None = (0.0, 1.0)
    label_epochs: int = 300
    label_batch_size: int = 128
    label_operations: tuple[str, ...] = ("shift", "flip")
    mixing: Mix = "cutmix"
    alpha: float = 1.0
    temperature: float = 20.0
    label_statistics: Literal["running", "batch"] = "running"

    def __post_init__(self) -> None:
        check_field("bn_weight", self.bn_weight, self.bn_weight >= 0, "0 or more")
        check_field("clip", self.clip, self.clip is None or self.clip[0] < self.clip[1], "lowest < highest, or none")
        check_field("label_epochs", self.label_epochs, self.label_epochs >= 0, "0 or more")
        check_field("label_batch_size", self.label_batch_size, self.label_batch_size >= 2, "2 or more")
        check_field("mixing", self.mixing, self.mixing in ("none", "mixup", "cutmix"), "none | mixup | cutmix")
        for name in ("alpha", "temperature"):
            check_field(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        how, ways = self.label_statistics, ("running", "batch")
        check_field("label_statistics", how, how in ways, " | ".join(ways))
        one_table = how == "batch" and not self.label_epochs
        check_field("label_epochs", self.label_epochs, not one_table, "1 or more, as a single table knows no batches")

    @property
    def recovery(self) -> Recovery:
        """What images are recovered by."""
        return Recovery(self.bn_weight)

    def check(self, m: Roles, batch: Batch) -> None:
        """Teachers remember batch statistics; the student is a set of images within bounds."""
        if not m.teachers:
            raise UsageError("this method needs a trained network", where="teacher", found="none", fix="give --teacher")
        for name, role in m.teachers.items():
            batch_norms(role.module, name)
        small = m.student.module
        if not isinstance(small, Condensed):
            raise UsageError(
                "the student is no condensed set", where="student", found=type(small).__name__,
                expected="condensed:N, N samples of each class",
            )  # fmt: skip
        if self.clip is not None and type(small.x.detach()) is Tensor:
            low, high = (float(bound) for bound in small.x.detach().aminmax())
            if low < self.clip[0] or high > self.clip[1]:
                raise UsageError(
                    "the samples lie outside of the bounds", where="method.clip", found=f"[{low:.4g}, {high:.4g}]",
                    expected=f"within {list(self.clip)}", fix="set clip to the bounds of the data, or to null",
                )  # fmt: skip

    def begun(self, small: Condensed) -> Condensed:
        """The set as it is, with its bounds."""
        return Condensed(small.x, small.y, info=small.info | self.told)

    @property
    def told(self) -> dict[str, Any]:
        """What the set says of itself: its bounds, and what a training on a single table of labels sees."""
        found: dict[str, Any] = {"clip": None if self.clip is None else list(self.clip)}
        if not self.label_epochs:
            how = asdict(Views(self.label_batch_size, self.label_operations, self.mixing, self.alpha))
            found["training"] = how | {"operations": list(self.label_operations)}
        return found

    def view(self, m: Roles, batch: Batch, i: int, x: Tensor) -> Tensor:
        """The images of the `i`-th slot of a batch in this step's view."""
        keys = Draws(m, batch).keys("view")[i : i + 1]
        return augment(x, keys, self.operations)

    def recovery_of(self, k: int) -> Recovery:
        """What images are recovered by under the k-th teacher."""
        return self.recovery

    def losses(self, m: Roles, batch: Batch, units: Sequence[tuple[int, Tensor, Tensor]]) -> list[Tensor]:
        """The losses of a batch's units, each of its own statistics; those of one teacher and size go through it together.

        Args:
            m: The roles.
            batch: A batch of `Slots`.
            units: For each of its rows the number of a teacher, images `[b, ...]` and labels `[b]`.
        """
        keys, teachers = Draws(m, batch).keys("view"), list(m.teachers.values())
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (k, x, _) in enumerate(units):
            groups.setdefault((k, len(x)), []).append(i)
        found: dict[int, Tensor] = {}
        for (k, size), own in groups.items():
            x, y = torch.cat([units[i][1] for i in own]), torch.cat([units[i][2] for i in own])
            x = augment(x, keys[own].repeat_interleave(size), self.operations)
            losses = self.recovery_of(k)(teachers[k], x, y, groups=len(own))
            found |= zip(own, losses.unbind(), strict=True)
        return [found[i] for i in range(len(units))]

    def after_update(self, m: Roles, role: str) -> None:
        """Images go back to their bounds."""
        small: Any = m.student.module
        with torch.no_grad():
            small.x.copy_(small.clipped(small.x))

    def weights(self, m: Roles) -> Tensor | None:
        """The teachers' weights in the labels `[M]`; None for equal ones."""
        return None

    def views(self, seed: int) -> Views | None:
        """What a training on the set sees; None where labels are those of the images as they are."""
        how = (self.label_batch_size, self.label_operations, self.mixing, self.alpha)
        return Views(*how, seed) if self.label_epochs else None

    def labelled(self, m: Roles, parts: int = 1) -> Generator[Stage, Any, None]:
        """The stages that give the set its soft labels.

        Args:
            m: The roles.
            parts: A batch is divided into so many, where labels come from its statistics.
        """
        views, own = self.views(m.seed), parts if self.label_statistics == "batch" else 1
        views = views and replace(views, least=2 * own)  # a part of one sample has no statistics

        def label(m: Roles, folder: Any) -> int:
            small, teachers = m.student.module, list(m.teachers.values())
            assert isinstance(small, Condensed)
            how = (self.weights(m), self.label_statistics == "batch", own)
            return len(collect_labels(small, teachers, folder, views, self.label_epochs or 1, *how))

        found = yield Collect("labels", label)
        labels = GiveLabels(found.path, self.label_epochs, views, self.temperature, own)
        yield Convert("student", labels, name="give soft labels")


def total(losses: list[Tensor], student: Condensed, units: int) -> Tensor:
    """The sum of the losses of a step's units, whichever micro-batch they are in: no unit's gradient depends on others.

    Args:
        losses: Of the units in this micro-batch.
        student: The set, whose gradient is 0 where there are none.
        units: Of the whole step.
    """
    if not losses:
        return sum(0.0 * p.sum() for p in student.parameters() if p.requires_grad)  # type: ignore[return-value]
    return units * torch.stack(losses).mean()
