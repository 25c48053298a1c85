"""One network that is many: sub-networks join its training when it is half done, and softly."""

from __future__ import annotations

import fnmatch
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from limbeck.convert.sort_channels import SortChannels
from limbeck.convert.structure import structure
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.losses import soft_cross_entropy
from limbeck.methods.checks import check_field, outputs
from limbeck.nn.elastic import MakeElastic
from limbeck.nn.space import Space


@dataclass(frozen=True)
class DepS(Method):
    """Train a whole network alone, then with its sub-networks, whose gradients set in slowly (Annavajjala et al. 2024).

    A step's gradient is `grad L_max + eps(t) [grad L_min + grad L_r1 + grad L_r2]` on one batch: the whole network learns the
    labels (`L_max`, smoothed), the smallest sub-network and random ones learn the whole network's probabilities,
    `L_a = tau^2 CE(softmax(z_max / tau), softmax(z_a / tau))`, which no gradient reaches. `eps` is 0 up to a ramp that ends at
    `T0 = delay T`; in it the sub-networks' rate `eps eta` grows linearly to `eta(T0)`:
    `eps = (k / K) eta(T0) / eta(t)`; 1 afterwards. Before the ramp the units of each block are sorted by importance.

    The student is an `Elastic` model; `limbeck.family.Family` judges and picks its sub-networks. `eps` weighs gradients, which
    for SGD is a learning rate of their own; Adam would divide it out again.

    Args:
        expand: Shares of the inner units of each block that a sub-network may have, rounded to multiples of `divisor`.
        depth: Numbers of leading blocks of each stage that it may have; layers that change shapes always stay.
        dims: Globs of the dimensions that `expand` is about.
        kernel: Sides of depthwise filters that a sub-network may have, such as 3, 5 and 7; none leaves them as they are.
        divisor: Units come in multiples of it.
        coupled: Whether depths and shares are drawn together, the least with the least (the rule of CompOFA).
        delay: `T0 / T` in [0, 1). 0 with a pre-trained network: the ramp begins at once.
        ramp: Length of the ramp as a share of the training: 5 of 270 epochs; 0 for none.
        subnets: Sub-networks of a step with the whole one and the smallest, 2 or more.
        temperature: `tau > 0`.
        label_smoothing: In [0, 1).

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> DepS(expand=(0.5, 1.0)).space(mlp(4, 16, 3)).choices
        {'0.channels': (8, 16)}
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    logits: ClassVar[tuple[str, ...]] = ("student",)

    expand: tuple[float, ...] = (0.5, 2 / 3, 1.0)
    depth: tuple[int, ...] = (2, 3, 4)
    dims: tuple[str, ...] = ("*.channels", "*.ffn")
    kernel: tuple[int, ...] = ()
    divisor: int = 8
    coupled: bool = False
    delay: float = 0.5
    ramp: float = 5 / 270
    subnets: int = 4
    temperature: float = 1.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_field(
            "expand",
            self.expand,
            all(0 < share <= 1 for share in self.expand) and bool(self.expand),
            "shares in (0, 1]",
        )
        check_field("depth", self.depth, all(d >= 1 for d in self.depth) and bool(self.depth), "1 or more")
        check_field("delay", self.delay, 0 <= self.delay < 1, "in [0, 1)")
        check_field("ramp", self.ramp, 0 <= self.ramp < 1 and max(self.delay, self.ramp) < 1, "in [0, 1)")
        check_field("subnets", self.subnets, self.subnets >= 2, "2 or more")
        check_field("temperature", self.temperature, self.temperature > 0, "above 0")
        check_field("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")
        same = not self.coupled or len(self.expand) == len(self.depth)
        check_field("coupled", self.coupled, same, "as many shares as depths")

    def space(self, module: nn.Module) -> Space:
        """The sub-networks of a model."""
        parts = structure(module)
        shares = dict.fromkeys(self.dims, tuple(map(float, self.expand)))
        found = {glob: sizes for glob, sizes in shares.items() if fnmatch.filter(parts.dims, glob)}
        if not found:
            raise UsageError(
                "the model has no blocks that can be thinner", where="method.dims", found=self.dims,
                expected=", ".join(list(parts.dims)[:4]) or "blocks of ResNet, MobileNet, or networks with fc1 and fc2",
            )  # fmt: skip
        sizes = {**found, **dict.fromkeys(parts.depths, self.depth)}
        sizes |= {"*.kernel": self.kernel} if self.kernel else {}
        groups = [list(sizes)] if self.coupled else []
        return Space.of(module, sizes, divisor=self.divisor, together=groups)

    def check(self, m: Roles, batch: Batch) -> None:
        """There are labels, and the model has sub-networks."""
        if "y" not in batch:
            raise UsageError("the whole network learns from labels", where="batch.y", found=repr(batch))
        self.space(m.student.module)
        outputs(m, batch, "student")

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """The whole network alone, then all of them."""
        yield Convert("student", MakeElastic(self.space(m.student.module)), name="make elastic")
        start = max(0.0, self.delay - self.ramp)
        if start:
            yield Train(self.whole, roles={"student": None}, data=data.train, span=(0.0, start), name="whole")
        yield Convert("student", SortChannels(self.dims), name="sort", compare=data.train)
        yield Train(self.step, roles={"student": None}, data=data.train, span=(start, 1.0), name="shrink")

    def whole(self, m: Roles, batch: Batch) -> Update:
        """One update of the whole network alone."""
        return Update("student", F.cross_entropy(m.student(batch), batch.y, label_smoothing=self.label_smoothing))

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update with the gradients of the whole network, the smallest, and random ones."""
        logits = m.student(batch)
        target = (logits.detach().float() / self.temperature).softmax(-1)
        eps = self.epsilon(m)
        yield Update(
            "student", F.cross_entropy(logits, batch.y, label_smoothing=self.label_smoothing), apply=False,
            logs={"epsilon": torch.tensor(eps)},
        )  # fmt: skip
        generator = Random(1_000_003 * m.seed + m.step)  # the same in all micro-batches and processes
        elastic: Any = m.student.module
        for arch in elastic.space.sandwich(generator, self.subnets)[1:]:
            student = m.student(batch, arch=arch) / self.temperature
            yield Update("student", eps * self.temperature**2 * soft_cross_entropy(student, target), apply=False)
        yield Update("student")

    def epsilon(self, m: Roles) -> float:
        """The weight of the sub-networks' gradients at this step of the second stage."""
        start = max(0.0, self.delay - self.ramp)
        length = round(self.ramp * m.total / (1 - start))  # K
        k = m.step + 1
        return 1.0 if k >= length else k / length * m.rate("student", length) / m.rate("student")
