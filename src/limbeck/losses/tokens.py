"""Losses of causal language models: every position predicts the next token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._reduce import Reduction, reduce
from limbeck.losses.logits import kl

IGNORE = -100  # what torch's cross entropy leaves out


def next_tokens(x: Any) -> Tensor:
    """What each position of a batch of texts should predict: the token after it, and `IGNORE` where there is none.

    Args:
        x: A mapping with `input_ids` `[B, L]` int64 and, where texts are padded, `attention_mask` `[B, L]`.

    Returns:
        `[B, L]` int64, the last position and padding ignored.

    Example:
        >>> import torch
        >>> next_tokens({"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
        tensor([[   6,    7, -100, -100]])
    """
    ids = x["input_ids"]
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    if "attention_mask" in x:
        mask = x["attention_mask"].bool()
        labels = labels.masked_fill(~(mask & F.pad(mask[:, 1:], (0, 1))), IGNORE)
    return labels


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the positions that predict a token.

    Args:
        logits: `[B, L, V]`.
        labels: `[B, L]`, of `next_tokens`.

    Returns:
        Scalar, nats per token; 0 where nothing is predicted. As the mean is over `token_count(labels)` tokens, say so with
        `Update(count=...)`.

    Example:
        >>> import torch
        >>> token_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORE]]))
        tensor(1.3863)
    """
    total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / token_count(labels)


def token_kl(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean divergence `tau^2 KL(p || q)` from the teacher over the positions that predict a token.

    Args:
        student: Logits `[B, L, V]`.
        teacher: Logits `[B, L, V]`.
        labels: `[B, L]`, of `next_tokens`; only which are ignored matters.
        temperature: `tau > 0`.

    Returns:
        Scalar, nats per token; 0 where nothing is predicted.

    Example:
        >>> import torch
        >>> token_kl(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[3, IGNORE]]))
        tensor(0.)
    """
    each = kl(student, teacher, temperature=temperature, reduction="none")  # [B, L]
    return each.where(labels != IGNORE, 0.0).sum() / token_count(labels)


def token_count(labels: Tensor) -> Tensor:
    """Positions that predict a token, 1 at least: a 0-d tensor for `Update(count=...)`.

    Example:
        >>> import torch
        >>> token_count(torch.tensor([[3, IGNORE]]))
        tensor(1)
    """
    return (labels != IGNORE).sum().clamp_min(1)


def guided_logits(logits: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of token distributions: `log_softmax(scale z + (1 - scale) z_negative)`.

    So `p` is proportional to `p_c^g p_neg^(1 - g)` (Cideron et al. 2024, Diversity-Rewarded CFG Distillation).

    Args:
        logits: Under the prompt `[..., V]`.
        negative: Under the negative or empty prompt `[..., V]`.
        scale: `g`; 1 is the plain model.

    Returns:
        Log-probabilities `[..., V]` in fp32 or wider. A token that either side bans with -inf stays banned.

    Example:
        >>> guided_logits(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), 2.0).exp()
        tensor([0.8808, 0.1192])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    z, z_negative = logits.to(dtype), negative.to(dtype)
    if scale == 1.0:
        return z.log_softmax(-1)
    banned = z.isneginf() | z_negative.isneginf()  # -inf less -inf is no number
    z, z_negative = z.masked_fill(banned, 0.0), z_negative.masked_fill(banned, 0.0)
    return (z_negative + scale * (z - z_negative)).masked_fill(banned, -torch.inf).log_softmax(-1)


def sequence_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, *, per_token: bool = False, reduction: Reduction = "mean"
) -> Tensor:
    """`sum_n KL(q_n || p_n)` along texts, the student q first: on its own samples it gives up what the teacher excludes.

    Args:
        student: Logits `[B, L, V]`.
        teacher: Logits or log-probabilities `[B, L, V]`.
        mask: `[B, L]` bool, the positions that count.
        per_token: Whether a text's sum is divided by its length.
        reduction: Over texts.

    Returns:
        The loss in nats, or `[B]`.

    Example:
        >>> z = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
        >>> sequence_kl(z, torch.zeros(1, 2, 2), torch.tensor([[True, True]]))
        tensor(0.1109)
    """
    each = kl(student, teacher, direction="reverse", reduction="none").where(mask, 0.0).sum(-1)
    return reduce(each / mask.sum(-1).clamp_min(1) if per_token else each, reduction)
