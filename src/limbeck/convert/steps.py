"""Denoisers made samplers of a few steps, and one denoiser made several experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.core.errors import UsageError
from limbeck.diffusion.sampler import Experts, Sampler
from limbeck.diffusion.sampling import Noise


@dataclass(frozen=True)
class ToSampler:
    """A copy of a denoiser with the steps in which it makes samples.

    Args:
        times: Of the steps, falling, above 0.
        noise: What a step adds to the sample of the one before: `fresh`, `fixed` or `ddim`.

    Example:
        >>> from limbeck.diffusion import ring
        >>> fast, record = ToSampler((1.0, 0.5))(ring(4))
        >>> fast.steps, record["times"]
        (2, [1.0, 0.5])
    """

    times: Sequence[float]
    noise: Noise = "fresh"

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The sampler, and the record that rebuilds it; the steps of a sampler are replaced."""
        inner = module.denoiser if isinstance(module, Sampler) else module
        record = {"kind": f"{__name__}:to_sampler", "times": [float(t) for t in self.times], "noise": self.noise}
        return Sampler(copy.deepcopy(inner), self.times, self.noise), record


def to_sampler(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a sampler, from the record of its conversion."""
    return ToSampler(record["times"], record["noise"])(module)[0]


@dataclass(frozen=True)
class ToExperts:
    """Copies of a denoiser as experts for parts of the times or of the classes, see `Experts`.

    Args:
        bounds: Between the times of the experts.
        owners: The expert of each class.

    Example:
        >>> from limbeck.diffusion import ring
        >>> len(ToExperts(bounds=(0.5,))(ring(4))[0].experts)
        2
    """

    bounds: Sequence[float] | None = None
    owners: Sequence[int] | None = None

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The experts, and the record that rebuilds them."""
        count = len(self.bounds) + 1 if self.bounds is not None else len(set(self.owners or ()))
        experts = Experts([copy.deepcopy(module) for _ in range(count)], self.bounds, self.owners)
        bounds = None if self.bounds is None else [float(b) for b in self.bounds]
        owners = None if self.owners is None else [int(k) for k in self.owners]
        return experts, {"kind": f"{__name__}:to_experts", "bounds": bounds, "owners": owners}


def to_experts(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of experts, from the record of their conversion."""
    return ToExperts(record["bounds"], record["owners"])(module)[0]


@dataclass(frozen=True)
class Focus:
    """A copy in which one of several experts learns, and the others stay as they are.

    What learns in it is what learned in any of them: of experts with adapters, the adapters.

    Args:
        expert: Which.

    Example:
        >>> two = ToExperts(bounds=(0.5,))(nn.Sequential(nn.Linear(2, 2)))[0]
        >>> [p.requires_grad for p in Focus(1)(two)[0].parameters()]
        [False, False, True, True]
    """

    expert: int

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The copy, and the record that rebuilds it."""
        twin = copy.deepcopy(module)
        experts = next((part.experts for part in twin.modules() if isinstance(part, Experts)), None)
        if experts is None or not 0 <= self.expert < len(experts):
            found = "no experts" if experts is None else f"{len(experts)} experts"
            raise UsageError("there is no such expert", where="expert", found=found, expected=f"expert {self.expert}")
        learns = {name for part in experts for name, p in part.named_parameters() if p.requires_grad}
        for k, part in enumerate(experts):
            for name, p in part.named_parameters():
                p.requires_grad_(k == self.expert and name in learns)
        return twin, {"kind": f"{__name__}:focus", "expert": self.expert}


def focus(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure in which one expert learns, from the record of its conversion."""
    return Focus(record["expert"])(module)[0]
