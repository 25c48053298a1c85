"""Soft labels of a condensed set, for the views in which it will be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.roles import Role
from limbeck.data.augment import Views
from limbeck.data.condensed import Become, Condensed
from limbeck.teachers.statistics import batch_statistics

Answer = Callable[[Tensor], Tensor]


def mean_logits(roles: Sequence[Role], weights: Tensor | None = None) -> Answer:
    """The weighted mean of several networks' logits `[B, C]`, as a function of images; equal weights by default.

    Example:
        >>> identity = Role("teacher", torch.nn.Identity())
        >>> mean_logits([identity, identity], torch.tensor([0.25, 0.75]))(torch.ones(1, 2))
        tensor([[1., 1.]])
    """
    shares = [1 / len(roles)] * len(roles) if weights is None else weights.tolist()

    def answer(x: Tensor) -> Tensor:
        logits = shares[0] * roles[0](x)
        for share, role in zip(shares[1:], roles[1:], strict=True):
            logits = logits + share * role(x)
        return logits

    return answer


@torch.no_grad()
def static_labels(condensed: Condensed, answer: Answer, batch_size: int = 64) -> Tensor:
    """Logits of the samples as they are `[N, C]`, fp32."""
    images = condensed().detach()
    return torch.cat([answer(x).float() for x in images.split(batch_size)])


@torch.no_grad()
def epoch_labels(
    condensed: Condensed, answer: Answer, views: Views, epochs: int, roles: Sequence[Role] = (), parts: int = 1
) -> Tensor:
    """Logits of what a training sees in each of its epochs `[E, N, C]`, fp16: of views after mixing.

    Args:
        condensed: The samples.
        answer: Logits of images.
        views: In which the set will be trained on; they are functions of (seed, epoch), so that only the logits are kept.
        epochs: `E`; later epochs see the first ones again.
        roles: Those whose batch normalisation goes by the batch at hand: batch-specific soft labels (CV-DD, Cui et al. 2025).
        parts: A batch is divided into so many, each with statistics of its own.

    Example:
        >>> small = Condensed(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]))
        >>> epoch_labels(small, lambda x: x.mean((1, 2)), Views(2), 3).shape
        torch.Size([3, 4, 8])
    """
    images = condensed().detach()
    tables: list[Tensor] = []
    with ExitStack() as stack:
        for role in roles:
            stack.enter_context(batch_statistics(role.module))
        for epoch in range(epochs):
            found: Tensor | None = None
            for rows, see in views.epoch(epoch, len(condensed)):
                seen, _ = see(images[rows])
                logits = torch.cat([answer(x) for x in seen.chunk(parts)])
                found = logits.new_zeros(len(condensed), logits.shape[-1]) if found is None else found
                found[rows] = logits
            assert found is not None
            tables.append(found.half().cpu())
    return torch.stack(tables)


def with_labels(
    condensed: Condensed, soft: Tensor | None, views: Views | None, temperature: float, parts: int = 1
) -> Condensed:
    """A copy of a set with soft labels, and what a training has to know of them."""
    told: dict[str, Any] = {"temperature": temperature}
    if parts > 1:
        told["label_parts"] = parts
    if views is not None:
        told["views"] = {**asdict(views), "operations": list(views.operations)}
    return Condensed(
        condensed.x, condensed.y, soft=soft, compensators=condensed.compensators, composed=condensed.composed,
        learn=[name for name, p in condensed.named_parameters() if p.requires_grad], info=condensed.info | told,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class GiveLabels:
    """Soft labels for the set that a role is by then, as a conversion.

    Args:
        soft: As for `Condensed`; None in a plan.
        views: As for `epoch_labels`; None for labels of the samples as they are.
        temperature: Of a training.
        parts: As for `epoch_labels`: a training shows its batches in the same parts.
    """

    soft: Tensor | None
    views: Views | None
    temperature: float
    parts: int = 1

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the set with labels, and the record that makes one of its form."""
        assert isinstance(module, Condensed)
        return Become(with_labels(module, self.soft, self.views, self.temperature, self.parts))(module)
