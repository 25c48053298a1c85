"""Causal language models on their own samples: draw texts, and read what a model says along them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limbeck.core.adapt import call, main_output

Prompt = Mapping[str, Tensor]


def inputs(
    model: nn.Module, prompt: Prompt, tokens: Tensor | None = None, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What a model is called with: prompts, padded on the left, and tokens after them.

    Args:
        model: Called with `input_ids` and `attention_mask`, and with `position_ids` where its `forward` has them.
        prompt: `input_ids` and, where padded, `attention_mask`, `[B, P]`.
        tokens: `[B, L]`.
        mask: `[B, L]`, which tokens count. Default: all.
    """
    ids = prompt["input_ids"]
    seen = prompt.get("attention_mask", torch.ones_like(ids))
    if tokens is not None:
        after = torch.ones_like(tokens) if mask is None else mask.to(seen.dtype)
        ids, seen = torch.cat([ids, tokens], 1), torch.cat([seen, after], 1)
    x = {"input_ids": ids, "attention_mask": seen}
    if "position_ids" in inspect.signature(model.forward).parameters:
        x["position_ids"] = (seen.cumsum(1) - 1).clamp_min(0)
    return x


@torch.no_grad()
def sample(model: nn.Module, prompt: Prompt, uniforms: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts of a model, drawn token by token from its distribution.

    Models that take a `cache`, as newer ones of transformers do, or `past_key_values` keep what they computed. All positions
    are drawn, without a look at whether texts have ended.

    Args:
        model: Gives logits `[B, L, V]`.
        prompt: `input_ids` and `attention_mask` `[B, P]`, padded on the left.
        uniforms: A number in [0, 1) for each token to draw `[B, L]`: they alone decide.
        end: The token that ends a text.

    Returns:
        Tokens `[B, L]` int64, and a mask `[B, L]` bool of those up to the end, which is among them.

    Example:
        >>> model = nn.Embedding(3, 3, _weight=100 * torch.eye(3).roll(1, 1))  # 0, 1, 2, 0, ...
        >>> model.forward = lambda input_ids, attention_mask: nn.functional.embedding(input_ids, model.weight)
        >>> sample(model, {"input_ids": torch.tensor([[0]])}, torch.rand(1, 3), end=2)
        (tensor([[1, 2, 0]]), tensor([[ True,  True, False]]))
    """
    parameters = inspect.signature(model.forward).parameters
    kept = next((name for name in ("cache", "past_key_values") if {name, "use_cache"} <= parameters.keys()), None)
    x, cache, drawn = inputs(model, prompt), None, []
    for n in range(uniforms.shape[1]):
        if cache is not None:
            x = {k: v if k == "attention_mask" else v[:, -1:] for k, v in x.items()}
        output = call(model, x, **({kept: cache, "use_cache": True} if kept else {}))
        cache = getattr(output, kept) if kept else None
        drawn.append(_choose(main_output(output)[:, -1], uniforms[:, n]))
        x = inputs(model, prompt, torch.stack(drawn, 1))
    tokens = torch.stack(drawn, 1)
    return tokens, alive(tokens, end)


def alive(tokens: Tensor, end: int | None) -> Tensor:
    """Which tokens `[B, L]` belong to their text: those up to the first `end`, which is among them.

    Example:
        >>> alive(torch.tensor([[4, 2, 2]]), end=2)
        tensor([[ True,  True, False]])
    """
    if end is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = (tokens == end).long()
    return ended.cumsum(1) - ended == 0


def along(logits: Tensor, length: int) -> Tensor:
    """Of logits `[B, P + L, V]` for prompts and tokens, those that predict the `L = length` tokens `[B, L, V]`."""
    return logits[:, -length - 1 : -1]


def _choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token that a number in [0, 1) falls on `[B]`."""
    weights = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(weights, (uniform.to(weights) * weights[:, -1])[:, None], right=True)[:, 0]
    return chosen.clamp_max(logits.shape[-1] - 1)
