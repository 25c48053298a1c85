"""Which methods there are: an explicit table, and the cards beside them; nothing is imported to list them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import UsageError

if TYPE_CHECKING:
    from limbeck.core.method import Method

METHODS: Mapping[str, str] = {
    "ast": "limbeck.methods.ast.method:AST",
    "cast": "limbeck.methods.cast.method:CAST",
    "cv_dd": "limbeck.methods.cv_dd.method:CVDD",
    "deps": "limbeck.methods.deps.method:DepS",
    "disback": "limbeck.methods.disback.method:DisBack",
    "distill_nearest": "limbeck.methods.distill_nearest.method:DistillNearest",
    "distill_weighted": "limbeck.methods.distill_weighted.method:DistillWeighted",
    "diversity_cfg": "limbeck.methods.diversity_cfg.method:DiversityCFG",
    "dwa": "limbeck.methods.dwa.method:DWA",
    "embedding": "limbeck.methods.embedding.method:Embedding",
    "fair_latent": "limbeck.methods.fair_latent.method:FairLatent",
    "ftd": "limbeck.methods.ftd.method:FTD",
    "infer": "limbeck.methods.infer.method:INFER",
    "kd": "limbeck.methods.kd.method:KD",
    "kd3": "limbeck.methods.kd3.method:KD3",
    "lelp": "limbeck.methods.lelp.method:LELP",
    "mcm": "limbeck.methods.mcm.method:MCM",
    "mdt_dist": "limbeck.methods.mdt_dist.method:MDTDist",
    "meal_v2": "limbeck.methods.meal_v2.method:MEALV2",
    "mirage": "limbeck.methods.mirage.method:Mirage",
    "msd": "limbeck.methods.msd.method:MSD",
    "phased_dmd": "limbeck.methods.phased_dmd.method:PhasedDMD",
    "pld": "limbeck.methods.pld.method:PLD",
    "self_distillation": "limbeck.methods.self_distillation.method:SelfDistillation",
    "sid": "limbeck.methods.sid.method:SiD",
    "snoopi": "limbeck.methods.snoopi.method:SNOOPI",
    "ssld": "limbeck.methods.ssld.method:SSLD",
    "swiftbrush": "limbeck.methods.swiftbrush.method:SwiftBrush",
    "tinyclip": "limbeck.methods.tinyclip.method:TinyCLIP",
    "vsd": "limbeck.methods.vsd.method:VSD",
    "wa": "limbeck.methods.wa.method:WA",
    "wad": "limbeck.methods.wad.method:WAD",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a method says of itself.

    Args:
        name: The method's name in the table.
        metadata: The front matter of its `card.md`, such as `paper`, `year`, `families`, `needs`, `produces`, `status`.
        text: The page below the front matter, in Markdown.
        path: The file.
    """

    name: str
    metadata: Mapping[str, Any]
    text: str
    path: Path


def find(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: A name in the table, or `file.py:Class` for a method of one's own.

    Returns:
        A dataclass of hyper-parameters that derives from `Method`.

    Raises:
        UsageError: There is no such method, or it is not a method.

    Example:
        >>> find("kd").__name__
        'KD'
    """
    if ":" in name:
        from limbeck.models.specs import import_object

        kind = import_object(name)
    elif name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        kind = getattr(import_module(module), attribute)
    else:
        raise unknown(name)
    from limbeck.core.method import Method

    if not (isinstance(kind, type) and issubclass(kind, Method) and dataclasses.is_dataclass(kind)):
        raise UsageError(
            "this is not a method",
            where=name,
            found=kind if isinstance(kind, type) else type(kind).__name__,
            expected="a dataclass that derives from limbeck.Method",
            fix="limbeck new NAME writes one to start from",
        )
    return kind


def name_of(kind: type[Method]) -> str:
    """The name that `find` finds a method class under; `file.py:Class` for one's own.

    Example:
        >>> name_of(find("pld"))
        'pld'
    """
    target = f"{kind.__module__}:{kind.__qualname__}"
    own = f"{getattr(sys.modules.get(kind.__module__), '__file__', None) or kind.__module__}:{kind.__qualname__}"
    return next((name for name, spec in METHODS.items() if spec == target), own)


def card(name: str) -> Card:
    """The card of a method, read from the folder it lives in.

    Raises:
        UsageError: There is no such method, or its card is missing or has no front matter.

    Example:
        >>> card("kd").metadata["year"]
        2015
    """
    import yaml

    path = _folder(name) / "card.md"
    try:
        _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
        metadata = yaml.safe_load(front)
    except FileNotFoundError:
        raise UsageError(
            "this method has no card", where=path, fix="write one; limbeck new NAME shows its form"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(
            "this card has no front matter", where=path, found=error, expected="YAML between two lines of ---"
        ) from None
    return Card(name, metadata, text.strip(), path)


def unknown(name: str) -> UsageError:
    """The error for a method that is not in the table, with near names."""
    near = get_close_matches(name, METHODS, n=3, cutoff=0.4)
    return UsageError(
        "unknown method",
        where="method.name",
        found=name,
        expected=f"{' or '.join(near) if near else 'one of ' + ', '.join(METHODS)}, or file.py:Class",
        fix="limbeck methods lists them",
    )


def _folder(name: str) -> Path:
    if ":" in name:
        return Path(name.rpartition(":")[0]).parent
    if name not in METHODS:
        raise unknown(name)
    package = find_spec(METHODS[name].partition(":")[0].rpartition(".")[0])
    assert package is not None, f"the folder of {name} is missing"
    return Path(package.origin or "").parent
