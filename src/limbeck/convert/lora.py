"""Low-rank adapters on a model whose own weights stay as they are, by peft."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import UsageError, require

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class AddLora:
    """A model that learns by adapters alone, `W x + (alpha / rank) B A x` (Hu et al. 2022); at first it is the same function.

    The weights are shared with the model that is converted, and stop learning there too, so that a network which follows a
    generator costs the memory of its adapters. `MergeLora` merges them.

    Args:
        rank: Of the adapters.
        alpha: Their scale, over the rank; None for the rank.
        targets: Ends of the paths of the layers that get one, such as `to_q`; empty for all linear and convolution layers.
        seed: Of the first matrices; the second are zero.

    Raises:
        UsageError: There is no such layer, or the extra `fewstep` is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
        >>> adapted, _ = AddLora(rank=2)(net)
        >>> x = torch.ones(3, 4)
        >>> adapted(x).equal(net(x)), sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        (True, 44)
    """

    rank: int = 64
    alpha: float | None = None
    targets: Sequence[str] = ()
    seed: int = 0

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The model with adapters, and the record that rebuilds it."""
        peft = require("peft", extra="fewstep")
        paths = [
            path for path, part in module.named_modules()
            if isinstance(part, _KINDS) and (not self.targets or any(_ends(path, end) for end in self.targets))
        ]  # fmt: skip
        if not paths:
            named = ", ".join(path for path, part in module.named_modules() if isinstance(part, _KINDS)) or "none"
            raise UsageError(
                "no layer of this model takes an adapter", where="targets", found=list(self.targets),
                expected=f"linear or convolution layers, of which there are: {named[:200]}",
            )  # fmt: skip
        twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.rank if self.alpha is None else self.alpha, target_modules=paths
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            adapted = peft.inject_adapter_in_model(config, twin)
        return adapted, {"kind": f"{__name__}:add_lora", **asdict(self), "targets": list(self.targets)}


def add_lora(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a model with adapters, from the record of its conversion."""
    return AddLora(record["rank"], record["alpha"], tuple(record["targets"]), record["seed"])(module)[0]


@dataclass(frozen=True)
class MergeLora:
    """A copy of a model in which the adapters are added to the weights, and gone.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> merged, _ = MergeLora()(AddLora(rank=2)(nn.Sequential(net))[0])
        >>> type(merged[0]).__name__, merged[0].weight.equal(net.weight)
        ('Linear', True)
    """

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The merged model, and the record that rebuilds it."""
        layer: Any = require("peft.tuners.lora", extra="fewstep").LoraLayer
        twin = copy.deepcopy(module)
        for path, part in list(twin.named_modules()):
            if isinstance(part, layer):
                part.merge()
                parent, _, name = path.rpartition(".")
                setattr(twin.get_submodule(parent), name, part.get_base_layer())
        return twin.requires_grad_(True), {"kind": f"{__name__}:merge_lora"}


def merge_lora(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure after adapters are merged."""
    return MergeLora()(module)[0]


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
