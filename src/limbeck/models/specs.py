"""Specs: short texts that name a model, a data set or a function."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from limbeck.core.errors import UsageError, quiet_torchao

_FILE = re.compile(r"(.+\.py):(\w+)$")
_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):(\w+)$")
SCHEMES = ("timm", "torchvision", "hf", "st", "layers", "slice", "condensed")


def is_object(spec: str) -> bool:
    """Whether a spec names something in a Python file or module.

    Example:
        >>> is_object("models/net.py:build"), is_object("package.module:factory"), is_object("timm:resnet18")
        (True, True, False)
    """
    if _FILE.match(spec):
        return True
    found = _MODULE.match(spec)
    return found is not None and found[1] not in SCHEMES


def import_object(spec: str) -> Any:
    """What `file.py:name` or `package.module:name` names; nothing but that file or module is imported.

    Args:
        spec: The name after the colon is looked up in the file or module; modules are looked for in the working folder too.

    Raises:
        UsageError: There is no such file, module or name, or importing it fails.

    Example:
        >>> import_object("math:gcd")(12, 18)
        6
    """
    file = _FILE.match(spec)
    found = file or _MODULE.match(spec)
    if found is None:
        expected = "file.py:function or package.module:function"
        raise UsageError("this does not name a Python object", found=spec, expected=expected)
    place, name = found.groups()
    quiet_torchao()
    module = _import_file(Path(place)) if file else _import_module(place)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n in dir(module) if not n.startswith("_")]
        near = get_close_matches(name, public, n=3, cutoff=0.4) or public[:10]
        raise UsageError(
            "there is no such function", where=place, found=name, expected=" or ".join(near) or "a function"
        ) from None


def _import_file(path: Path) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise UsageError("there is no such Python file", where=path, fix="give the path of a file, then :function")
    # A name of its own for each file, so that equal file names do not hide each other or an installed module.
    name = f"limbeck_user_{path.stem}_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("this file cannot be imported", where=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise _failed(path, error) from error
    return module


def _import_module(name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error  # something that the module itself imports
        near = get_close_matches(name, SCHEMES, n=2, cutoff=0.6)
        expected = " or ".join(f"{n}:NAME" for n in near) if near else "a module that Python finds, or file.py:function"
        raise UsageError("there is no such module", where=name, found=error, expected=expected) from None
    except Exception as error:
        raise _failed(name, error) from error
    finally:
        sys.path.remove(here)


def _failed(where: object, error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    found = f"{type(error).__name__}: {error}"
    return UsageError("importing this fails", where=where, found=found, fix="correct it, or install what it needs")
