"""A language model that imitates itself under guidance, and is rewarded for samples that differ."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Stage, Train
from limbeck.core.update import Update
from limbeck.data.ids import uniforms
from limbeck.diffusion.draws import Draws
from limbeck.evaluate.cost import evaluating
from limbeck.losses.tokens import guided_logits, sequence_kl
from limbeck.methods.checks import check_field
from limbeck.nn.autoregressive import along, inputs, sample


def diversity(vectors: Tensor) -> Tensor:
    """`r_ij = 1 - cos(E(y_i), E(y_j))` of the samples of each prompt.

    Args:
        vectors: `[B, n, D]`.

    Returns:
        `[B, n, n]` in [0, 2], symmetric, 0 on the diagonal.

    Example:
        >>> diversity(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))[0, 0]
        tensor([0., 1.])
    """
    unit = F.normalize(vectors.float(), dim=-1)
    away = (1 - unit @ unit.mT).clamp(0, 2)
    return away.masked_fill(torch.eye(away.shape[-1], dtype=torch.bool, device=away.device), 0.0)


def advantages(rewards: Tensor) -> Tensor:
    """How much more each sample differs from the others than these do among themselves.

    `r_i - b_i`, `r_i` the mean over `j != i` and `b_i` the mean over pairs without i, which cannot bias the gradient; with two
    samples there are none and `b = 0`.

    Args:
        rewards: `[B, n, n]` of `diversity`, n at least 2.

    Returns:
        `[B, n]`.

    Example:
        >>> advantages(torch.tensor([[[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]))
        tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    n, each = rewards.shape[-1], rewards.sum(-1)  # [B, n]
    if n == 2:
        return each
    others = (each.sum(-1, keepdim=True) - 2 * each) / ((n - 1) * (n - 2))
    return each / (n - 1) - others


@dataclass(frozen=True)
class DiversityCFG(Method):
    """Guidance distilled on the student's own samples, with a reward for diversity (Cideron et al. 2024).

    `L = E_{y ~ student} sum_n KL(student || guided teacher) - beta D`, `D = E (1 - cos(E(y), E(y')))` over samples of one
    prompt, its gradient by REINFORCE. The teacher, guided by `batch.negative`, is the student's start. Students of `beta = 0`
    and of a large one are ends of a family: see `limbeck.convert.interpolate`.

    A role `embedder`, called with `input_ids` and `attention_mask`, gives `E(y)` `[B, D]`; without it, the mean of the
    teacher's input embeddings (inferred).

    Args:
        guidance: `g` (3 is inferred).
        beta: Of the reward; 0 imitates alone.
        length: Tokens of a sample, at most.
        samples: Samples of a prompt, `n`. The paper has 2; from 3 on each has a baseline of the others (inferred).
        end: The token that ends a sample.
        length_reduction: Whether divergences add up along a sample or are averaged (inferred), which makes beta weigh more.

    Example:
        >>> from limbeck.methods.diversity_cfg.proof import Bag, Table, prompts
        >>> m = Roles(teacher=Table(), student=Table(), embedder=Bag())
        >>> batch = prompts().batch(torch.arange(2), 0)
        >>> DiversityCFG(length=3).step(m, batch).loss.shape
        torch.Size([])
    """

    logits: ClassVar[tuple[str, ...]] = ()

    guidance: float = 3.0
    beta: float = 15.0
    length: int = 64
    samples: int = 4
    end: int | None = None
    length_reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        check_field("guidance", self.guidance, self.guidance >= 1, "1 or more")
        check_field("beta", self.beta, self.beta >= 0, "0 or more")
        check_field("length", self.length, self.length >= 1, "1 or more")
        check_field("samples", self.samples, self.samples >= (2 if self.beta else 1), "2 or more, or 1 where beta is 0")
        check_field("length_reduction", self.length_reduction, self.length_reduction in ("sum", "mean"), "sum | mean")

    def check(self, m: Roles, batch: Batch) -> None:
        """There are prompts of both kinds, one vocabulary, and something that embeds."""
        if not isinstance(batch.x, dict) or "negative" not in batch:
            raise UsageError(
                "guidance needs prompts and negative prompts", where="data", found=repr(batch),
                expected="batches with x and negative, each with input_ids", fix="use limbeck.data.language.Prompts",
            )  # fmt: skip
        shapes = {}
        for name in ("teacher", "student"):
            with evaluating(m[name].module):
                shapes[name] = m[name](inputs(m[name].module, batch.x)).shape
        if shapes["teacher"] != shapes["student"]:
            raise UsageError(
                "teacher and student have different vocabularies", where="roles.student", found=list(shapes["student"]),
                expected=list(shapes["teacher"]), fix="start from a copy of the teacher",
            )  # fmt: skip
        if self.beta and "embedder" not in m:
            token_embeddings(m.teacher.module)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """One stage; what embeds is frozen."""
        frozen = (*self.frozen, *(["embedder"] if "embedder" in m else []))
        yield Train(self.step, roles={"student": None}, frozen=frozen, data=data.train)

    def step(self, m: Roles, batch: Batch) -> Update:
        """Samples of the student, their divergence from the guided teacher, and what makes them differ."""
        n, draws = self.samples, Draws(m, batch)
        prompt, negative = (_repeat(x, n) for x in (batch.x, batch.negative))
        u = torch.stack([uniforms(draws.keys(f"sample {i}"), self.length) for i in range(n)], 1).flatten(0, 1)
        with evaluating(m.student.module):  # or dropout would draw from another student
            tokens, mask = sample(m.student.module, prompt, u, end=self.end)  # [B n, L]
        own = along(m.student(inputs(m.student.module, prompt, tokens, mask)), self.length)
        with torch.no_grad():
            target = self.teacher(m, prompt, negative, tokens, mask)
        gap = sequence_kl(own, target, mask, per_token=self.length_reduction == "mean")
        if not self.beta:
            return Update("student", gap, logs={"kl": gap.detach()})
        with torch.no_grad():
            rewards = diversity(embed(m, tokens, mask).view(len(batch), n, -1))
            weights = 2 / n * advantages(rewards)  # [B, n]; grad D = 2 E (r - b) grad log p(y)
        log_p = own.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].where(mask, 0.0).sum(-1)
        gain = (weights * log_p.view(len(batch), n)).sum(1).mean()
        spread = rewards.sum((1, 2)).mean() / (n * (n - 1))
        return Update("student", gap - self.beta * gain, logs={"kl": gap.detach(), "diversity": spread})

    def teacher(self, m: Roles, prompt: Any, negative: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of the guided teacher along the samples `[B, L, V]`."""
        module, length = m.teacher.module, tokens.shape[1]
        plain = along(m.teacher(inputs(module, prompt, tokens, mask)), length)
        if self.guidance == 1.0:
            return plain.float().log_softmax(-1)
        return guided_logits(plain, along(m.teacher(inputs(module, negative, tokens, mask)), length), self.guidance)


def embed(m: Roles, tokens: Tensor, mask: Tensor) -> Tensor:
    """Vectors of samples `[B, D]`: of the role `embedder`, or the mean of the teacher's input embeddings."""
    if "embedder" in m:
        return m.embedder({"input_ids": tokens, "attention_mask": mask.long()})
    vectors = token_embeddings(m.teacher.module)(tokens).float() * mask[..., None]
    return vectors.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def token_embeddings(model: nn.Module) -> nn.Module:
    """The layer that embeds a model's tokens.

    Raises:
        UsageError: There is none.
    """
    own: Any = model
    if hasattr(model, "get_input_embeddings"):
        return own.get_input_embeddings()
    found = next((part for part in model.modules() if isinstance(part, nn.Embedding)), None)
    if found is None:
        raise UsageError(
            "nothing embeds the samples", where="roles.embedder", found=f"no embedding in {type(model).__name__}",
            fix="give a role `embedder` that makes vectors of input_ids, or beta 0",
        )  # fmt: skip
    return found


def _repeat(x: Any, n: int) -> dict[str, Tensor]:
    return {name: value.repeat_interleave(n, 0) for name, value in x.items()}
