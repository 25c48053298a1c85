"""What a role is judged by: one evaluator per kind of task, called with the roles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.data.condensed import Condensed
from limbeck.data.condensed_graphs import CondensedGraphs
from limbeck.data.image_text import ImageText
from limbeck.data.language import TokenBlocks
from limbeck.data.noise import Noise
from limbeck.evaluate import metrics
from limbeck.evaluate.condensation import Condensation
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.fairness import Fairness
from limbeck.evaluate.generation import Generation, generates
from limbeck.losses import kl
from limbeck.losses.tokens import IGNORE, next_tokens
from limbeck.nn.vae import ImageVAE, TableVAE

_TEXTS = 1000  # texts that similarity and retrieval look at, evenly spaced: all are compared with all


class Evaluator(Protocol):
    """Judges a role on held-out data.

    Attributes:
        task: The kind of task.
        primary: The metric that counts most; higher is better.
    """

    task: str
    primary: str

    def __call__(self, m: Roles) -> Mapping[str, float]:
        """The student's numbers."""
        ...

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        ...


class Classification:
    """Judges classifiers: `top1`, `top5` (above five classes), macro `f1`, `ece`; and, where there is a teacher, the share
    of samples with the same answer as the teacher (`agreement`) and the divergence from it (`teacher_kl`, nats).

    Without labels only the comparison with the teacher is left. The teacher's logits are computed once.

    Args:
        source: Held-out samples.
        batch_size: Samples of one call.
        taught: The same samples as the teacher reads them, where that differs.
        compare: Whether there is a teacher of the same classes to compare with.

    Example:
        >>> from limbeck.data import TensorSource
        >>> held_out = TensorSource(torch.eye(3), torch.arange(3))
        >>> evaluate = Classification(held_out)
        >>> m = Roles(student=torch.nn.Identity(), teacher=torch.nn.Identity())
        >>> {name: round(value, 4) for name, value in evaluate(m).items()}
        {'top1': 1.0, 'f1': 1.0, 'ece': 0.4239, 'agreement': 1.0, 'teacher_kl': 0.0}
    """

    task = "classification"

    def __init__(
        self, source: Source, batch_size: int = 256, taught: Source | None = None, compare: bool = True
    ) -> None:
        self.source, self.batch_size, self.taught, self.compare = source, batch_size, taught or source, compare
        self._teacher: tuple[Tensor, Tensor | None] | None = None
        labelled = source.batch(torch.zeros(1, dtype=torch.int64), 0).get("y") is not None
        self.primary = "top1" if labelled else "agreement"

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        if role == "teacher" and not self.compare:
            return {}
        if self._teacher is None and self.compare and "teacher" in m:
            self._teacher = predict(m.teacher, self.taught, self.batch_size)
        if role == "teacher" and self._teacher is not None:
            return _numbers(*self._teacher)
        scores, labels = predict(m[role], self.source, self.batch_size)
        return _numbers(scores, labels, self._teacher[0] if self._teacher is not None else None)


