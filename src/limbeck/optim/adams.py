"""AdamS: Adam that drives the weights outside a mask to zero while all of them learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from limbeck.core.errors import UsageError


class AdamS(Optimizer):
    """Adam whose momentum is mixed with the sign of the weights that a mask leaves out, more and more as training goes on.

    For a weight `theta` with gradient `g` at step `t` of `T` (Huang et al. 2025, CAST):
    `mu <- b1 mu + (1 - b1) g`; outside the mask `m = (1 - a) mu + a decay sign(theta)` with `a = t / T`, inside `m = mu`;
    `v <- b2 v + (1 - b2) m^2`; `theta <- theta - lr m_hat / (sqrt(v_hat) + eps)`, both with Adam's bias corrections. As `v` is of
    the mixed momentum, every weight moves at a uniform speed, whatever the decay; what decays is not kept in `mu`.
    Parameters without a mask are optimised by plain Adam.

    The first step is `lr / (1 - b1)` long, so rates are warmed up. Weights and states are best in fp32: a decay near 1e-7 is lost
    in sums of bf16. Weight and mask must be whole: sharded parameters are refused.

    Args:
        params: Parameters or groups, as for any optimizer; `lr` and `weight_decay` (decoupled) may differ by group.
        masks: Booleans by parameter, True where a weight is kept. They are read at every step, so they may change in place.
        decay: `lambda >= 0`, of the order of the gradients.
        steps: `T`: at step T the momentum outside the mask is the decay alone.
        lr: Learning rate, > 0.
        betas: `(b1, b2)`.
        eps: Added to the root.
        weight_decay: Decoupled, on all parameters of the group.

    Raises:
        UsageError: A mask does not fit its parameter, or a number is out of range.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = AdamS([w], {w: torch.tensor([True, False])}, decay=0.1, steps=100, lr=0.02)
        >>> for _ in range(100):
        ...     w.grad = torch.zeros(2)
        ...     optimizer.step()
        >>> w[0].item(), abs(w[1].item()) < 0.05
        (1.0, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[nn.Parameter, Tensor],
        *,
        decay: float,
        steps: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        numbers = {"lr": lr, "decay": decay, "steps": steps, "eps": eps, "weight_decay": weight_decay}
        for name, value in numbers.items():
            if value < 0 or (name == "lr" and value == 0):
                expected = "above 0" if name == "lr" else "0 or more"
                raise UsageError("AdamS has a number out of range", where=name, found=value, expected=expected)
        self.masks = {id(p): mask for p, mask in masks.items()}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay": decay, "steps": steps}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                mask = self.masks.get(id(p))
                if hasattr(p, "device_mesh") or (mask is not None and mask.shape != p.shape):
                    found = "a sharded parameter" if hasattr(p, "device_mesh") else f"{list(mask.shape)}"  # type: ignore[union-attr]
                    raise UsageError(
                        "a mask does not fit its weight", where="masks", found=found, expected=list(p.shape)
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on the present gradients; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_count: dict[int, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = 0
                        state["exp_avg"] = torch.zeros_like(p)
                        state["exp_avg_sq"] = torch.zeros_like(p)
                    by_count.setdefault(state["step"], []).append(p)
            for count, params in by_count.items():
                self._move(group, params, count)
        return loss

    def _move(self, group: Mapping[str, Any], params: list[nn.Parameter], count: int) -> None:
        """A step of parameters that have moved equally often."""
        b1, b2 = group["betas"]
        average = [self.state[p]["exp_avg"] for p in params]
        squared = [self.state[p]["exp_avg_sq"] for p in params]
        weights: list[Tensor] = [p.data for p in params]
        torch._foreach_lerp_(average, [p.grad for p in params if p.grad is not None], 1 - b1)
        momentum = self._mixed(group, params, average, count)
        torch._foreach_mul_(squared, b2)
        torch._foreach_addcmul_(squared, momentum, momentum, 1 - b2)
        root = torch._foreach_div(squared, 1 - b2 ** (count + 1))
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, momentum, root, -group["lr"] / (1 - b1 ** (count + 1)))
        for p in params:
            self.state[p]["step"] += 1

    def _mixed(
        self, group: Mapping[str, Any], params: list[nn.Parameter], average: list[Tensor], count: int
    ) -> list[Tensor]:
        """The momentum, outside masks mixed with the sign of the weight."""
        share = count / group["steps"] if group["steps"] else 0.0
        masked = [i for i, p in enumerate(params) if id(p) in self.masks]
        if share == 0 or not masked:
            return average
        share = min(1.0, share)
        moved = torch._foreach_sign([params[i] for i in masked])
        torch._foreach_mul_(moved, share * group["decay"])
        torch._foreach_add_(moved, [average[i] for i in masked], alpha=-share)
        torch._foreach_mul_(moved, [~self.masks[id(params[i])] for i in masked])
        torch._foreach_add_(moved, [average[i] for i in masked])
        mixed = list(average)
        for i, momentum in zip(masked, moved, strict=True):
            mixed[i] = momentum
        return mixed
