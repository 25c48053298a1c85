"""Soft labels of a condensed set, for the views in which it will be trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.roles import Role
from limbeck.data.augment import Views
from limbeck.data.condensed import Become, Condensed
from limbeck.teachers.fingerprint import fingerprint
from limbeck.teachers.statistics import batch_statistics
from limbeck.teachers.store import OUTPUT, Header, OutputStore
from limbeck.teachers.writer import Writer

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


def _labelled(
    images: Tensor,
    answer: Answer,
    views: Views | None,
    epoch: int,
    parts: int = 1,
    stored: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows `[B]` and logits `[B, C]` of the batches of an epoch, but for those whose rows are all stored (bool `[N]`)."""
    plain = ((rows, None) for rows in torch.arange(len(images)).split(64))
    for rows, see in plain if views is None else views.epoch(epoch, len(images)):
        if stored is None or not stored[rows].all():
            seen = images[rows] if see is None else see(images[rows])[0]
            yield rows, torch.cat([answer(x) for x in seen.chunk(parts)])


@contextmanager
def _by_the_batch(roles: Sequence[Role]) -> Iterator[None]:
    with ExitStack() as stack:
        for role in roles:
            stack.enter_context(batch_statistics(role.module))
        yield


@torch.no_grad()
def static_labels(condensed: Condensed, answer: Answer) -> Tensor:
    """Logits of the samples as they are `[N, C]`, fp32."""
    return torch.cat([logits.float() for _, logits in _labelled(condensed().detach(), answer, None, 0)])


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
    images, tables = condensed().detach(), []
    with _by_the_batch(roles):
        for epoch in range(epochs):
            rows, logits = zip(*_labelled(images, answer, views, epoch, parts), strict=True)
            tables.append(torch.cat(logits).half().cpu()[torch.cat(rows).argsort()])
    return torch.stack(tables)


@torch.no_grad()
def collect_labels(
    condensed: Condensed,
    teachers: Sequence[Role],
    path: Path,
    views: Views | None,
    epochs: int = 1,
    weights: Tensor | None = None,
    by_batch: bool = False,
    parts: int = 1,
) -> OutputStore:
    """The labels of `epoch_labels`, or without views of `static_labels`, in a store of teacher outputs: by sample and epoch.

    As with `collect`, what is stored already is not computed again: killed and called again it goes on, and with more epochs
    it adds them.

    Args:
        condensed: The samples; their ids are their numbers.
        teachers: Networks whose mean logits are the labels.
        path: The store's folder.
        views: As for `epoch_labels`; None for the images as they are.
        epochs: View seeds of the store are 0, ..., epochs - 1.
        weights: Of the teachers `[M]`; equal by default.
        by_batch: Whether their batch normalisation goes by the batch at hand.
        parts: As for `epoch_labels`.

    Raises:
        UsageError: The folder holds labels of other networks, samples or views.
        RunError: A logit is NaN, or above what fp16 holds.
    """
    images, answer = condensed().detach(), mean_logits(teachers, weights)
    who = [*map(fingerprint, teachers), None if weights is None else weights.tolist(), by_batch, parts]
    what = [fingerprint(condensed), views]
    writer = Writer(path, Header(_digest(who), _digest(what), "fp32" if views is None else "fp16", None, {}))
    with _by_the_batch(teachers if by_batch else ()):
        for epoch in range(epochs):
            stored = ~writer.missing(torch.arange(len(images)), epoch)
            for rows, logits in _labelled(images, answer, views, epoch, parts, stored):
                writer.add(rows, torch.full_like(rows, epoch), {OUTPUT: logits})
    writer.flush()
    return OutputStore(path, verify=False)


def label_table(store: OutputStore, count: int, epochs: int) -> Tensor:
    """What `collect_labels` stored of `count` samples: `[E, N, C]` of so many epochs; for 0, without views, `[N, C]`."""
    tables = [store.read(torch.arange(count), epoch)[OUTPUT] for epoch in range(epochs or 1)]
    return torch.stack(tables) if epochs else tables[0]  # type: ignore[arg-type,return-value]


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


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
        step_size=condensed.step_size,
        learn=[name for name, p in condensed.named_parameters() if p.requires_grad], info=condensed.info | told,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class GiveLabels:
    """Soft labels for the set that a role is by then, as a conversion.

    Args:
        path: The folder of `collect_labels`; None in a plan.
        epochs: As there; 0 for a single table.
        views: As there.
        temperature: Of a training.
        parts: As for `epoch_labels`: a training shows its batches in the same parts.
    """

    path: Path | None
    epochs: int
    views: Views | None
    temperature: float
    parts: int = 1

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the set with labels, and the record that makes one of its form."""
        assert isinstance(module, Condensed)
        soft = None if self.path is None else label_table(OutputStore(self.path), len(module), self.epochs)
        return Become(with_labels(module, soft, self.views, self.temperature, self.parts))(module)
