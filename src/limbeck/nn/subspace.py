"""Principal subspaces of each class of embeddings, outside of what a linear readout sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import UsageError


class ClassMoments:
    """Counts, means and covariances of each class, from batches, in float64.

    Args:
        classes: Number of classes C.
        dim: Size of an embedding D; C D^2 numbers are held.
        device: Where they are held.

    Example:
        >>> moments = ClassMoments(2, dim=1)
        >>> moments.add(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> moments.means.tolist(), moments.covariances.flatten().tolist()
        ([[2.0], [5.0]], [1.0, 0.0])
    """

    def __init__(self, classes: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.means = torch.zeros(classes, dim, dtype=torch.float64, device=device)
        self.scatters = torch.zeros(classes, dim, dim, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in embeddings `[B, D]` of the classes `y` `[B]`."""
        for c in y.unique().tolist():
            part = x[y == c].double()  # [n, D]
            count, mean = len(part), part.mean(0)
            gap, centred = mean - self.means[c], part - mean
            total = int(self.counts[c]) + count
            # Two centred sets joined (Chan, Golub and LeVeque 1983): nothing cancels, however far away the means are.
            self.scatters[c] += centred.mT @ centred + (1 - count / total) * count * torch.outer(gap, gap)
            self.means[c] += gap * count / total
            self.counts[c] = total

    @property
    def covariances(self) -> Tensor:
        """Scatter over count `[C, D, D]`; 0 for a class that was not seen."""
        return self.scatters / self.counts.clamp(min=1)[:, None, None]


@dataclass(frozen=True)
class Subspaces:
    """One subspace per class.

    Args:
        directions: Orthonormal rows `[C, S, D]`.
        means: Mean embedding of each class `[C, D]`.
        variances: Variance of the class along its directions `[C, S]`.
        share: Share of the class's variance that lies in its subspace `[C]`; of what is left outside of the readout.
    """

    directions: Tensor
    means: Tensor
    variances: Tensor
    share: Tensor

    def coordinates(self, standardise: bool = True) -> tuple[Tensor, Tensor]:
        """The affine map from an embedding to its coordinates in all subspaces.

        `z_cs = v_cs . (h - mu_c)`, divided by the root of the class's mean variance where standardised.

        Returns:
            Weight `[C S, D]` and bias `[C S]` of a linear layer, in the dtype of the directions.

        Example:
            >>> axes = Subspaces(torch.eye(2)[None], torch.ones(1, 2), torch.tensor([[4.0, 4.0]]), torch.ones(1))
            >>> weight, bias = axes.coordinates()
            >>> (torch.tensor([3.0, 1.0]) @ weight.mT + bias).tolist()
            [1.0, 0.0]
        """
        scale = self.variances.mean(1).sqrt() if standardise else torch.ones_like(self.variances[:, 0])  # [C]
        weight = self.directions / scale[:, None, None]
        bias = -torch.einsum("csd,cd->cs", weight, self.means)
        return weight.flatten(0, 1), bias.flatten()


def class_subspaces(
    moments: ClassMoments, size: int, readout: Tensor | None = None, generator: torch.Generator | None = None
) -> Subspaces:
    """The principal directions of each class, outside of the row space of a readout, rotated at random.

    The covariances are projected to the null space first, so that a direction which the readout sees cannot be chosen. A
    rotation within the subspace spreads its variance over the directions, evenly on average.

    Args:
        moments: Of the embeddings.
        size: Directions per class S.
        readout: Weights `[K, D]` whose row space is left out; None leaves nothing out.
        generator: Draws one rotation per class, on the CPU; None leaves the principal directions, by falling variance.

    Returns:
        The subspaces, in float64.

    Raises:
        UsageError: A class has fewer than S + 1 samples, or its embeddings span fewer than S directions.

    Example:
        >>> moments = ClassMoments(1, dim=3)
        >>> moments.add(torch.tensor([[9.0, 2.0, 0.0], [0.0, -2.0, 1.0], [0.0, 0.0, -1.0]]), torch.zeros(3, dtype=torch.int64))
        >>> class_subspaces(moments, 1, readout=torch.tensor([[1.0, 0.0, 0.0]])).directions.abs().round(decimals=2).tolist()
        [[[0.0, 0.96, 0.29]]]
    """
    _check_counts(moments.counts, size)
    covariance = moments.covariances  # [C, D, D]
    if readout is not None:
        seen = row_space(readout.to(covariance))  # [D, r]
        outside = torch.eye(len(seen)).to(seen) - seen @ seen.mT  # [D, D]
        covariance = outside @ covariance @ outside
    total = covariance.diagonal(dim1=1, dim2=2).sum(1)  # [C]
    variances, directions = principal(covariance, size)
    _check_span(variances, total)
    if generator is not None:
        turn = rotations(len(total), size, generator).to(directions)  # [C, S, S]
        directions = turn.mT @ directions
        variances = torch.einsum("csd,cde,cse->cs", directions, covariance, directions)
    return Subspaces(directions, moments.means, variances, variances.sum(1) / total)


def row_space(weight: Tensor) -> Tensor:
    """An orthonormal basis of the row space of a matrix, as columns.

    Args:
        weight: `[K, D]`.

    Returns:
        `[D, r]` with r the rank.

    Example:
        >>> row_space(torch.tensor([[0.0, 2.0], [0.0, 1.0]])).abs().tolist()
        [[0.0], [1.0]]
    """
    _, values, rows = torch.linalg.svd(weight, full_matrices=False)
    tolerance = torch.finfo(weight.dtype).eps * max(weight.shape) * values[0]
    return rows[values > tolerance].mT


def principal(covariance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of covariances, with signs that do not depend on the solver: the largest entry is positive.

    Args:
        covariance: Symmetric `[..., D, D]`.
        size: S, at most D.

    Returns:
        Variances `[..., S]`, falling, and directions `[..., S, D]`.

    Example:
        >>> principal(torch.diag(torch.tensor([1.0, 5.0])), 1)
        (tensor([5.]), tensor([[0., 1.]]))
    """
    values, vectors = torch.linalg.eigh(covariance)  # rising
    directions = vectors.mT.flip(-2)[..., :size, :]
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    return values.flip(-1)[..., :size].clamp(min=0), directions * largest.sign()


def rotations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrices, uniformly distributed.

    Args:
        count: How many.
        size: Their rows S.
        generator: Draws them, on the CPU.

    Returns:
        `[count, S, S]` float64.

    Example:
        >>> turn = rotations(2, 3, torch.Generator().manual_seed(0))
        >>> torch.allclose(turn @ turn.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
        True
    """
    draws = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(draws)
    # Without the signs, the solver's choice would be part of the draw.
    return q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


def _check_counts(counts: Tensor, size: int) -> None:
    if int(counts.min()) < size + 1:
        c = int(counts.argmin())
        raise UsageError(
            "a class has too few samples for its subclasses",
            where=f"class {c}",
            found=f"{int(counts[c])} samples",
            expected=f"{size + 1} or more for {size} subclasses",
            fix="take fewer subclasses, or more samples of this class",
        )


def _check_span(variances: Tensor, total: Tensor) -> None:
    flat = variances[:, -1] <= 1e-10 * total  # [C]
    if bool(flat.any()):
        c = int(flat.to(torch.int8).argmax())
        raise UsageError(
            "the embeddings of a class span too few directions",
            where=f"class {c}",
            found=f"{int((variances[c] > 1e-10 * total[c]).sum())} directions outside of what the readout sees",
            expected=f"{variances.shape[1]} or more, one for each subclass",
            fix="take fewer subclasses, or a teacher with a wider embedding",
        )
