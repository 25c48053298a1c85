"""Losses between two views of the same samples."""

import torch
from torch import Tensor

from limbeck.losses._reduce import Reduction, check_batch, check_positive, check_same, full_precision, reduce
from limbeck.losses.embeddings import _log_neighbours


@full_precision
def nt_xent(one: Tensor, other: Tensor, *, temperature: float = 0.5, reduction: Reduction = "mean") -> Tensor:
    """NT-Xent of SimCLR: each view finds the other view of its sample among all other views of the batch.

    `-log softmax_{j != i}(cos(z_i, z_j) / tau)_{i'}` over the 2B views z, with i' the other view of the sample of i (Chen et
    al. 2020, eq. 1). `info_nce` has the candidates of the other side only.

    Args:
        one: Embeddings of one view `[B, D]`, of any length.
        other: Embeddings of the other view `[B, D]`.
        temperature: `tau > 0`; 0.1 to 0.5 is usual.
        reduction: "mean" | "sum" over samples, or "none" for `[B]`: the mean of the two views of each sample.

    Returns:
        The loss in fp32 or wider; `log(2B - 1)` where all embeddings are equal.

    Raises:
        UsageError: Shapes differ or are not `[B, D]`, or the temperature is not positive.

    Example:
        >>> nt_xent(torch.ones(7, 3), torch.ones(7, 3))
        tensor(2.5649)
    """
    check_same("nt_xent", one, other)
    check_batch("nt_xent", one, other, dims=2)
    check_positive("nt_xent", temperature=temperature)
    views = torch.cat([one, other])  # [2B, D]
    positive = torch.arange(len(views), device=views.device).roll(len(one))
    found = _log_neighbours(views, temperature).gather(1, positive[:, None])
    return reduce(-found.view(2, len(one)).mean(0), reduction)
