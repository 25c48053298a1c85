"""Students without context: one vector per token, taken from a sentence encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.models.sentence import SentenceEncoder, TokenAverage, Tokenize, static_tokenize


@dataclass(frozen=True)
class StaticTokens:
    """Turn a sentence encoder into a static one: a weighted mean of token vectors (`TokenAverage`).

    A token's vector is what the teacher makes of the token alone: its last hidden state between the special marks, less the
    mean over the texts, scaled to mean length 1. Its weight is `a / (a + p)` of smooth inverse frequency (Arora, Liang and Ma
    2017, eq. 2), with the token's share `p` of the texts.

    Args:
        texts: Texts that tell how frequent tokens are; without them all weights are 1.
        rarity: `a > 0`; smaller values favour rare tokens more.
        initial: `"teacher"` runs the teacher over its vocabulary; `"zeros"` makes the structure only, for weights that are
            loaded afterwards.
    """

    texts: Sequence[str] = field(default=(), repr=False)
    rarity: float = 1e-3
    initial: Literal["teacher", "zeros"] = "teacher"

    def __post_init__(self) -> None:
        if self.rarity <= 0:
            raise UsageError("the rarity is out of range", where="rarity", found=self.rarity, expected="above 0")

    def __call__(self, module: nn.Module) -> tuple[SentenceEncoder, dict[str, Any]]:
        """The student, and the record that rebuilds its structure."""
        if not isinstance(module, SentenceEncoder) or module.static:
            raise UsageError(
                "only a sentence encoder with context can become a static one",
                where="student=static",
                found="a static encoder" if isinstance(module, SentenceEncoder) else type(module).__name__,
                expected="a SentenceEncoder",
                fix="load the teacher with limbeck.models.sentence.load_encoder",
            )
        tokenize = static_tokenize(module.tokenize)
        size = len(tokenize.tokenizer)
        if self.initial == "zeros":
            vectors, log_weights = torch.zeros(size, module.encode(["a"]).shape[1]), torch.zeros(size)
        else:
            share = token_shares(tokenize(self.texts)["input_ids"] if self.texts else [], size)
            vectors = token_vectors(module)
            vectors -= share @ vectors
            vectors /= vectors.norm(dim=1).mean()  # [V, D]
            log_weights = (self.rarity / (self.rarity + share)).log() if self.texts else torch.zeros(size)
        normalise = [part for part in module.parts if type(part).__name__ == "Normalize"]
        student = SentenceEncoder([TokenAverage(vectors, log_weights), *normalise], tokenize, module.settings)
        return student.to(next(module.parameters()).device), {
            "kind": "limbeck.convert.static:static_tokens",
            "initial": "zeros",
        }


def static_tokens(module: nn.Module, record: Mapping[str, Any]) -> SentenceEncoder:
    """The structure of a static student, from the record of its conversion; the weights come from a checkpoint."""
    return StaticTokens(initial=record["initial"])(module)[0]


def token_shares(ids: Sequence[Sequence[int]], size: int) -> Tensor:
    """The share of each token among all tokens of some texts `[V]`; equal shares without texts.

    Example:
        >>> token_shares([[1, 1], [2, 1]], size=3).tolist()
        [0.0, 0.75, 0.25]
    """
    flat = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
    counts = flat.bincount(minlength=size).float() if len(flat) else torch.ones(size)
    return counts / counts.sum()


@torch.no_grad()
def token_vectors(encoder: SentenceEncoder, batch_size: int = 1024) -> Tensor:
    """What a sentence encoder makes of each token of its vocabulary alone, before normalisation.

    Args:
        encoder: An encoder whose first part is a transformer.
        batch_size: Tokens of one call.

    Returns:
        The last hidden state at the token, pooled over it and projected like a text `[V, D]`; float32.
    """
    before, after = _marks(encoder.tokenize)
    if (space := len(before) + 1 + len(after)) > encoder.tokenize.max_length:
        raise UsageError(
            "no token fits", where="max_length", found=encoder.tokenize.max_length, expected=f"{space} or more"
        )
    transformer, *rest = (part for part in encoder.parts if type(part).__name__ != "Normalize")
    training, device = encoder.training, next(encoder.parameters()).device
    found = []
    encoder.eval()
    try:
        for ids in torch.arange(len(encoder.tokenize.tokenizer)).split(batch_size):
            row = torch.cat([before.expand(len(ids), -1), ids[:, None], after.expand(len(ids), -1)], dim=1).to(device)
            hidden = transformer({"input_ids": row, "attention_mask": torch.ones_like(row)})["token_embeddings"]
            alone = slice(len(before), len(before) + 1)
            features = {"token_embeddings": hidden[:, alone], "attention_mask": torch.ones_like(row[:, alone])}
            for part in rest:
                features = part(features)
            found.append(features["sentence_embedding"].float().cpu())
    finally:
        encoder.train(training)
    return torch.cat(found)


def _marks(tokenize: Tokenize) -> tuple[Tensor, Tensor]:
    """The special ids before and after every text."""
    bare, marked = (
        tokenize.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, tokenize.special)
    )
    at = next(i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return torch.tensor(marked[:at], dtype=torch.int64), torch.tensor(marked[at + len(bare) :], dtype=torch.int64)
