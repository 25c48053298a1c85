"""The largest logits, with what the others add up to."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """The `k` largest logits of each sample; the other classes are summed up in one number.

    The probability of a stored class is exact: `p_i = exp(values_i - Z)` with `Z = log(exp(rest) + sum_j exp(values_j))`.

    Args:
        values: Logits, largest first `[B, ..., k]`.
        indices: Their classes `[B, ..., k]`, an integer type.
        rest: `log sum exp` of all other logits `[B, ...]` fp32; -inf where there are none.
        classes: Number of classes `C`.

    Example:
        >>> top = TopK.of(torch.tensor([[2.0, 0.0, 0.0, 1.0]]), k=2)
        >>> top.indices.tolist(), top.dense().tolist()
        ([[0, 3]], [[2.0, 0.0, 0.0, 1.0]])
    """

    values: Tensor
    indices: Tensor
    rest: Tensor
    classes: int

    @classmethod
    def of(cls, logits: Tensor, k: int) -> "TopK":
        """The top `k` of logits `[B, ..., C]`; indices take the smallest integer type."""
        classes = logits.shape[-1]
        values, indices = logits.topk(min(k, classes), dim=-1)  # [B, ..., k]
        rest = logits.float().scatter(-1, indices, -math.inf).logsumexp(-1)  # [B, ...]
        small = torch.int16 if classes <= 2**15 else torch.int32
        return cls(values, indices.to(small), rest, classes)

    def dense(self) -> Tensor:
        """Logits `[B, ..., C]` in fp32, the rest spread evenly over the classes that were not stored.

        At temperature 1 the stored classes keep their probabilities and the tail its total mass; at other temperatures
        both are as good as the even spread.
        """
        others = max(1, self.classes - self.values.shape[-1])
        tail = (self.rest.float() - math.log(others)).unsqueeze(-1)  # [B, ..., 1]
        full = tail.repeat(*(1,) * self.rest.ndim, self.classes)  # [B, ..., C]
        return full.scatter_(-1, self.indices.long(), self.values.float())

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TopK":
        """The same with `fn` applied to its tensors, such as a move to a device."""
        return TopK(fn(self.values), fn(self.indices), fn(self.rest), self.classes)