class LanguageModelling:
    """Judges causal language models by the next token: `log_likelihood` (mean, nats per token; higher is better),
    `perplexity`, `top1`; and, where there is a teacher, `agreement` and `teacher_kl` per token.

    Args:
        source: Held-out blocks of tokens.
        batch_size: Blocks of one call.
        compare: Whether there is a teacher of the same tokens to compare with.

    Example:
        >>> from limbeck.data.language import TokenBlocks
        >>> class Same(torch.nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return torch.zeros(*input_ids.shape, 4)
        >>> evaluate = LanguageModelling(TokenBlocks(torch.arange(8) % 4, 4), compare=False)
        >>> round(evaluate(Roles(student=Same()))["perplexity"], 4)
        4.0
    """

    task, primary = "language modelling", "log_likelihood"

    def __init__(self, source: Source, batch_size: int = 16, compare: bool = True) -> None:
        self.source, self.batch_size, self.compare = source, batch_size, compare

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    @torch.no_grad()
    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role; nothing of the size of all logits is kept."""
        compare = self.compare and role != "teacher" and "teacher" in m
        sums: dict[str, float] = {}
        count = 0
        for rows in torch.arange(len(self.source)).split(self.batch_size):
            batch = self.source.batch(rows, 0).to(next((p.device for p in m[role].parameters()), torch.device("cpu")))
            labels = next_tokens(batch.x)
            kept = labels != IGNORE
            with evaluating(m[role].module):
                scores = m[role](batch)[kept].float()
            found = {
                "log_likelihood": -torch.nn.functional.cross_entropy(scores, labels[kept], reduction="sum"),
                "top1": (scores.argmax(-1) == labels[kept]).sum(),
            }
            if compare:
                teacher = m.teacher(batch)[kept].float()
                found["agreement"] = (scores.argmax(-1) == teacher.argmax(-1)).sum()
                found["teacher_kl"] = kl(scores, teacher, reduction="sum")
            count += int(kept.sum())
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
        means = {name: value / max(1, count) for name, value in sums.items()}
        return {
            "log_likelihood": means.pop("log_likelihood"),
            "perplexity": math.exp(-sums["log_likelihood"] / max(1, count)),
            **means,
        }


class ZeroShot:
    """Judges dual encoders: `zero_shot_top1`, where images have classes and classes have prompts, and `recall_at_1`, how often
    the nearest of up to 1000 texts is an image's own, and the other way round (their mean; equal texts count as one).

    With a teacher, `agreement` is the share of images for which both name the same prompt or text.

    Args:
        source: Held-out pairs.
        batch_size: Pairs of one call.

    Example:
        >>> from limbeck.data import TensorSource
        >>> from limbeck.data.image_text import ImageText
        >>> from limbeck.data.text import TextSource
        >>> class Same(torch.nn.Module):
        ...     def forward(self, pixel_values, input_ids, attention_mask):
        ...         return {"image_embeds": pixel_values.flatten(1), "text_embeds": torch.eye(2)[input_ids[:, 0]]}
        >>> texts = TextSource(["0", "1"], lambda texts: {"input_ids": [[int(t)] for t in texts]})
        >>> pairs = ImageText(TensorSource(torch.eye(2).view(2, 1, 1, 2), torch.arange(2)), texts, prompts=texts)
        >>> ZeroShot(pairs)(Roles(student=Same()))
        {'zero_shot_top1': 1.0, 'recall_at_1': 1.0}
    """

    task = "image-text"

    def __init__(self, source: Source, batch_size: int = 256) -> None:
        self.source: Any = source
        self.batch_size = batch_size
        self.primary = "zero_shot_top1" if self._named else "recall_at_1"

    @property
    def _named(self) -> bool:
        return self.source.prompts is not None and self.source.labels is not None

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        answers, recall = self._answers(m[role])
        found: dict[str, Any] = {}
        if self._named:
            found["zero_shot_top1"] = metrics.topk_accuracy(answers, self.source.labels)
        found["recall_at_1"] = recall
        if role != "teacher" and "teacher" in m:
            found["agreement"] = metrics.agreement(answers, self._answers(m.teacher)[0])
        return {name: float(value) for name, value in found.items()}

    @torch.no_grad()
    def _answers(self, role: Role) -> tuple[Tensor, float]:
        """Each image's cosine with each prompt, or with the texts that are compared, and the recall."""
        pairs, _ = predict(role, self.source, self.batch_size)
        images, texts = torch.nn.functional.normalize(pairs, dim=-1).unbind(1)
        some = torch.arange(0, len(images), -(-len(images) // _TEXTS))
        captions = [self.source.captions.texts[row] for row in some.tolist()]
        number = torch.tensor([captions.index(text) for text in captions])
        near = images[some] @ texts[some].T
        hits = torch.cat([number[near.argmax(dim)] == number for dim in (0, 1)])
        recall = hits.double().mean().item()
        if not self._named:
            return near, recall
        return images @ self._prompts(role).T, recall

    def _prompts(self, role: Role) -> Tensor:
        """The normalised embeddings of the prompts, beside whatever image."""
        device = next((p.device for p in role.module.parameters()), torch.device("cpu"))
        parts = []
        with evaluating(role.module):
            for rows in torch.arange(len(self.source.prompts)).split(self.batch_size):
                batch = self.source.images.batch(torch.zeros_like(rows), 0)
                x = {"pixel_values": batch.x, **self.source.prompts.batch(rows, 0).x}
                parts.append(role(batch.replace(x=x).to(device))[:, 1].float().cpu())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def evaluator(
    source: Source, student: nn.Module, batch_size: int = 256, taught: Source | None = None, compare: bool = True
) -> Evaluator | None:
    """The evaluator that fits: samples beside real ones for generators, networks trained from scratch for condensed sets,
    classifiers trained on their samples for models of a protected attribute, zero-shot for images with texts, retrieval or
    similarity for sentence encoders, next tokens for blocks of tokens, else classification.

    Args:
        source: Held-out samples.
        student: The model that is judged.
        batch_size: Samples of one call.
        taught: The same samples as the teacher reads them, where that differs.
        compare: Whether the teacher's outputs are over the same classes.

    Returns:
        None where there is nothing to judge by: texts that are too few, noise, or fairness to more than two classes.
    """
    if isinstance(getattr(source, "source", source), Noise):
        return None
    if generates(student):
        return Generation(source, batch_size)
    if isinstance(student, CondensedGraphs):
        from limbeck.evaluate.graphs import GraphCondensation

        return GraphCondensation(source)  # type: ignore[arg-type]
    if isinstance(student, TableVAE | ImageVAE):
        return Fairness(source) if student.classes == 2 else None
    if isinstance(student, Condensed):
        return Condensation(source, batch_size)
    if isinstance(source, ImageText):
        return ZeroShot(source, batch_size)
    if isinstance(getattr(source, "source", source), TokenBlocks):
        return LanguageModelling(source, min(batch_size, 16), compare)
    texts = getattr(source, "texts", None)
    if texts is None or not hasattr(student, "encode"):
        return Classification(source, batch_size, taught, compare)
    from limbeck.evaluate.retrieval import Retrieval, Similarity

    some = texts[:: -(-len(texts) // _TEXTS)]
    if isinstance(some[0], str):
        return Similarity(some) if len(some) > 2 else None
    return Retrieval([query for query, _ in some], [passage for _, passage in some])


def predict(role: Role, source: Source, batch_size: int = 256) -> tuple[Tensor, Tensor | None]:
    """A role's outputs over a whole source in evaluation mode, and the labels.

    Args:
        role: The role.
        source: N samples.
        batch_size: Samples of one call.

    Returns:
        Outputs `[N, ...]` float32 and labels `[N]`, or None without labels; both on the CPU.

    Raises:
        UsageError: The source has no samples.

    Example:
        >>> from limbeck.data import TensorSource
        >>> predict(Role("student", torch.nn.Flatten()), TensorSource(torch.ones(5, 2, 2)), batch_size=2)[0].shape
        torch.Size([5, 4])
    """
    if not len(source):
        raise UsageError("there is nothing to evaluate on", where="data", found="0 samples")
    device = next((p.device for p in role.module.parameters()), torch.device("cpu"))
    outputs, labels = [], []
    with evaluating(role.module):
        for rows in torch.arange(len(source)).split(batch_size):
            batch = source.batch(rows, 0).to(device)
            outputs.append(role(batch).float().cpu())
            labels.append(batch.get("y"))
    return torch.cat(outputs), None if labels[0] is None else torch.cat(labels).cpu()


def _numbers(scores: Tensor, labels: Tensor | None, teacher: Tensor | None = None) -> dict[str, float]:
    found: dict[str, Any] = {}
    if labels is not None:
        classes = scores.shape[-1]
        found["top1"] = metrics.topk_accuracy(scores, labels)
        if classes > 5:
            found["top5"] = metrics.topk_accuracy(scores, labels, k=5)
        found["f1"] = metrics.f1(scores.argmax(-1), labels, classes)
        found["ece"] = metrics.calibration_error(scores.softmax(-1), labels)
    if teacher is not None:
        found["agreement"] = metrics.agreement(scores, teacher)
        found["teacher_kl"] = metrics.teacher_kl(scores, teacher)
    return {name: float(value) for name, value in found.items()}
