"""Limbeck: distillation and compression, with evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names live in modules that import torch; loading them on first use keeps `import limbeck` and
# `limbeck --help` instant.
_PUBLIC = {
    "Batch": "limbeck.core.batch",
    "Collect": "limbeck.core.stages",
    "Convert": "limbeck.core.stages",
    "Ema": "limbeck.core.optim",
    "Engine": "limbeck.engine.settings",
    "LimbeckError": "limbeck.core.errors",
    "Method": "limbeck.core.method",
    "Optim": "limbeck.core.optim",
    "Roles": "limbeck.core.roles",
    "Search": "limbeck.core.stages",
    "Train": "limbeck.core.stages",
    "Update": "limbeck.core.update",
    "distill": "limbeck.api",
    "load": "limbeck.api",
    "run": "limbeck.api",
}

__all__ = [
    "Batch",
    "Collect",
    "Convert",
    "Ema",
    "Engine",
    "LimbeckError",
    "Method",
    "Optim",
    "Roles",
    "Search",
    "Train",
    "Update",
    "__version__",
    "distill",
    "load",
    "run",
]

if TYPE_CHECKING:
    from limbeck.api import distill, load, run
    from limbeck.core.batch import Batch
    from limbeck.core.errors import LimbeckError
    from limbeck.core.method import Method
    from limbeck.core.optim import Ema, Optim
    from limbeck.core.roles import Roles
    from limbeck.core.stages import Collect, Convert, Search, Train
    from limbeck.core.update import Update
    from limbeck.engine.settings import Engine


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
