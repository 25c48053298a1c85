"""Negative prompts in cross-attention: what a negative text would have attended to is taken away (SNOOPI, Nguyen et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.diffusion.guidance import Scale


def attention_away(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_negative: Tensor,
    v_negative: Tensor,
    scale: Scale,
    mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v - a softmax(q k_-^T / sqrt(d)) v_-` of each head, without normalising again.

    Args:
        q: Queries `[B, H, N, d]`.
        k: Keys of the text `[B, H, L, d]`.
        v: Its values.
        k_negative: Keys of the negative text `[B, H, M, d]`, by the same projection.
        v_negative: Its values.
        scale: `a`, 0 for attention as it is; a number, or one for each sample `[B]`.
        mask: Of the text, as `scaled_dot_product_attention` takes it, `[B, H or 1, N or 1, L]`.
        negative_mask: Of the negative text.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 4, 8)
        >>> attention_away(q, k, v, k, v, 1.0).abs().max()
        tensor(0.)
    """
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if not isinstance(scale, Tensor):
        if scale == 0:
            return found
        factor: Any = scale
    else:
        factor = scale.to(found).view(-1, 1, 1, 1)
    return found - factor * F.scaled_dot_product_attention(q, k_negative, v_negative, attn_mask=negative_mask)


class AwayProcessor:
    """A processor for the attention layers of diffusers: cross-attention with a negative text, before the output projection.

    Args:
        negative: Hidden states of the negative text `[B, M, C]`, or `[1, M, C]` for all samples.
        scale: `a`, a number or one for each sample `[B]`.
        mask: Which of its tokens count `[B, M]`, boolean; None for all.
    """

    def __init__(self, negative: Tensor, scale: Scale, mask: Tensor | None = None) -> None:
        self.negative, self.scale, self.mask = negative, scale, mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """What the layer gives for positions `[B, N, C]` or `[B, C, H, W]` and a text `[B, L, C']`."""
        residual, shape = hidden_states, hidden_states.shape
        assert encoder_hidden_states is not None
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, length, _ = encoder_hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, length)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        q = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        k, v = self._keys(attn, encoder_hidden_states)
        k_negative, v_negative = self._keys(attn, self._negative(batch).to(encoder_hidden_states.dtype))
        mask = None if self.mask is None else self.mask.bool().expand(batch, -1)[:, None, None].to(q.device)
        found = attention_away(q, k, v, k_negative, v_negative, self.scale, attention_mask, mask)
        found = found.transpose(1, 2).flatten(2).to(q.dtype)
        found = attn.to_out[1](attn.to_out[0](found))  # projection, dropout
        if len(shape) == 4:
            found = found.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            found = found + residual
        return found / attn.rescale_output_factor

    def _keys(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        if attn.norm_cross:
            states = attn.norm_encoder_hidden_states(states)
        return _heads(attn, attn.to_k(states), attn.norm_k), _heads(attn, attn.to_v(states), None)

    def _negative(self, batch: int) -> Tensor:
        if len(self.negative) not in (1, batch):
            raise UsageError(
                "each sample needs its negative text", where="negative", found=f"{len(self.negative)} for {batch} samples",
                expected=f"1 or {batch}", fix="where guidance stacks two batches, stack the negative text in the same way",
            )  # fmt: skip
        return self.negative.expand(batch, -1, -1)


def _heads(attn: Any, states: Tensor, norm: Any) -> Tensor:
    states = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return states if norm is None else norm(states)


@contextmanager
def away(model: nn.Module, negative: Tensor, scale: Scale, mask: Tensor | None = None) -> Iterator[None]:
    """Inside, the cross-attention of a model leads away from a negative text; self-attention stays as it is.

    The model is any that attends to a text by layers of diffusers, such as `UNet2DConditionModel` or `PixArtTransformer2DModel`,
    of one step or of few; nothing is trained and nothing of it changes. A projection of texts that it has (`caption_projection`)
    is applied to the negative text too. What gradient checkpointing computes again, later and outside, is computed as inside.

    Args:
        model: The model, or one that holds it.
        negative: Hidden states of the negative text `[B, M, C]`, or `[1, M, C]` for all samples.
        scale: 0 to about 1; the paper uses 0.1 (SD 1.5), 0.2 (SD 2.1) and 0.5 (PixArt), its first version 0.04, 0.3 and 0.8.
        mask: Which of its tokens count `[B, M]`, boolean.

    Raises:
        UsageError: The model has no such layer.
    """
    layers: list[Any] = [
        part for part in model.modules() if getattr(part, "is_cross_attention", False) and hasattr(part, "set_processor")
    ]  # fmt: skip
    if not layers:
        raise UsageError(
            "this model does not attend to a text", where="model", found=type(model).__name__,
            expected="cross-attention layers of diffusers (`attn2`)",
        )  # fmt: skip
    project: Any = next((p.caption_projection for p in model.modules() if getattr(p, "caption_projection", None)), None)
    processor = AwayProcessor(negative if project is None else project(negative), scale, mask)
    blocks: list[Any] = [part for part in model.modules() if getattr(part, "_gradient_checkpointing_func", None)]
    functions = [block._gradient_checkpointing_func for block in blocks]
    try:
        for block, function in zip(blocks, functions, strict=True):
            block._gradient_checkpointing_func = partial(_checkpointed, function, layers, processor)
        with _processed(layers, processor):
            yield
    finally:
        for block, function in zip(blocks, functions, strict=True):
            block._gradient_checkpointing_func = function


@contextmanager
def _processed(layers: Sequence[Any], processor: AwayProcessor) -> Iterator[None]:
    """Inside, all layers have this processor."""
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(processor)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.set_processor(old)


def _checkpointed(
    checkpoint: Callable[..., Any],
    layers: Sequence[Any],
    processor: AwayProcessor,
    block: Callable[..., Any],
    *args: Any,
) -> Any:
    """A block under checkpointing, which has the processor in the backward pass too."""

    def again(*args: Any) -> Any:
        with _processed(layers, processor):
            return block(*args)

    return checkpoint(again, *args)
