"""Classifiers whose last linear layer grows, loses rows, takes another order, or is scaled after training."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.nn.heads import find_head, head_of

_SMALL = 1e-12  # a mean norm below it is that of rows of zeros


@dataclass(frozen=True)
class ReshapeHead:
    """Copy a classifier and give it another last linear layer: some of the old rows, and new ones after them.

    Args:
        keep: Old rows, in their new order; None keeps all of them.
        new: Rows that are added, uniform in `[-1, 1] / sqrt(d)` with a bias of 0.
        bias: Whether the new layer has a bias; None leaves that as it is.
        non_negative: Whether new rows are uniform in `[0, 1] / sqrt(d)` instead.
        seed: Seed of the new rows.

    Raises:
        UsageError: The model has no linear layer, or not these rows.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> grown, record = ReshapeHead(new=2)(net)
        >>> grown(torch.ones(1, 4)).shape, bool((grown[2].weight[:3] == net[2].weight).all())
        (torch.Size([1, 5]), True)
        >>> record
        {'kind': 'limbeck.convert.heads:reshape_head', 'path': '2', 'classes': 5, 'bias': True}
    """

    keep: Sequence[int] | None = None
    new: int = 0
    bias: bool | None = None
    non_negative: bool = False
    seed: int = 0

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The new classifier, and the record that rebuilds its structure."""
        path, old = find_head(module), head_of(module)
        keep = list(range(old.out_features)) if self.keep is None else list(self.keep)
        if not all(0 <= row < old.out_features for row in keep) or not len(keep) + self.new:
            raise UsageError(
                "the classifier does not have these rows",
                where=f"{type(module).__name__}.{path}",
                found=keep,
                expected=f"0 to {old.out_features - 1}, or new rows",
            )
        bias = old.bias is not None if self.bias is None else self.bias
        record = {"kind": f"{__name__}:reshape_head", "path": path, "classes": len(keep) + self.new, "bias": bias}
        reshaped = reshape_head(copy.deepcopy(module), record)
        head = head_of(reshaped)
        with torch.no_grad():
            head.weight.copy_(torch.cat([old.weight[keep], self._rows(old)]))
            if head.bias is not None:
                head.bias.zero_()
                if old.bias is not None:
                    head.bias[: len(keep)] = old.bias[keep]
        return reshaped, record

    def _rows(self, old: nn.Linear) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.rand(self.new, old.in_features, generator=generator)  # [n, d]
        rows = rows if self.non_negative else 2 * rows - 1
        return (rows / math.sqrt(old.in_features)).to(old.weight)


def reshape_head(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a classifier with a reshaped head, from its record; the layer is replaced in place."""
    old = module.get_submodule(record["path"])
    assert isinstance(old, nn.Linear)
    head = nn.utils.skip_init(nn.Linear, old.in_features, record["classes"], record["bias"])
    head = head.to(old.weight.device, old.weight.dtype).train(old.training)
    if not record["path"]:
        return head
    parent, _, name = record["path"].rpartition(".")
    setattr(module.get_submodule(parent), name, head)
    if isinstance(getattr(module, "num_classes", None), int):
        setattr(module, "num_classes", record["classes"])  # noqa: B010
    config: Any = getattr(module, "config", None)
    if hasattr(config, "num_labels"):
        config.num_labels = record["classes"]
    return module


@dataclass(frozen=True)
class AlignHead:
    """Copy a classifier and scale the rows of its newest classes to the mean norm of the older ones.

    `w_c <- gamma w_c` for `c >= old` with `gamma` of `alignment` (Zhao et al. 2020).

    Args:
        old: Number of older classes, whose rows come first; at least 1, and below the number of classes.
        norm: Order of the norm of a row, `> 0`.
        clamp: Whether `gamma` is 1 at most.
        bias: Whether biases of the newest classes are scaled as well, so that whole logits are.

    Raises:
        UsageError: There is no old or no new class.

    Example:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> _ = head.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> AlignHead(old=1)(head)[0].weight.data
        tensor([[3., 4.],
                [0., 5.]])
    """

    old: int
    norm: float = 2.0
    clamp: bool = False
    bias: bool = False

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The aligned classifier and the record; the structure is that of before."""
        aligned = copy.deepcopy(module)
        head = head_of(aligned)
        with torch.no_grad():
            gamma = alignment(head.weight, self.old, self.norm, self.clamp)
            head.weight[self.old :] *= gamma
            if self.bias and head.bias is not None:
                head.bias[self.old :] *= gamma
        return aligned, {"kind": f"{__name__}:align_head", "old": self.old}


def align_head(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of an aligned classifier, which is that of before: weights are loaded afterwards."""
    return module


def alignment(weight: Tensor, old: int, norm: float = 2.0, clamp: bool = False) -> Tensor:
    """By how much the rows of new classes are too short: the mean norm of old rows over that of new ones.

    `gamma = mean_{c < old} ||w_c||_p / mean_{c >= old} ||w_c||_p` (Zhao et al. 2020).

    Args:
        weight: Rows of the classes `[C, d]`, the old ones first.
        old: Number of old classes, 1 to C - 1.
        norm: `p > 0`.
        clamp: Whether it is 1 at most.

    Returns:
        Scalar; 1 where the rows on one side are all zero.

    Raises:
        UsageError: There is no old or no new class.

    Example:
        >>> alignment(torch.tensor([[3.0, 4.0], [0.0, 10.0]]), old=1)
        tensor(0.5000)
    """
    if not 0 < old < len(weight):
        raise UsageError("there is nothing to align", where="old", found=old, expected=f"1 to {len(weight) - 1}")
    norms = torch.linalg.vector_norm(weight, norm, dim=1)  # [C]
    before, after = norms[:old].mean(), norms[old:].mean()
    gamma = torch.where((before > _SMALL) & (after > _SMALL), before / after.clamp_min(_SMALL), torch.ones_like(after))
    return gamma.clamp_max(1) if clamp else gamma
