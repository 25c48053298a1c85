"""What a generator and a discriminator tell each other."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._reduce import Reduction, check_choice, full_precision, reduce

Game = Literal["softplus", "hinge", "wgan"]


@full_precision
def discriminator_loss(real: Tensor, fake: Tensor, game: Game = "softplus", reduction: Reduction = "mean") -> Tensor:
    """How badly scores tell real samples from generated ones, both halves added up.

    `softplus`: `softplus(-real) + softplus(fake)` (non-saturating, Goodfellow et al. 2014), which is binary cross-entropy;
    `hinge`: `relu(1 - real) + relu(1 + fake)`; `wgan`: `max(-1, -real) + max(-1, fake)`, which is the hinge less 2.

    Args:
        real: Scores of real samples `[B, ...]`, high for real.
        fake: Scores of generated samples, same shape.
        game: The loss.
        reduction: Over the samples; all other dimensions are averaged.

    Example:
        >>> discriminator_loss(torch.zeros(2), torch.zeros(2))
        tensor(1.3863)
    """
    check_choice("game", game, ("softplus", "hinge", "wgan"))
    if game == "softplus":
        losses = F.softplus(-real) + F.softplus(fake)
    elif game == "hinge":
        losses = F.relu(1 - real) + F.relu(1 + fake)
    else:
        losses = (-real).clamp_min(-1) + fake.clamp_min(-1)
    return reduce(losses.flatten(1).mean(1) if losses.ndim > 1 else losses, reduction)


@full_precision
def generator_loss(fake: Tensor, game: Game = "softplus", reduction: Reduction = "mean") -> Tensor:
    """How badly generated samples pass for real ones: `softplus(-fake)`, and `-fake` in the other games.

    Args:
        fake: Scores of generated samples `[B, ...]`.
        game: The loss.
        reduction: Over the samples; all other dimensions are averaged.

    Example:
        >>> generator_loss(torch.zeros(2)), generator_loss(torch.ones(2), "hinge")
        (tensor(0.6931), tensor(-1.))
    """
    check_choice("game", game, ("softplus", "hinge", "wgan"))
    losses = F.softplus(-fake) if game == "softplus" else -fake
    return reduce(losses.flatten(1).mean(1) if losses.ndim > 1 else losses, reduction)


def gradient_penalty(scores: Tensor, inputs: Tensor, target: float = 1.0, reduction: Reduction = "mean") -> Tensor:
    """`(||d scores / d inputs|| - target)^2` of each sample (Gulrajani et al. 2017), in the graph.

    Args:
        scores: `[B, ...]`, each sample's from its own input.
        inputs: `[B, ...]`, in the graph of the scores.
        target: The norm to have; 0 for the penalty of R1.
        reduction: Over the samples.

    Example:
        >>> x = torch.ones(3, 2, requires_grad=True)
        >>> gradient_penalty(2 * x.sum(1), x).round(decimals=4)
        tensor(3.3431)
    """
    (slope,) = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    squared = slope.flatten(1).square().sum(1)
    # The root has no slope at 0, which R1 does not need.
    return reduce(squared if target == 0 else ((squared + 1e-12).sqrt() - target).square(), reduction)
