"""Classifiers with several outputs per class, which are read out as one."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.nn.heads import find_head


class SubclassHead(nn.Module):
    """A linear layer with S outputs per class, and the class logits `tau logsumexp_s (o_cs / tau)` as its answer.

    Its submodule `subclasses` gives `o` as `[B, C S]`, the subclasses of a class side by side. At temperature `tau` a class's
    probability is the sum of those of its subclasses.

    Args:
        dim: Size of the embedding.
        classes: Number of classes C.
        size: Subclasses per class S.
        bias: Whether the layer has one.
        temperature: `tau > 0`, that at which the subclasses were learnt.

    Example:
        >>> head = SubclassHead(8, classes=2, size=3)
        >>> head(torch.ones(4, 8)).shape, head.subclasses(torch.ones(4, 8)).shape
        (torch.Size([4, 2]), torch.Size([4, 6]))
    """

    def __init__(self, dim: int, classes: int, size: int, bias: bool = True, temperature: float = 1.0) -> None:
        super().__init__()
        self.num_classes, self.size, self.temperature = classes, size, temperature
        self.subclasses = nn.utils.skip_init(nn.Linear, dim, classes * size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits `[..., C]` of embeddings `[..., D]`."""
        within = self.subclasses(x).unflatten(-1, (-1, self.size))  # [..., C, S]
        return self.temperature * (within / self.temperature).logsumexp(-1)


@dataclass(frozen=True)
class AddSubclasses:
    """Give a classifier's last linear layer S outputs per class; the classifier still returns class logits `[B, C]`.

    Each class's weights are copied to its subclasses, and the bias is lowered by `tau log S`, so that the model answers as
    before. (Without a bias all logits rise by that, which no probability sees.) A model that has S of them already keeps
    them.

    Args:
        size: Subclasses per class S.
        temperature: `tau > 0`, that at which they will be learnt.

    Raises:
        UsageError: The model has no linear layer, or another number of subclasses.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> wide, record = AddSubclasses(5)(net)
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(wide(x), net(x), atol=1e-6), wide[2].subclasses.out_features, record
        (True, 15, {'kind': 'limbeck.convert.subclasses:add_subclasses', 'path': '2', 'size': 5, 'temperature': 1.0})
    """

    size: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or not self.temperature > 0:
            found = f"{self.size} subclasses at temperature {self.temperature}"
            raise UsageError(
                "subclasses are out of range", where="subclasses", found=found, expected="1 or more, above 0"
            )

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The classifier with subclasses, and the record that rebuilds it."""
        path = _head(module)
        record = {"kind": f"{__name__}:add_subclasses", "path": path, **asdict(self)}
        old: Any = module.get_submodule(path)
        if has_subclasses(module, self.size):
            head = copy.deepcopy(old)
            head.temperature = self.temperature
            return copy.deepcopy(module, {id(old): head}), record
        head = SubclassHead(old.in_features, old.out_features, self.size, old.bias is not None, self.temperature)
        head.to(old.weight.device, old.weight.dtype)
        with torch.no_grad():
            head.subclasses.weight.copy_(old.weight.repeat_interleave(self.size, 0))
            if old.bias is not None:
                head.subclasses.bias.copy_(
                    old.bias.repeat_interleave(self.size) - self.temperature * math.log(self.size)
                )
        wide: nn.Module = copy.deepcopy(module, {id(old): head.train(old.training)})  # meets it where the old one was
        return wide, record


def add_subclasses(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The structure of a classifier with subclasses, from the record of its conversion; weights are loaded afterwards."""
    if (path := _head(module)) != record["path"]:
        raise UsageError("the record is of a model with another head", found=path, expected=record["path"])
    return AddSubclasses(record["size"], record["temperature"])(module)[0]


def has_subclasses(module: nn.Module, size: int) -> bool:
    """Whether a model has subclasses already.

    Raises:
        UsageError: It has another number of them.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
        >>> has_subclasses(net, 2), has_subclasses(AddSubclasses(2)(net)[0], 2)
        (False, True)
    """
    found = {part.size for part in module.modules() if isinstance(part, SubclassHead)}
    if found - {size}:
        raise UsageError(
            "the model has another number of subclasses already",
            where=type(module).__name__,
            found=f"{max(found)} per class",
            expected=f"{size}, or a model without",
            fix=f"set subclasses={max(found)}",
        )
    return bool(found)


def subclass_path(module: nn.Module) -> str:
    """The dotted path of the layer that gives the subclass logits `[B, C S]`, for `Role.features`.

    Raises:
        UsageError: The model has no `SubclassHead`.

    Example:
        >>> subclass_path(AddSubclasses(2)(nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))[0])
        '1.subclasses'
    """
    found = _subclass_heads(module)
    if not found:
        raise UsageError(
            "this model has no subclasses",
            where=type(module).__name__,
            expected="a model that AddSubclasses has converted",
            fix='m.convert("student", AddSubclasses(5))',
        )
    return f"{found[-1]}.subclasses".lstrip(".")


def _head(module: nn.Module) -> str:
    """The path of the layer that has subclasses, or gets them."""
    return (_subclass_heads(module) or [find_head(module)])[-1]


def _subclass_heads(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, SubclassHead)]
