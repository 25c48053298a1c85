"""Several teachers as one."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role


class Ensemble(nn.Module):
    """The weighted average of several frozen models, as logits.

    Probabilities: `log sum_m w_m softmax(z_m)`, whose softmax is the mean of the members' distributions (the soft targets of
    Hinton et al. 2015, section 2, by arithmetic mean). Logits: `sum_m w_m z_m`, their geometric mean, also right for embeddings.
    A temperature applied to the result softens the mean, not the members.

    Args:
        modules: The members; they are frozen, and may be `Cached`.
        average: What is averaged.
        weights: Positive, one per member; their sum is scaled to 1. Default: equal.
        preprocess: One function of the input per member, such as its own normalisation, or None for it.
        class_maps: One per member, or None for it: for each class of the ensemble `[C]` the member's class, ints.

    Raises:
        UsageError: There are no members, or lists or weights that do not fit them.

    Example:
        >>> member = nn.Linear(2, 3)
        >>> x = torch.randn(4, 2)
        >>> both = Ensemble([member, member], average="logits")
        >>> torch.allclose(both(x), member(x), atol=1e-6)
        True
    """

    weights: Tensor

    def __init__(
        self,
        modules: Sequence[nn.Module],
        average: Literal["probabilities", "logits"] = "probabilities",
        weights: Sequence[float] | None = None,
        preprocess: Sequence[Callable[[Any], Any] | None] | None = None,
        class_maps: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        super().__init__()
        size = len(modules)
        weights = [1.0] * size if weights is None else weights
        preprocess = [None] * size if preprocess is None else preprocess
        class_maps = [None] * size if class_maps is None else class_maps
        _check(size, average, weights, preprocess, class_maps)
        self.average = average
        self.roles = [Role(f"member {i}", m, p) for i, (m, p) in enumerate(zip(modules, preprocess, strict=True))]
        self.members = nn.ModuleList(modules)
        self.takes_batch = any(role.takes_batch for role in self.roles)
        self.largest = [0 if classes is None else max(classes) for classes in class_maps]
        self.register_buffer("weights", torch.tensor(weights) / sum(weights), persistent=False)
        for i, (role, classes) in enumerate(zip(self.roles, class_maps, strict=True)):
            role.freeze()
            index = None if classes is None else torch.tensor(classes)
            self.register_buffer(f"class_map_{i}", index, persistent=False)

    def forward(self, x: Any, apart: bool = False) -> Tensor:
        """The average `[B, ..., C]` for a model input or a batch; each member's logits `[M, B, ..., C]` where kept apart."""
        outputs = [self._member(i, x) for i in range(len(self.roles))]
        if len({z.shape for z in outputs}) > 1:
            raise UsageError(
                "the members of an ensemble return different shapes",
                found=", ".join(str(list(z.shape)) for z in outputs),
                expected="the same classes in the same order",
                fix="give class_maps",
            )
        z = torch.stack(outputs)
        return z if apart else self.mean(z)

    def mean(self, z: Tensor) -> Tensor:
        """The average `[B, ..., C]` of the members' logits `[M, B, ..., C]`.

        Example:
            >>> Ensemble([nn.Identity(), nn.Identity()], average="logits").mean(torch.tensor([[[1.0]], [[3.0]]]))
            tensor([[2.]])
        """
        w = self.weights.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 1))
        if self.average == "logits":
            return (w * z).sum(0)
        return (z.log_softmax(-1) + w.log()).logsumexp(0)

    def _member(self, i: int, x: Any) -> Tensor:
        z = self.roles[i](x)
        index = getattr(self, f"class_map_{i}")
        if index is None:
            return z
        if self.largest[i] >= z.shape[-1]:
            raise UsageError(
                "a class map names a class that the member does not have",
                where=f"class_maps[{i}]",
                found=self.largest[i],
                expected=f"0 to {z.shape[-1] - 1}",
            )
        return z.index_select(-1, index)

    def extra_repr(self) -> str:
        """What belongs to the fingerprint beside the members."""
        return f"average={self.average}, preprocess={[role.preprocess for role in self.roles]}"


def _check(size: int, average: str, weights: Sequence[float], *lists: Sequence[Any]) -> None:
    problems = [
        ("modules", size > 0, "none", "one member or more"),
        ("average", average in ("probabilities", "logits"), average, "probabilities or logits"),
        (
            "class_maps",
            all(m is None or (len(m) and min(m) >= 0) for m in lists[-1]),
            "no class, or one below 0",
            "classes",
        ),
        ("weights", all(0 < w < math.inf for w in weights), list(weights), "finite numbers above 0"),
        *(
            (name, len(v) == size, f"{len(v)} items", f"{size}, one per member")
            for name, v in zip(("weights", "preprocess", "class_maps"), (weights, *lists), strict=True)
        ),
    ]
    for where, ok, found, expected in problems:
        if not ok:
            raise UsageError("these members make no ensemble", where=where, found=found, expected=expected)
