"""The one place that knows how models are called and what they return."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError

_KEYS = ("logits", "sentence_embedding", "embeddings", "pooler_output", "last_hidden_state")


def call(module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a model with one input of any usual form and return its raw output.

    Args:
        module: A module or compiled callable.
        x: A tensor (passed as it is), a mapping (passed as keywords) or a tuple (passed as positions).
        *args: Further positions.
        **kwargs: Further keywords, such as the active sub-network.

    Returns:
        Whatever the model returns; see `main_output`.

    Example:
        >>> import torch
        >>> call(torch.nn.Bilinear(2, 2, 1), (torch.ones(3, 2), torch.ones(3, 2))).shape
        torch.Size([3, 1])
    """
    if isinstance(x, Mapping):
        if _takes_features(module):
            return module(dict(x), *args, **kwargs)
        return module(*args, **x, **kwargs)
    if isinstance(x, tuple | list):
        return module(*x, *args, **kwargs)
    return module(x, *args, **kwargs)


def main_output(output: Any) -> Tensor:
    """The tensor that a loss is about: the logits or the embedding.

    Args:
        output: A tensor, a `ModelOutput` or mapping with a known key (logits first), or a tuple whose first item counts.

    Returns:
        The tensor; of a dual encoder, which gives `image_embeds` and `text_embeds` of pairs, both `[B, 2, D]`.

    Raises:
        UsageError: None of these forms.

    Example:
        >>> import torch
        >>> main_output({"logits": torch.ones(2), "loss": 0}).tolist()
        [1.0, 1.0]
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in _KEYS:
            if output.get(key) is not None:
                return output[key]
        if output.get("image_embeds") is not None and output.get("text_embeds") is not None:
            return torch.stack([output["image_embeds"], output["text_embeds"]], dim=1)
    elif isinstance(output, tuple | list) and output:
        return main_output(output[0])
    elif isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    found = f"{type(output).__name__} with {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__
    raise UsageError(
        "a model returned something that is not understood",
        found=found,
        expected=f"a tensor, a tuple, or a mapping with one of {', '.join(_KEYS)}, or image_embeds and text_embeds",
        fix="wrap the model in a module whose forward returns the logits or the embedding",
    )


def _takes_features(module: Any) -> bool:
    # SentenceTransformer takes its features as one mapping; asked by name so that nothing heavy is imported.
    return any(c.__name__ == "SentenceTransformer" for c in type(module).__mro__) and isinstance(module, nn.Module)
