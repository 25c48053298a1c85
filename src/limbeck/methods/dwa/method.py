"""Images that networks would have remembered, each slot recovered by a network that was led to forget where it began."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.files import aside
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.augment import Mix, augment
from limbeck.data.condensed import Become
from limbeck.data.ids import mix, numbers
from limbeck.data.slots import Slots, slots_of
from limbeck.methods.checks import check_field
from limbeck.methods.recovery import Recovered, total
from limbeck.teachers.statistics import Recovery, ascended, called

VARIANTS = ("paper", "code")


@dataclass(frozen=True)
class DWA(Recovered):
    r"""Directed weight adjustment (Du et al. 2024); `rho=0, variance_weight=1` is its base, SRe2L (Yin et al. 2023).

    A slot is one image of each class. Before it is recovered, the network climbs K steps on the loss of the slot's real
    images, $\theta \leftarrow \theta + (\rho / K) g / \lVert g \rVert$, each slot from the network as it was. Then the images
    descend on $\mathrm{CE}(f(x), y) + r_{bn} \sum_l c_l (\lVert \mu_l - m_l \rVert + r_{var} \lVert s_l - v_l \rVert)$. Slots do
    not know of each other; all are recovered side by side. The network itself, and it alone, gives the labels.

    Args:
        rho: How far the weights may go, in the norm of all of them: to be found for each network.
        adjustment_steps: `K`.
        variance_weight: `r_var`.
        classes_at_once: Classes of a slot at most, where not all fit; None for all.
        variant: `paper`: every slot has a network of its own; `code`: where slots are parts of the classes, those of one image
            number go on from each other's weights, as in the authors' ImageNet program, which never puts the network back.

    Example:
        >>> from limbeck import Roles
        >>> from limbeck.data.condensed import Condensed
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        >>> m = Roles(teacher=net.eval(), student=Condensed(torch.rand(4, 4), torch.tensor([0, 0, 1, 1])))
        >>> slots = slots_of(m.student.module)
        >>> method = DWA(operations=())
        >>> method.step(slots, Adjusted(None, m.teacher), m, slots(0, m.rng())).role
        'student'
    """

    label_epochs: int = 300
    mixing: Mix = "mixup"
    alpha: float = 0.8
    temperature: float = 30.0
    rho: float = 0.015
    adjustment_steps: int = 12
    variance_weight: float = 11.0
    classes_at_once: int | None = None
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field("rho", self.rho, self.rho >= 0, "0 or more")
        check_field("adjustment_steps", self.adjustment_steps, self.adjustment_steps >= 1, "1 or more")
        check_field("variance_weight", self.variance_weight, self.variance_weight >= 0, "0 or more")
        at_once = self.classes_at_once
        check_field("classes_at_once", at_once, at_once is None or at_once >= 2, "2 or more, or none for all")
        check_field("variant", self.variant, self.variant in VARIANTS, " | ".join(VARIANTS))

    @property
    def recovery(self) -> Recovery:
        """What images are recovered by."""
        return Recovery(self.bn_weight, self.variance_weight)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Adjusted networks, images, labels."""
        small: Any = m.student.module
        slots = slots_of(small, self.classes_at_once)
        folder = None
        if self.rho:
            folder = (yield Collect("adjusted networks", partial(self.adjust, slots))).path
        yield Convert("student", Become(self.begun(small)), name="give bounds")
        step = partial(self.step, slots, Adjusted(folder, m.teacher))
        yield Train(step, roles={"student": None}, frozen=["teacher"], data=slots, name="recover")
        yield from self.labelled(m)

    def adjust(self, slots: Slots, m: Roles, folder: str | os.PathLike[str]) -> dict[str, list[float]]:
        """Write the weights of every slot; returns the losses of its real images before and after."""
        small: Any = m.student.module
        own = {name: p.detach() for name, p in m.teacher.module.named_parameters()}
        weights: Mapping[str, Tensor] = own
        found: dict[str, list[float]] = {"before": [], "after": []}
        for slot, rows in enumerate(slots.rows):
            x, y = small.x.detach()[rows], small.y[rows]
            x = augment(x, mix(torch.tensor([(m.seed << 32) + slot])), self.operations)
            goes_on = self.variant == "code" and int(small.y[rows].min()) > int(small.y.min())
            weights = ascended(m.teacher, x, y, self.rho, self.adjustment_steps, weights if goes_on else own)
            with aside(Path(folder) / f"slot-{slot:05d}.safetensors") as scratch:
                save_file({name: w.contiguous().cpu() for name, w in weights.items()}, scratch)
            for when, which in (("before", own), ("after", weights)):
                found[when].append(float(F.cross_entropy(called(m.teacher, x, which), y)))
        return found

    def step(self, slots: Slots, adjusted: Adjusted, m: Roles, batch: Batch) -> Update:  # type: ignore[override]
        """One step of the images of all slots."""
        small: Any = m.student.module
        rows = [slots.rows[slot] for slot in numbers(batch.x)]
        if not self.rho:
            losses = self.losses(m, batch, [(0, small.x[r], small.y[r]) for r in rows])
            return Update("student", total(losses, small, len(slots)))
        losses = []  # each by weights of its own: one after another
        for i, (slot, r) in enumerate(zip(numbers(batch.x), rows, strict=True)):
            x = self.view(m, batch, i, small.x[r])
            losses.append(self.recovery(m.teacher, x, small.y[r], adjusted(slot)))
        return Update("student", total(losses, small, len(slots)))


class Adjusted:
    """The weights of each slot's network, read where they are asked for and then kept.

    Args:
        folder: Where `DWA.adjust` wrote them; None stands for no adjustment.
        role: The network.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, role: Role) -> None:
        self.folder, self.role = folder, role
        self.kept: dict[int, dict[str, Tensor]] = {}

    def __call__(self, slot: int) -> dict[str, Tensor] | None:
        """The weights by name; None for the network's own."""
        if self.folder is None:
            return None
        if slot not in self.kept:
            device = next(self.role.module.parameters()).device
            found = load_file(Path(self.folder) / f"slot-{slot:05d}.safetensors")
            self.kept[slot] = {name: w.to(device) for name, w in found.items()}
        return self.kept[slot]
