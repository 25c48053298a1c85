"""A classifier's embedding: what its last linear layer reads."""

from typing import Any

from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.nn.heads import find_head, head_of
from limbeck.teachers.cached import Cached
from limbeck.teachers.store import OUTPUT


def with_embedding(role: Role, x: Any) -> tuple[Tensor, Tensor]:
    """A classifier's logits and its embedding, which is what its last linear layer reads, in one forward pass.

    For stored outputs (`Cached`) it is the one layer that was stored beside them.

    Args:
        role: The classifier.
        x: A batch of B samples, or a model input.

    Returns:
        Logits `[B, C]` and embedding `[B, D]`.

    Raises:
        UsageError: The last linear layer does not read one vector per sample and give the logits, or no layer is stored.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from limbeck import Batch
        >>> role = Role("teacher", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> logits, embedding = with_embedding(role, Batch(x=torch.ones(2, 4)))
        >>> torch.equal(role.module[2](embedding), logits), embedding.shape
        (True, torch.Size([2, 8]))
    """
    if isinstance(role.module, Cached):
        path = _stored(role.module)
        logits, taps = role.features(x, path)
        return logits, taps[path]
    kept: list[Any] = []
    head = head_of(role.module)
    hook = head.register_forward_hook(lambda _module, args, output: kept.append((*args, output)))
    try:
        logits, _ = role.features(x)
    finally:
        hook.remove()
    if len(kept) != 1 or kept[0][0].ndim != 2 or kept[0][-1].shape != logits.shape:
        seen = ", ".join(f"{list(call[0].shape)} -> {list(call[-1].shape)}" for call in kept) or "it was not called"
        raise UsageError(
            "the last linear layer is not the classifier's head",
            where=f"{role.name}.{find_head(role.module)}",
            found=f"{seen}; the model gives {list(logits.shape)}",
            expected="[B, D] -> [B, C], the model's logits",
            fix="define the head last, or wrap the model: its features, then a linear layer",
        )
    return logits, kept[0][0]


def embedding_size(role: Role) -> tuple[int, int]:
    """The sizes of a classifier's embedding and of its logits, found without running it.

    Example:
        >>> from torch import nn
        >>> embedding_size(Role("teacher", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))))
        (8, 3)
    """
    if isinstance(role.module, Cached):
        layers = role.module.store.header.layers
        return layers[_stored(role.module)].shape[-1], layers[OUTPUT].shape[-1]
    head = head_of(role.module)
    return head.in_features, head.out_features


def _stored(teacher: Cached) -> str:
    if len(teacher.taps) != 1:
        raise UsageError(
            "the embedding is not known from stored outputs",
            where="teacher",
            found=f"{len(teacher.taps)} stored layers",
            expected="one, whose output is what the last linear layer reads",
            fix="collect(teacher, source, path, layers=[PATH]) stores it; or run the teacher in every step, without a cache",
        )
    return teacher.taps[0]
