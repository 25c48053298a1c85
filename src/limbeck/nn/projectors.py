"""Projectors: small modules that bring a student's features to a teacher's shape, trained with it and left behind on export."""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import UsageError


class Projector(nn.Module):
    """A linear map over the feature dimension, or two with a ReLU between.

    Vectors `[B, D]` and tokens `[B, T, D]` are mapped along their last dimension, maps `[B, C, H, W]` along their channels by
    1x1 convolutions, and then averaged to `size` where one is given (the regressor of Romero et al. 2015, section 2.2, has
    larger kernels and no padding instead).

    Args:
        in_dim: The student's feature dimension.
        out_dim: The teacher's.
        rank: Dimensions of the features with the batch, 2, 3 or 4.
        hidden: Width between the two maps; None is one map.
        size: Height and width of the result, for maps.
        generator: Draws the weights, uniform within `1 / sqrt(fan in)`; default one seeded with 0.

    Raises:
        UsageError: The rank is none of these.

    Example:
        >>> Projector(8, 16, rank=4, size=(4, 4))(torch.randn(2, 8, 7, 7)).shape
        torch.Size([2, 16, 4, 4])
        >>> Projector(8, 16, hidden=32)(torch.randn(2, 8)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int = 2,
        *,
        hidden: int | None = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank not in (2, 3, 4):
            raise UsageError("there is no projector for features of this rank", found=rank, expected="2, 3 or 4")
        generator = generator or torch.Generator().manual_seed(0)
        dims = [in_dim, out_dim] if hidden is None else [in_dim, hidden, out_dim]
        layers: list[nn.Module] = []
        for a, b in pairwise(dims):
            layers += [nn.ReLU(), _layer(a, b, rank, generator)]
        self.net = nn.Sequential(*layers[1:])
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Features of the teacher's shape."""
        x = self.net(x)
        return x if self.size is None else F.adaptive_avg_pool2d(x, self.size)


class Projectors(nn.ModuleDict):
    """One projector per pair of features, as a role: `m.projector.raw(student_taps)` is a dictionary like the teacher's taps.

    Args:
        pairs: The student's and the teacher's path of each pair.
        modules: Their projectors.
    """

    def __init__(self, pairs: Mapping[str, str], modules: list[Projector]) -> None:
        super().__init__({path.replace(".", "/"): module for path, module in zip(pairs, modules, strict=True)})
        self.pairs = dict(pairs)

    def forward(self, **features: Tensor) -> dict[str, Tensor]:
        """The student's features by the student's path, to projected features by the teacher's path."""
        return {t: self[s.replace(".", "/")](features[s]) for s, t in self.pairs.items()}


def projectors_for(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    hidden: int | None = None,
    generator: torch.Generator | None = None,
) -> Projectors:
    """Projectors between the features of one batch, paired in order; they live in a role of their own, so no student keeps them.

    Args:
        student: Features `[B, ...]` by path, as `Role.features` returns them.
        teacher: As many.
        hidden: Width of a hidden layer; None is a linear map.
        generator: Draws the weights, such as `m.generator("projector")`.

    Returns:
        A module from the student's features to ones of the teacher's shapes.

    Raises:
        UsageError: Their numbers, ranks or numbers of tokens differ.

    Example:
        >>> projector = projectors_for({"layer1.0": torch.randn(2, 8, 7, 7)}, {"layer4": torch.randn(2, 16, 4, 4)})
        >>> {path: f.shape for path, f in projector(**{"layer1.0": torch.randn(5, 8, 7, 7)}).items()}
        {'layer4': torch.Size([5, 16, 4, 4])}
    """
    if len(student) != len(teacher):
        raise UsageError(
            "features come in pairs", found=f"{len(student)} of the student, {len(teacher)} of the teacher"
        )
    generator = generator or torch.Generator().manual_seed(0)
    pairs = dict(zip(student, teacher, strict=True))
    return Projectors(pairs, [_between(s, t, student[s], teacher[t], hidden, generator) for s, t in pairs.items()])


def _between(
    s: str, t: str, student: Tensor, teacher: Tensor, hidden: int | None, generator: torch.Generator
) -> Projector:
    rank = student.ndim
    if rank != teacher.ndim or (rank == 3 and student.shape[1] != teacher.shape[1]):
        raise UsageError(
            "these features cannot be matched by a projector",
            where=f"{s} -> {t}",
            found=f"{list(student.shape)} and {list(teacher.shape)}",
            expected="the same rank, and the same number of tokens",
            fix="choose other layers, or pool one of them in the method",
        )
    dim = 1 if rank == 4 else -1
    size = (teacher.shape[2], teacher.shape[3]) if rank == 4 and student.shape[2:] != teacher.shape[2:] else None
    return Projector(student.shape[dim], teacher.shape[dim], rank, hidden=hidden, size=size, generator=generator)


def _layer(a: int, b: int, rank: int, generator: torch.Generator) -> nn.Module:
    # skip_init, as the constructors would draw from the global generator.
    if rank == 4:
        layer: nn.Module = nn.utils.skip_init(nn.Conv2d, a, b, 1)
    else:
        layer = nn.utils.skip_init(nn.Linear, a, b)
    for p in layer.parameters():
        nn.init.uniform_(p, -(a**-0.5), a**-0.5, generator=generator)
    return layer
