"""Texts as padded batches of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.ids import check_ids, digest, text_ids
from limbeck.data.sources import Rows, check_finite, check_labels

_CHUNK = 1000  # texts given to the tokenizer at a time
_NO_LIMIT = 1_000_000  # transformers give tokenizers without a limit a huge one


class TextSource(Rows):
    """Texts, tokenised once; a batch is gathered from flat arrays and padded to its longest text.

    Args:
        texts: N texts, or N tuples of two texts.
        tokenizer: A tokenizer of transformers, or a function from a list of texts to lists of numbers by name
            (`input_ids`, ...); None leaves the texts for `with_tokenizer`.
        y: Labels `[N, ...]`.
        max_length: Tokens of a text that are kept; None keeps what the tokenizer allows.
        ids: Unique whole numbers `[N]`. Default: hashes of the texts.
        classes: Class names.

    Attributes:
        texts: The texts.
        lengths: Number of tokens of each text `[N]`, for batches of texts of like length.

    Raises:
        UsageError: No texts, an item that is no text, labels that do not fit, ids that are not unique.

    Example:
        >>> def letters(texts):
        ...     return {"input_ids": [[ord(c) for c in t] for t in texts]}
        >>> TextSource(["ab", "c"], letters).batch(torch.tensor([0, 1]), view=0).x["input_ids"].tolist()
        [[97, 98], [99, 0]]
    """

    def __init__(
        self,
        texts: Sequence[Any],
        tokenizer: Callable[..., Any] | None = None,
        y: Any = None,
        *,
        max_length: int | None = None,
        ids: Tensor | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.texts = [t if isinstance(t, str) else _pair(t, row) for row, t in enumerate(texts)]
        if not self.texts:
            raise UsageError("there are no samples", where="data", found="no texts")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.labels = None if y is None else torch.as_tensor(y)
        self.classes = None if classes is None else tuple(classes)
        if self.labels is not None:
            if len(self.labels) != len(self.texts):
                found = f"{len(self.texts)} texts, {len(self.labels)} labels"
                raise UsageError("texts and labels have different lengths", where="data", found=found)
            check_finite(self.labels, "y")
            check_labels(self.labels, None if self.classes is None else len(self.classes))
        self.ids = check_ids(text_ids(self.texts) if ids is None else ids, len(self.texts), "ids")
        self._tokens = None if tokenizer is None else Tokens.of(self.texts, tokenizer, max_length)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each text `[N]`."""
        return self._tokenised().lengths

    def with_tokenizer(self, tokenizer: Callable[..., Any], max_length: int | None = None) -> TextSource:
        """The same texts, labels and ids for another tokenizer."""
        y, classes = self.labels, self.classes
        return TextSource(self.texts, tokenizer, y, max_length=max_length, ids=self.ids, classes=classes)

    def subset(self, rows: Tensor | Sequence[int]) -> TextSource:
        """The source of the texts at positions `rows` `[M]`, in that order; ids stay, tokens are shared."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        part = copy.copy(self)
        part.ids = check_ids(self.ids[rows], len(rows), "subset")
        part.texts = [self.texts[row] for row in rows.tolist()]
        part.labels = None if self.labels is None else self.labels[rows]
        part.classes = self.classes or (tuple(map(str, range(n))) if (n := self.num_classes) else None)
        part._tokens = None if self._tokens is None else self._tokens.take(rows)
        return part

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The texts at positions `rows` `[B]`: `x` maps `input_ids`, `attention_mask`, ... to `[B, L]` int64."""
        fields: dict[str, Any] = {"x": self._tokenised().padded(rows), "id": self.ids.index_select(0, rows)}
        fields["view"] = torch.full((len(rows),), view)
        if self.labels is not None:
            fields["y"] = self.labels.index_select(0, rows)
        return Batch(**fields)

    def fingerprint(self) -> str:
        """Of the texts, labels, ids and the tokens."""
        labels = () if self.labels is None else (self.labels,)
        tokens = () if self._tokens is None else (self._tokens.digest(),)
        return digest(text_ids(self.texts), self.ids, *labels, *tokens)

    def _tokenised(self) -> Tokens:
        if self._tokens is None:
            raise UsageError(
                "the texts have no tokenizer",
                where="data",
                fix="give load_data a tokenizer, or take source.with_tokenizer(tokenizer)",
            )
        return self._tokens


