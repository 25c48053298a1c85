"""Sparsity that is trained, not imposed: N:M sparse weights from an optimizer that drives the others to zero."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from limbeck.convert.parametrized import Finalise, Parametrize, parametrized, under
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Artefact, Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.losses import kl
from limbeck.losses.tokens import next_tokens, token_count, token_cross_entropy, token_kl
from limbeck.methods.checks import check_classes, check_field
from limbeck.nn.nm import ScaledNM
from limbeck.optim.adams import AdamS

_REACHED = 0.02  # above this ratio of masked to kept weights, masking has a price


@dataclass(frozen=True)
class CAST(Method):
    """The student, a copy of the dense teacher, ends with N of every M weights; until then its forward pass stays dense.

    The mask keeps the N largest of each group and is chosen anew every few steps. AdamS moves the momentum of all other
    weights, more and more, to an L1 decay: `(1 - a) mu + a decay sign(theta)`, `a = t / T`. Rows are scaled by learnt factors
    of blocks of columns, which fold into the weights at the end. The loss is
    `(1 - w) tau^2 KL(teacher || student) + w CE` (Huang et al. 2025, Eq. 6 and 13). Classes and next tokens alike.

    Sum up `lr_t t / T` over the steps: weights travel no farther, so it must exceed the size of the weights, or masking at the
    end destroys the model; the run warns and says the ratio of masked to kept weights.

    Args:
        n: Kept of each group.
        m: Size of a group of consecutive inputs.
        decay: `lambda >= 0`, of the order of the gradients; smaller for longer training (4e-7 for 7,500 steps of LLaMA2-7B).
        refresh_every: Steps between two choices of the mask (`T1`).
        scale_blocks: Learnt factors per row (`n` of the paper, blocks contiguous: inferred); 0 for none.
        label_weight: `w` in [0, 1], the share of the labels; `1 - eta` of the paper.
        temperature: `tau > 0`. The code of the same group's AST takes 2.
        include: Globs of the layers. Default: linear layers inside the repeated layers, or all but the last one.
        exclude: Globs of layers that stay dense.

    Example:
        >>> CAST(n=1, m=8, decay=1e-2).sparse.arguments
        {'n': 1, 'm': 8, 'blocks': 2}
    """

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    n: int = 2
    m: int = 4
    decay: float = 1e-3
    refresh_every: int = 10
    scale_blocks: int = 2
    label_weight: float = 2 / 3
    temperature: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_field("n", self.n, 0 < self.n <= self.m, "1 to m")
        check_field("decay", self.decay, self.decay >= 0, "0 or more")
        check_field("refresh_every", self.refresh_every, self.refresh_every >= 1, "1 or more")
        check_field("scale_blocks", self.scale_blocks, self.scale_blocks >= 0, "0 or more")
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "a share in [0, 1]")
        check_field("temperature", self.temperature, self.temperature > 0, "above 0")

    @property
    def sparse(self) -> Parametrize:
        """The conversion that puts the student's weights under the pattern."""
        arguments = {"n": self.n, "m": self.m, "blocks": self.scale_blocks}
        return Parametrize("limbeck.nn.nm:ScaledNM", arguments, self.include, self.exclude)

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student answer alike, and the pattern fits every layer."""
        check_classes(m, batch, labels=self.label_weight > 0 and "y" in batch)
        self.sparse(m.student.module)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Put the weights under the pattern, train, see how far they came, fold."""
        yield Convert("student", self.sparse, name="sparsify")
        yield Train(self.step, roles={"student": None}, frozen=self.frozen, data=data.train)
        reached: Artefact = yield Collect("reached", reached_ratio, example={"ratio": 0.0})
        if reached.value["ratio"] > _REACHED:
            warnings.warn(
                f"the weights outside the mask are {reached.value['ratio']:.3f} of the kept ones, not below {_REACHED}: "
                "masking has a price; train longer, or raise the learning rate or method.decay",
                stacklevel=1,
            )
        yield Convert("student", Finalise(), name="finalise", compare=data.train)

    def optimizer(self, m: Roles, role: str, optim: Optim) -> torch.optim.Optimizer:
        """AdamS over the groups of the settings, whatever optimizer they name."""
        module = m[role].module
        masks = {weight: made.mask for weight, made in under(module, ScaledNM)}
        if optim.maximize:
            raise UsageError("AdamS descends", where="optim.student.maximize", found=True, expected="false")
        factors = {
            id(made.scale) for _, made in under(module, ScaledNM)
        }  # decay would shrink rows that they should restore
        groups: list[dict[str, Any]] = []
        for group in optim.build(module).param_groups:
            own = [p for p in group["params"] if id(p) in factors]
            rest = [p for p in group["params"] if id(p) not in factors]
            groups += [{"params": rest, "lr": group["lr"], "weight_decay": group["weight_decay"]}] if rest else []
            groups += [{"params": own, "lr": group["lr"], "weight_decay": 0.0}] if own else []
        return AdamS(groups, masks, decay=self.decay, steps=m.total, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student, dense."""
        if m.lead and m.every(self.refresh_every):
            for weight, made in under(m.student.module, ScaledNM):
                made.refresh(weight)
        with torch.no_grad():
            teacher = m.teacher(batch)
        student = m.student(batch)
        count = None
        if student.ndim == 3 and "y" not in batch:
            labels = next_tokens(batch.x)
            count = token_count(labels)
            soft = token_kl(student, teacher, labels, temperature=self.temperature)
            hard = token_cross_entropy(student, labels)
        else:
            soft = kl(student, teacher, temperature=self.temperature)
            labelled = "y" in batch
            hard = F.cross_entropy(student.flatten(0, -2), batch.y.flatten()) if labelled else torch.zeros_like(soft)
        share = self.label_weight if count is not None or "y" in batch else 0.0
        loss = (1 - share) * soft + share * hard
        yield Update("student", loss, count=count, logs={"soft": soft, "hard": hard})


def reached_ratio(m: Roles, folder: Any) -> dict[str, Any]:
    """The mean magnitude of the weights outside the mask over that of the kept ones, by layer and in all."""
    layers: dict[str, float] = {}
    gone = kept = torch.zeros(())
    few = many = 0
    for path, part in parametrized(m.student.module):
        weight, made = next(under(part, ScaledNM))
        magnitude, mask = weight.abs().float(), made.mask
        inside, outside = magnitude[mask].mean(), magnitude[~mask].mean() if (~mask).any() else magnitude.new_zeros(())
        layers[path] = (outside / inside).item()
        gone, few = gone + magnitude[~mask].sum().cpu(), few + int((~mask).sum())
        kept, many = kept + magnitude[mask].sum().cpu(), many + int(mask.sum())
    return {"ratio": (gone / max(1, few)).item() / (kept / many).item(), "layers": layers}
