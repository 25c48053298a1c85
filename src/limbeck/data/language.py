"""Texts for causal language models: one long row of tokens, cut into blocks of equal length."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.data import Data
from limbeck.data.ids import digest
from limbeck.data.sources import Rows


class TokenBlocks(Rows):
    """Blocks of a long row of tokens; what is left at the end is dropped.

    Batches have `x = {"input_ids", "attention_mask"}`, both `[B, L]` int64, and no labels: a model predicts the next token, see
    `limbeck.losses.next_tokens`.

    Args:
        tokens: `[T]`, whole numbers.
        block_size: Tokens of a block L, at least 2.
        first: The first sample's id.

    Raises:
        UsageError: There is no whole block.

    Example:
        >>> source = TokenBlocks(torch.arange(10), block_size=4)
        >>> len(source), source.batch(torch.tensor([1]), 0).x["input_ids"]
        (2, tensor([[4, 5, 6, 7]]))
    """

    def __init__(self, tokens: Tensor, block_size: int, first: int = 0) -> None:
        if block_size < 2 or len(tokens) < block_size:
            raise UsageError(
                "there is no whole block of tokens",
                where="data",
                found=f"{len(tokens)} tokens in blocks of {block_size}",
                expected="blocks of 2 or more, and a text that fills one",
            )
        count = len(tokens) // block_size
        self.tokens = tokens[: count * block_size].to(torch.int32).view(count, block_size)
        self.ids = first + torch.arange(count)

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The blocks at positions `rows`."""
        ids = self.tokens.index_select(0, rows).to(torch.int64)
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Batch(x=x, id=self.ids.index_select(0, rows), view=torch.full((len(rows),), view))

    def fingerprint(self) -> str:
        """Of the tokens."""
        return digest(self.tokens, self.ids)


def text_blocks(
    path: str | os.PathLike[str],
    block_size: int,
    tokenizer: Callable[[str], Any] | None = None,
    *,
    validation: float = 0.05,
    test: float = 0.05,
) -> Data:
    """A text file, or all `.txt` files of a folder, as blocks of tokens, the last parts held out.

    Args:
        path: The file or folder.
        block_size: Tokens of a block.
        tokenizer: Called with the text; a tokenizer of transformers, or a function to numbers. Default: bytes, 256 of them.
        validation: Share of the tokens to tune on, from the end.
        test: Share of the tokens to test on, the very end.

    Raises:
        UsageError: There is no text, or a part has no whole block.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("to be or not to be " * 20)
        ...     data = text_blocks(folder, block_size=8)
        >>> [(name, len(source)) for name, source in data.items()]
        [('train', 42), ('validation', 2), ('test', 2)]
    """
    place = Path(path)
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    try:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("this text cannot be read", where=path, found=error, expected="a file of UTF-8") from None
    if not text:
        raise UsageError("there is no text", where=path, expected=".txt files")
    if tokenizer is None:
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    else:
        encoded = tokenizer(text)
        tokens = torch.as_tensor(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)
    held = [int(len(tokens) * share) for share in (validation, test)]
    parts = tokens.split([len(tokens) - sum(held), *held])
    firsts = [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    named = zip(("train", "validation", "test"), parts, firsts, strict=True)
    return Data(**{name: TokenBlocks(part, block_size, first) for name, part, first in named})


class Prompts(Rows):
    """Prompts that models go on from, each with a negative or empty one for guidance.

    Batches have `x = {"input_ids", "attention_mask"}` `[B, P]` and `negative`, the same in `[B, Q]`.

    Args:
        tokens: `[N, P]` whole numbers, padded on the left.
        negative: `[Q]` or `[N, Q]`, as `tokens`.
        mask: `[N, P]`, 0 at padding. Default: all ones.
        negative_mask: As `negative`.

    Raises:
        UsageError: The shapes do not fit, or a prompt is padded on the right.

    Example:
        >>> source = Prompts(torch.tensor([[0, 5], [7, 8]]), torch.tensor([9]), mask=torch.tensor([[0, 1], [1, 1]]))
        >>> batch = source.batch(torch.tensor([1, 0]), 0)
        >>> batch.x["input_ids"].tolist(), batch.negative["input_ids"].tolist()
        ([[7, 8], [0, 5]], [[9], [9]])
    """

    def __init__(
        self, tokens: Tensor, negative: Tensor, mask: Tensor | None = None, negative_mask: Tensor | None = None
    ) -> None:
        mask = torch.ones_like(tokens) if mask is None else mask
        negative_mask = torch.ones_like(negative) if negative_mask is None else negative_mask
        sides = {"prompts": (tokens, mask), "negative": (negative, negative_mask)}
        self.sides = {name: _prompt(name, *side, len(tokens)) for name, side in sides.items()}
        self.ids = torch.arange(len(tokens))

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The prompts at positions `rows`."""
        x, negative = (
            {"input_ids": ids.index_select(0, rows), "attention_mask": mask.index_select(0, rows)}
            for ids, mask in self.sides.values()
        )
        view_ids = torch.full((len(rows),), view)
        return Batch(x=x, negative=negative, id=self.ids.index_select(0, rows), view=view_ids)

    def fingerprint(self) -> str:
        """Of prompts and masks."""
        return digest("prompts", *(t for side in self.sides.values() for t in side))


def _prompt(name: str, ids: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if ids.ndim == 1:
        ids, mask = ids.expand(count, -1), mask.expand(count, -1)
    if ids.ndim != 2 or ids.shape != mask.shape or len(ids) != count or ids.shape[1] == 0:
        raise UsageError(
            "prompts do not fit", where=f"data.{name}", found=f"tokens {list(ids.shape)}, mask {list(mask.shape)}",
            expected=f"both [{count}, at least 1]",
        )  # fmt: skip
    if not mask[:, -1].all():
        raise UsageError(
            "a prompt ends in padding", where=f"data.{name}", expected="padding on the left, where nothing is gone on from",
            fix="tokenizer.padding_side = 'left'",
        )  # fmt: skip
    return ids.to(torch.int64).contiguous(), mask.to(torch.int64).contiguous()
