"""Gates that are learnt to be open or shut: the hard-concrete distribution, and a budget for what is open."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta and the interval that is stretched over [0, 1]
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # -(2/3) ln 11
_MOST = math.log(100.0)


class HardConcrete(nn.Module):
    """One gate in [0, 1] for each unit of a dimension (Louizos, Welling and Kingma 2018).

    Training: `z = clip(1.2 s - 0.1, 0, 1)` with `s = sigmoid((ln u - ln(1 - u) + alpha) / (2/3))`, `u` uniform. Evaluation: the
    `round(size - sum P(z > 0))` units with the smallest gates are 0, the others keep `sigmoid(0.8 alpha / (2/3))` (CoFi, Xia
    et al. 2022; TinyCLIP, Wu et al. 2023).

    Args:
        size: Number of units.
        initial: `alpha` at the start; at 2.5 a gate is open with probability 0.98.

    Raises:
        UsageError: There is no unit.

    Example:
        >>> gate = HardConcrete(4, initial=0.0)
        >>> round(gate.open_probability()[0].item(), 4), gate.kept().tolist()
        (0.8318, [0, 1, 2])
    """

    def __init__(self, size: int, initial: float = 2.5) -> None:
        super().__init__()
        if size < 1:
            raise UsageError("a dimension without units has no gates", where="size", found=size, expected="1 or more")
        self.alpha = nn.Parameter(torch.full((size,), float(initial)))

    def open_probability(self) -> Tensor:
        """`P(z > 0) = sigmoid(alpha + (2/3) ln 11)` of each unit `[size]`."""
        return (self.alpha - _SHIFT).sigmoid()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Random gates `[size]` with a gradient."""
        u = torch.rand(self.alpha.shape, generator=generator, device=self.alpha.device).clamp(1e-6, 1 - 1e-6)
        s = ((u.logit() + self.alpha) / TEMPERATURE).sigmoid()
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    def kept(self) -> Tensor:
        """Indices of the units that stay, ascending; at least one, the most open."""
        return self.shut().logical_not().nonzero().flatten()

    def shut(self) -> Tensor:
        """Which units are shut in evaluation `[size]`; ties are shut from the last unit on."""
        size = len(self.alpha)
        gone = (size - self.open_probability().sum()).round().clamp(0, size - 1)
        rank = self.alpha.argsort(descending=True, stable=True).argsort()
        return rank >= size - gone

    def forward(self) -> Tensor:
        """The gates of evaluation `[size]`."""
        soft = (0.8 * self.alpha / TEMPERATURE).sigmoid()
        return soft.masked_fill(self.shut(), 0.0)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep `alpha` within `[ln 0.01, ln 100]`, after each update."""
        self.alpha.clamp_(-_MOST, _MOST)


class Budget(nn.Module):
    """Two multipliers that push a sparsity up to a target; their optimizer ascends (`Optim(maximize=True)`).

    `code`: `l1 max(q - p, 0) + l2 max(q - p, 0)^2`, nothing once the target is met. `paper`: `l1 (p - q) + l2 (p - q)^2`, which
    also pulls back from more sparsity than asked for (signed form: inferred).

    Args:
        initial: Of both multipliers.
        variant: Which form.

    Example:
        >>> budget = Budget()
        >>> budget(torch.tensor(0.25), 0.5), budget(torch.tensor(0.75), 0.5)
        (tensor(3.1250, grad_fn=<AddBackward0>), tensor(0., grad_fn=<AddBackward0>))
    """

    def __init__(self, initial: float = 10.0, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        self.variant = variant
        self.linear, self.quadratic = nn.Parameter(torch.tensor(initial)), nn.Parameter(torch.tensor(initial))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """The penalty of a sparsity `p`, for weights and multipliers alike."""
        gap = (target - sparsity).clamp_min(0.0) if self.variant == "code" else sparsity - target
        return self.linear * gap + self.quadratic * gap.square()


def ramp(start: float, end: float, step: int, steps: int) -> float:
    """A target that grows linearly: `start + (end - start) min(1, step / steps)`.

    Example:
        >>> [ramp(0.0, 0.5, step, 100) for step in (0, 50, 100, 400)]
        [0.0, 0.25, 0.5, 0.5]
    """
    return start + (end - start) * (min(1.0, step / steps) if steps > 0 else 1.0)
