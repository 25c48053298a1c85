"""Students that inherit some of a teacher's layers, for any model with one list of repeated layers."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from limbeck.core.errors import UsageError

Rule = Literal["even", "first", "last", "stride"]

_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_POSITIONS = ("layer_idx", "layer_id", "layer_number")


def choose_layers(total: int, keep: int, rule: Rule = "even") -> list[int]:
    """Which of `total` layers a student of `keep` layers inherits.

    Args:
        total: Layers of the teacher.
        keep: Layers of the student, 1 to `total`.
        rule: `"even"` spreads them over the depth, first and last included (one layer: the last); `"first"` and `"last"`
            take one end; `"stride"` takes `0, s, 2s, ...` with `s = total // keep` (TinyCLIP, Wu et al. 2023).

    Returns:
        Ascending indices.

    Raises:
        UsageError: `keep` is out of range or the rule is unknown.

    Example:
        >>> choose_layers(6, 2), choose_layers(6, 1), choose_layers(12, 5, "stride"), choose_layers(12, 2, "last")
        ([0, 5], [5], [0, 2, 4, 6, 8], [10, 11])
    """
    if not 1 <= keep <= total:
        raise UsageError("a student cannot have this many layers", where="layers", found=keep, expected=f"1 to {total}")
    if rule == "even":
        return [(i * (total - 1) + (keep - 1) // 2) // (keep - 1) for i in range(keep)] if keep > 1 else [total - 1]
    if rule == "first":
        return list(range(keep))
    if rule == "last":
        return list(range(total - keep, total))
    if rule == "stride":
        return [i * (total // keep) for i in range(keep)]
    raise UsageError("unknown rule for layers", where="rule", found=rule, expected="even, first, last or stride")


@dataclass(frozen=True)
class InheritLayers:
    """Copy a model and keep some of its repeated layers; everything else is inherited whole.

    Works by shape, not by class: the one list of modules of equal class (`ModuleList` or `Sequential`) that is not inside
    another such list. `config` objects on the way to it are told the new depth, so that the student saves and loads.

    Args:
        layers: Indices of the layers to keep, in order; or how many to keep.
        rule: How layers are chosen when `layers` is a number; see `choose_layers`.
        path: Dotted path of the list, where a model has several.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.Tanh() for _ in range(6)]))
        >>> student, record = InheritLayers(2)(net)
        >>> len(student[1]), record
        (2, {'kind': 'limbeck.convert.layers:inherit_layers', 'layers': [0, 5], 'path': '1'})
    """

    layers: int | Sequence[int]
    rule: Rule = "even"
    path: str | None = None

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The student, and the record that rebuilds it."""
        path = self.path or find_layers(module)
        old = _at(module, path)
        total = len(old)
        kept = choose_layers(total, self.layers, self.rule) if isinstance(self.layers, int) else list(self.layers)
        _check(kept, total)
        memo: dict[int, Any] = {}
        chosen = [copy.deepcopy(old[i], memo) for i in kept]
        memo[id(old)] = nn.ModuleList(chosen) if isinstance(old, nn.ModuleList) else nn.Sequential(*chosen)
        student = copy.deepcopy(module, memo)  # meets the new list where the old one was
        for owner in tell_depth(student, path, kept, total):
            _check_rebuild(owner, kept)
        return student, {"kind": f"{__name__}:inherit_layers", "layers": kept, "path": path}


def inherit_layers(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The student of a conversion, from its record."""
    return InheritLayers(record["layers"], path=record["path"])(module)[0]


def tell_depth(module: nn.Module, path: str, kept: Sequence[int], total: int) -> list[nn.Module]:
    """Tell layers that were kept their new positions, and the configurations around them the new depth.

    Args:
        module: The shorter model; changed in place.
        path: The list of layers.
        kept: Indices that the layers had before.
        total: Layers before.

    Returns:
        The modules on the way to the list, the outermost first.
    """
    layers: Any = module.get_submodule(path)
    _renumber(layers)
    owners = _owners(module, path)
    for config in {id(p.config): p.config for p in [*owners, *layers.modules()] if hasattr(p, "config")}.values():
        _tell(config, kept, total)
    return owners


def find_layers(module: nn.Module) -> str:
    """The dotted path of a model's list of repeated layers.

    Raises:
        UsageError: It has none, or several that are not inside each other (then name one).

    Example:
        >>> find_layers(nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": nn.ModuleList(nn.Tanh() for _ in range(3))}))
        'layers'
    """
    found: list[str] = []
    for name, part in module.named_modules():
        repeated = isinstance(part, nn.ModuleList | nn.Sequential) and len({type(p) for p in part}) == 1 < len(part)
        if repeated and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    if len(found) != 1 or not found[0]:
        raise UsageError(
            "which layers the student inherits is not clear",
            where=type(module).__name__,
            found=f"lists of repeated layers: {', '.join(found) or 'none'}",
            expected="exactly one list, inside the model",
            fix="name it with `path`" if found and found[0] else "give a student model instead of layers:N",
        )
    return found[0]


def _check(kept: Sequence[int], total: int) -> None:
    if not kept or len(set(kept)) < len(kept) or not all(isinstance(i, int) and 0 <= i < total for i in kept):
        raise UsageError(
            "these layers cannot be inherited",
            where="layers",
            found=list(kept),
            expected=f"one or more different indices, 0 to {total - 1}",
        )


def _at(module: nn.Module, path: str) -> Any:
    found = dict(module.named_modules()).get(path)
    if not path or not isinstance(found, nn.ModuleList | nn.Sequential):
        raise UsageError(
            "there is no list of layers at this path",
            where=f"path={path}",
            found=type(found).__name__,
            expected="a ModuleList or Sequential inside the model",
        )
    return found


def _owners(module: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the way to a path, the outermost first."""
    names = path.split(".")
    return [module.get_submodule(".".join(names[:n])) for n in range(len(names))]


def _renumber(layers: Iterable[nn.Module]) -> None:
    """Layers that know their own position (for caches and masks) learn the new one."""
    for i, layer in enumerate(layers):
        for part in layer.modules():
            for name in _POSITIONS:
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, i)


def _tell(config: Any, kept: Sequence[int], total: int) -> None:
    """Set every count of layers, and cut every list with one entry per layer, in a configuration."""
    for name in _COUNTS:
        if getattr(config, name, None) == total:
            setattr(config, name, len(kept))
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[i] for i in kept])
    if len(getattr(config, "stage_names", ())) == total + 1:  # backbones such as DINOv2 have one stage per layer
        config.stage_names = config.stage_names[: len(kept) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def _check_rebuild(owner: nn.Module, kept: Sequence[int]) -> None:
    """Models of transformers load from their configuration alone, so that must describe the layers that were kept."""
    if not hasattr(owner, "base_model_prefix"):
        return
    with torch.device("meta"):
        expected = {name: t.shape for name, t in type(owner)(owner.config).state_dict().items()}
    found = {name: t.shape for name, t in owner.state_dict().items()}
    if different := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise UsageError(
            "with these layers the model would not load again, since its layers differ by position",
            where=f"{type(owner).__name__}, layers {list(kept)}",
            found=f"{len(different)} tensors that its configuration does not describe, such as {different[0]}",
            fix="keep the first layer",
        )
