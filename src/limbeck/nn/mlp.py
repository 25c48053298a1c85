"""Multi-layer perceptrons, for proofs and examples."""

from itertools import pairwise

from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        *widths: Inputs, hidden units of each layer, outputs.

    Example:
        >>> mlp(64, 32, 10)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
          (1): ReLU()
          (2): Linear(in_features=32, out_features=10, bias=True)
        )
    """
    layers = [part for a, b in pairwise(widths) for part in (nn.ReLU(), nn.Linear(a, b))]
    return nn.Sequential(*layers[1:])
