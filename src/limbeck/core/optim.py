"""Optimizer, schedule and average of one role, as plain data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Optim:
    """How one role is optimised: the optimizer of `torch.optim`, its schedule, clipping and direction.

    Args:
        name: The optimizer.
        lr: Peak learning rate, > 0.
        weight_decay: Decoupled for AdamW, L2 otherwise; >= 0.
        momentum: For SGD and RMSprop.
        nesterov: For SGD.
        betas: For Adam and AdamW.
        eps: For Adam, AdamW and RMSprop.
        decay_norms: Whether parameters with fewer than two dimensions (biases, norms) decay too.
        schedule: What the rate does after the warm-up until the stage ends.
        warmup: Linear warm-up; a fraction of the stage's steps below 1, a number of steps from 1.
        final: The rate at the end of a cosine or linear schedule, as a fraction of `lr`.
        stretch: How many times the stage a cosine or linear schedule is made for, 1 or more; 2 ends half-way down.
        milestones: Fractions of the stage at which the step schedule multiplies the rate by `gamma`.
        gamma: Factor of the step schedule.
        clip: Largest gradient norm of the role, or None.
        maximize: Ascend instead of descend.
        lr_multipliers: Factors on `lr` by glob of the parameter name; the first that matches counts.

    Example:
        >>> import torch
        >>> optimizer = Optim("sgd", lr=0.1, momentum=0.9).build(torch.nn.Linear(2, 1))
        >>> [len(g["params"]) for g in optimizer.param_groups]
        [2]
        >>> Optim(lr=1.0, warmup=10, schedule="cosine").factor(5, total=100)
        0.6
    """

    name: Literal["adamw", "adam", "sgd", "rmsprop", "adagrad"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_norms: bool = False
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup: float = 0.0
    final: float = 0.0
    stretch: float = 1.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    clip: float | None = None
    maximize: bool = False
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, ok, expected in [
            ("lr", self.lr > 0, "a rate above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("stretch", self.stretch >= 1, "1 or more"),
            ("clip", self.clip is None or self.clip > 0, "a norm above 0, or none"),
        ]:
            if not ok:
                raise UsageError(
                    f"{name} is out of range", where=f"optim.{name}", found=getattr(self, name), expected=expected
                )

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `module` that require a gradient, grouped by decay and multiplier."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in module.named_parameters():
            if p.requires_grad:
                decay = self.weight_decay if self.decay_norms or p.ndim >= 2 else 0.0
                multiplier = next((f for glob, f in self.lr_multipliers.items() if fnmatchcase(name, glob)), 1.0)
                groups.setdefault((decay, multiplier), []).append(p)
        # Sharded parameters have no fused kernels.
        fused = not any(hasattr(p, "device_mesh") for p in module.parameters())
        options: dict[str, Any] = {"lr": self.lr, "maximize": self.maximize}
        if self.name in ("adamw", "adam"):
            options |= {"betas": self.betas, "eps": self.eps, "fused": fused}
        elif self.name in ("sgd", "rmsprop"):
            options |= {"momentum": self.momentum}
            options |= {"nesterov": self.nesterov, "fused": fused} if self.name == "sgd" else {"eps": self.eps}
        kinds = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
        kind = getattr(torch.optim, kinds[self.name])
        param_groups = [{"params": ps, "weight_decay": wd, "lr": self.lr * f} for (wd, f), ps in groups.items()]
        return kind(param_groups, **options)

    def factor(self, step: float, total: float) -> float:
        """The multiple of `lr` at update `step` (from 0) of `total`: linear warm-up, then the schedule."""
        warmup = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup)) / self.stretch
        if self.schedule == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return self.final + (1 - self.final) * (1 - done)
        if self.schedule == "step":
            return self.gamma ** sum(step >= m * total for m in self.milestones)
        return 1.0


OptimSpec = Optim | Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of one role, itself a role that is frozen.

    Args:
        of: The role that is averaged.
        decay: Weight of the old average, in [0, 1).
        every: Whether the average moves after each update of the role or at the end of each epoch.
        buffers: Whether buffers (BatchNorm statistics) are copied or averaged; integers are always copied.
        warmup: Use `min(decay, (1 + n) / (10 + n))` at the n-th move, so that the start is forgotten faster.
        until: Moves after which it stays as it is; with a decay of 0 it is then a copy of the role from that time.

    Example:
        >>> Ema("student", decay=0.5).every
        'step'
    """

    of: str
    decay: float = 0.999
    every: Literal["step", "epoch"] = "step"
    buffers: Literal["copy", "average"] = "copy"
    warmup: bool = False
    until: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UsageError("the decay is out of range", where="ema.decay", found=self.decay, expected="in [0, 1)")

    @torch.no_grad()
    def move(self, average: nn.Module, source: nn.Module, moves: int = 0) -> None:
        """Move `average` towards `source` in place; `moves` counts the earlier moves."""
        if self.until is not None and moves >= self.until:
            return
        decay = min(self.decay, (1 + moves) / (10 + moves)) if self.warmup else self.decay
        old = dict(average.named_parameters())
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = [
            (old[name].data, p.detach()) for name, p in source.named_parameters()
        ]
        old_buffers = dict(average.named_buffers())
        for name, buffer in source.named_buffers():
            if self.buffers == "average" and buffer.is_floating_point():
                pairs.append((old_buffers[name], buffer))
            else:
                old_buffers[name].copy_(buffer)
        if pairs:
            torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
