"""Which candidates are worth their price."""

from collections.abc import Mapping, Sequence

import torch

from limbeck.core.errors import UsageError


def pareto_front(
    points: Sequence[Mapping[str, float]], maximise: Sequence[str] = (), minimise: Sequence[str] = ()
) -> list[int]:
    """Indices of the points that no other point beats: none is at least as good in everything and better in something.

    Args:
        points: One mapping of numbers per candidate.
        maximise: Keys of which more is better.
        minimise: Keys of which less is better.

    Returns:
        Indices into `points`, in their order. Equal points are all kept; a point with a NaN never is.

    Raises:
        UsageError: No key is named, or a point lacks one.

    Example:
        >>> points = [{"mrr": 0.9, "bytes": 90}, {"mrr": 0.8, "bytes": 30}, {"mrr": 0.7, "bytes": 40}]
        >>> pareto_front(points, maximise=["mrr"], minimise=["bytes"])
        [0, 1]
    """
    keys = [*maximise, *minimise]
    if not keys:
        raise UsageError("a Pareto front needs at least one quantity", fix="name it in maximise= or minimise=")
    for i, point in enumerate(points):
        if missing := [key for key in keys if key not in point]:
            raise UsageError(
                "a point of the Pareto front lacks a quantity", where=f"point {i}", found=list(point), expected=missing
            )
    values = torch.tensor([[float(p[k]) for k in keys] for p in points], dtype=torch.float64).reshape(-1, len(keys))
    values[:, len(maximise) :].neg_()  # [N, K], more is better
    no_worse = (values.unsqueeze(1) >= values).all(-1)  # [i, j]: i is at least as good as j
    beaten = (no_worse & ~no_worse.T).any(0)
    return torch.nonzero(~beaten & ~values.isnan().any(-1)).flatten().tolist()