class Tokens:
    """Token numbers of many texts in flat arrays.

    Args:
        flat: Numbers of all texts one after the other, by name.
        starts: Where each text starts `[N]`.
        lengths: Numbers of each text `[N]`.
        fill: What each array is padded with.
        left: Whether the padding stands before the tokens.
    """

    def __init__(
        self, flat: dict[str, Tensor], starts: Tensor, lengths: Tensor, fill: Mapping[str, int], left: bool
    ) -> None:
        self.flat, self.starts, self.lengths, self.fill, self.left = flat, starts, lengths, fill, left

    @classmethod
    def of(cls, texts: Sequence[Any], tokenizer: Callable[..., Any], max_length: int | None) -> Tokens:
        """Tokenise texts or pairs of texts."""
        if max_length is not None and is_dataclass(tokenizer) and hasattr(tokenizer, "max_length"):
            # It cuts texts itself, before it adds its marks.
            tokenizer = replace(cast(Any, tokenizer), max_length=min(max_length, tokenizer.max_length))
        flat: dict[str, list[int]] = {}
        lengths: list[int] = []
        for start in range(0, len(texts), _CHUNK):
            encoded = _encode(texts[start : start + _CHUNK], tokenizer, max_length)
            for name, lists in encoded.items():
                flat.setdefault(name, []).extend(token for tokens in lists for token in tokens)
            lengths += [len(tokens) for tokens in next(iter(encoded.values()))]
        arrays = {name: torch.tensor(values, dtype=torch.int32) for name, values in flat.items()}
        sizes = torch.tensor(lengths)
        if "attention_mask" not in arrays:
            arrays["attention_mask"] = torch.ones(int(sizes.sum()), dtype=torch.int32)
        fill = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
        fill["token_type_ids"] = getattr(tokenizer, "pad_token_type_id", None) or 0
        left = getattr(tokenizer, "padding_side", "right") == "left"
        return cls(arrays, sizes.cumsum(0) - sizes, sizes, fill, left)

    def take(self, rows: Tensor) -> Tokens:
        """The texts at positions `rows`, in the same arrays."""
        return Tokens(self.flat, self.starts[rows], self.lengths[rows], self.fill, self.left)

    def digest(self) -> str:
        """A hash of the tokens and the padding."""
        return digest(*self.flat, *self.flat.values(), self.starts, self.lengths, self.fill, self.left)

    def padded(self, rows: Tensor) -> dict[str, Tensor]:
        """The texts at positions `rows` `[B]`, padded to the longest: `[B, L]` int64 by name."""
        lengths = self.lengths.index_select(0, rows)[:, None]
        longest = max(1, int(lengths.max()))
        place = torch.arange(longest)[None]
        if self.left:
            place = place - (longest - lengths)  # [B, L], below 0 where there is padding
        inside = (place >= 0) & (place < lengths)
        at = (self.starts.index_select(0, rows)[:, None] + place).where(inside, 0)
        return {
            name: flat[at].to(torch.int64).masked_fill_(~inside, self.fill.get(name, 0))
            if len(flat)
            else torch.full(at.shape, self.fill.get(name, 0))
            for name, flat in self.flat.items()
        }


def like_lengths(
    order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator | None = None, window: int = 50
) -> Tensor:
    """A shuffled order in which the texts of a batch have like lengths, so that little is padded.

    Within every `window` batches of the given order, the texts are sorted by length; then whole batches are shuffled.

    Args:
        order: Shuffled positions `[N]`.
        lengths: Lengths by position `[N]`.
        batch_size: Texts of a batch.
        generator: Shuffles the batches.
        window: Batches that are sorted together.

    Returns:
        A permutation of `order`; a smaller batch stays at the end.

    Example:
        >>> lengths = torch.tensor([9, 1, 8, 2])
        >>> order = like_lengths(torch.tensor([0, 1, 2, 3]), lengths, 2, torch.Generator().manual_seed(0))
        >>> sorted(lengths[order].view(2, 2).sum(1).tolist())
        [3, 17]
    """
    parts = [part[lengths[part].argsort(stable=True)] for part in order.split(window * batch_size)]
    batches = list(torch.cat(parts).split(batch_size))
    last = [batches.pop()] if len(batches[-1]) < batch_size else []
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat(shuffled + last)


def _encode(texts: Sequence[Any], tokenizer: Callable[..., Any], max_length: int | None) -> dict[str, list[list[int]]]:
    inputs = [list(texts)] if isinstance(texts[0], str) else [[t[k] for t in texts] for k in range(2)]
    options: dict[str, Any] = {}
    if hasattr(tokenizer, "model_max_length"):  # a tokenizer of transformers
        limited = max_length is not None or tokenizer.model_max_length < _NO_LIMIT
        options = {"truncation": limited, "padding": False, "max_length": max_length}
    try:
        encoded = {name: list(lists) for name, lists in dict(tokenizer(*inputs, **options)).items()}
    except TypeError as error:
        if len(inputs) == 1:
            raise
        fix = "name one text column: text="
        raise UsageError(
            "the tokenizer does not take pairs of texts", where="tokenizer", found=error, fix=fix
        ) from error
    if max_length is not None and not options:
        encoded = {name: [tokens[:max_length] for tokens in lists] for name, lists in encoded.items()}
    if not encoded or any(len(lists) != len(texts) for lists in encoded.values()):
        found = sorted(encoded)
        raise UsageError(
            "the tokenizer's output is not understood", where="tokenizer", found=found, expected="lists of tokens"
        )
    return encoded


def _pair(item: Any, row: int) -> tuple[str, str]:
    pair = tuple(item) if isinstance(item, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(t, str) for t in pair):
        found = f"{item!r} in row {row}"
        raise UsageError("a sample is not a text", where="texts", found=found, expected="a string or a pair of strings")
    return pair[0], pair[1]
