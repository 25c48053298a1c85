"""PLACEHOLDER by the engine's owner: replace whole (keep the rule of _function: import inside limbeck, else only modules already imported)."""
import sys
from importlib import import_module


def rebuild(module, records):
    for record in records:
        name, _, path = record["kind"].partition(":")
        target = import_module(name) if name.split(".")[0] == "limbeck" else sys.modules[name]
        for part in path.split("."):
            target = getattr(target, part)
        module = target(module, record)
    return module
