"""Numerics shared by the losses."""

import torch
from torch import Tensor


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; classes with p = 0 add nothing, not even where q = 0 too."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one; a zero row stays zero and gets no gradient, where dividing by an epsilon explodes."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length <= 1e-12, torch.inf)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of every row of x with every row of y."""
    return unit(x) @ unit(y).mT


def squared_error(student: Tensor, teacher: Tensor, *, keep: int) -> Tensor:
    """Mean squared difference over all but the first `keep` dimensions."""
    return (student - teacher).square().flatten(keep).mean(-1)
