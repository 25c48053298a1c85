"""A classifier's embedding: what its last linear layer reads."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.core.source import Source
from limbeck.evaluate.cost import evaluating
from limbeck.nn.heads import find_head, head_of
from limbeck.nn.subspace import ClassMoments
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


def embedding_layer(role: Role, x: Any) -> str:
    """The dotted path of the layer whose output is a classifier's embedding, for outputs that are stored.

    Args:
        role: The classifier.
        x: A batch or a model input, on the model's device.

    Raises:
        UsageError: No layer gives it: something else happens to it before the last linear layer reads it.

    Example:
        >>> import torch
        >>> embedding_layer(Role("teacher", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))), torch.ones(2, 4))
        '1'
    """
    outputs: dict[str, Any] = {}
    hooks = [
        part.register_forward_hook(partial(_keep, outputs, path)) for path, part in role.module.named_modules() if path
    ]
    try:
        with evaluating(role.module):
            _, embedding = with_embedding(role, x)
    finally:
        for hook in hooks:
            hook.remove()
    path = next((path for path, output in outputs.items() if output is embedding), None)
    if path is None:
        raise UsageError(
            "the teacher's embedding cannot be stored",
            where=f"{role.name}.{find_head(role.module)}",
            found="an input that is no layer's output",
            expected="the output of another layer, as it is",
            fix="run without stored outputs (cache); or put a torch.nn.Identity before the last linear layer",
        )
    return path


@torch.no_grad()
def readout(role: Role, source: Source, batch_size: int = 256) -> Tensor:
    """The weights `[C, D]` that make a classifier's logits of its embeddings.

    Those of its last linear layer; of stored outputs, those of the regression of logits on embeddings.

    Args:
        role: The classifier.
        source: Stored samples, of which view 0 is looked at; not used where the layer is there.
        batch_size: Samples of one reading.

    Example:
        >>> from limbeck.data import TensorSource
        >>> role = Role("teacher", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> readout(role, TensorSource(torch.ones(2, 4))).shape
        torch.Size([3, 8])
    """
    if not isinstance(role.module, Cached):
        return head_of(role.module).weight.detach()
    size, classes = embedding_size(role)
    moments = ClassMoments(1, size + classes)
    for rows in torch.arange(len(source)).split(batch_size):
        logits, embedding = with_embedding(role, source.batch(rows, 0))
        moments.add(torch.cat([embedding, logits], 1), torch.zeros(len(rows), dtype=torch.int64))
    covariance = moments.covariances[0]
    # Below a millionth of the largest variance lies the rounding of stored numbers.
    inverse = torch.linalg.pinv(covariance[:size, :size], rtol=1e-6, hermitian=True)
    return (inverse @ covariance[:size, size:]).mT


def _keep(outputs: dict[str, Any], path: str, _module: nn.Module, _args: Any, output: Any) -> None:
    outputs[path] = output


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
