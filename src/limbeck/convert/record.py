"""Students on disk: weights, the architecture they began as, and the records of what was done to it."""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from limbeck import __version__
from limbeck.core.errors import LimbeckError, UsageError
from limbeck.core.files import aside
from limbeck.export.safetensors import load, read_metadata, save

FORMAT = 1
WEIGHTS, MANIFEST = "model.safetensors", "limbeck.json"
LIBRARIES = ("timm", "torchvision", "hf", "st")

Record = Mapping[str, Any]


def rebuild(module: nn.Module, records: Sequence[Record], trust: bool = True) -> nn.Module:
    """Do a chain of conversions again, structure only; the weights are loaded afterwards.

    Args:
        module: The model as it was before the first conversion; it may be changed in place.
        records: What the conversions returned. `kind`, as in `"limbeck.convert.layers:inherit_layers"`, names a function from
            module and record to the module with the new structure.
        trust: Whether `kind` may also name a function of a module outside Limbeck that this program has itself imported.
            None but Limbeck's own modules are ever imported here.

    Returns:
        The module with the right structure.

    Raises:
        UsageError: A kind is unknown or not allowed, or a record does not fit the module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.Tanh() for _ in range(6)]))
        >>> small = rebuild(net, [{"kind": "limbeck.convert.layers:inherit_layers", "layers": [0, 5], "path": "1"}])
        >>> len(small[1])
        2
    """
    for i, record in enumerate(records):
        function = _function(record.get("kind"), trust, where=f"records[{i}].kind")
        try:
            module = function(module, record)
        except LimbeckError:
            raise
        except Exception as error:
            raise UsageError(
                "the record of a conversion does not fit this module",
                where=f"records[{i}] ({record['kind']})",
                found=f"{type(module).__name__}: {error!r}",
                fix="start from the architecture that was converted",
            ) from error
    return module


def save_student(
    path: str | os.PathLike[str],
    module: nn.Module,
    records: Sequence[Record] = (),
    spec: str | None = None,
    meta: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> None:
    """Write a student's folder: `model.safetensors`, and `limbeck.json` with what builds the module around the weights.

    Other files in the folder stay. Both files are written aside first; should the write be cut between the two, their
    checksum disagrees and loading refuses.

    Args:
        path: The folder.
        module: The student.
        records: Its conversions, in order.
        spec: What `load_model` made the module of before the first conversion; None for a model of one's own.
        meta: Plain data about where it comes from: teacher, method, data, numbers.
        num_classes: The number of classes that `load_model` was given.

    Raises:
        UsageError: Records or meta are not plain data.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_student(folder, net, meta={"method": "kd"})
        ...     same = load_student(folder, nn.Linear(2, 1))
        ...     read_manifest(folder)["meta"], torch.equal(same.weight, net.weight)
        ({'method': 'kd'}, True)
    """
    manifest = {
        "format": FORMAT,
        "versions": {"limbeck": __version__, "torch": str(torch.__version__)},
        "spec": spec,
        "num_classes": num_classes,
        "records": [dict(record) for record in records],
        "meta": dict(meta or {}),
    }
    try:
        json.dumps(manifest)
    except TypeError as error:
        raise UsageError(
            "records and meta must be plain data", where=path, found=error, expected="what JSON can hold"
        ) from None
    with aside(Path(path) / MANIFEST) as scratch:
        weights = scratch.with_name(WEIGHTS)
        save(module, weights)
        scratch.write_text(json.dumps({**manifest, "sha256": _sha256(weights)}, indent=2) + "\n", encoding="utf-8")


def load_student(path: str | os.PathLike[str], module: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """The student that `save_student` wrote, in the precision it was saved in.

    Args:
        path: The folder.
        module: The base model before the conversions, where it is of one's own; it may be changed in place. Default: built
            from the folder's spec, without pre-trained weights.
        trust: Whether the folder may name Python code outside Limbeck: a spec `file.py:function` or
            `package.module:factory`, which is run, or conversions of one's own.

    Returns:
        The student on the CPU, in evaluation mode.

    Raises:
        UsageError: The folder is no student, damaged, of a newer Limbeck, of another architecture, or asks for trust.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    weights = folder / WEIGHTS
    read_metadata(weights)
    if _sha256(weights) != manifest["sha256"]:
        raise UsageError(
            "these weights are not those that were saved with the student",
            where=weights,
            found="another checksum",
            expected=f"the one in {MANIFEST}",
            fix="copy or export the folder again",
        )
    module = _base(manifest, folder, trust) if module is None else module
    module = rebuild(module, manifest["records"], trust)
    _take_precision(module, weights)
    load(module, weights)
    return module.eval()


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `limbeck.json` in a student's folder says.

    Raises:
        UsageError: There is none, it is damaged, or it was written by a newer Limbeck.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("this folder holds no student", where=path, expected=f"{WEIGHTS} and {MANIFEST}") from None
    except ValueError as error:
        raise UsageError("this file is damaged", where=file, found=error, expected="JSON") from None
    keys = {"format": int, "spec": str | None, "num_classes": int | None, "records": list, "sha256": str, "meta": dict}
    found = manifest if isinstance(manifest, dict) else {}
    wrong = [key for key, kind in keys.items() if key not in found or not isinstance(found[key], kind)]
    if "format" not in wrong and found["format"] > FORMAT:
        raise UsageError(
            "this student was saved by a newer Limbeck",
            where=file,
            found=f"format {manifest['format']}, Limbeck {manifest.get('versions', {}).get('limbeck')}",
            expected=f"format {FORMAT} or older",
            fix="pip install -U limbeck",
        )
    if wrong or not all(isinstance(record, dict) for record in manifest["records"]):
        expected = ", ".join(wrong or ["records as mappings"])
        raise UsageError("this is not a student's manifest", where=file, expected=expected)
    return manifest


def _base(manifest: Mapping[str, Any], folder: Path, trust: bool) -> nn.Module:
    from limbeck.models.load import load_model

    spec = manifest["spec"]
    kind = str(spec).partition(":")[0]
    if spec is None or (kind not in LIBRARIES and not trust):
        raise UsageError(
            "this student began as a model that no library builds",
            where=folder / MANIFEST,
            found=f"spec {spec}",
            expected=", ".join(f"{name}:..." for name in LIBRARIES),
            fix="load_student(path, module) with that model"
            + ("" if spec is None else ", or trust=True to run what the spec names"),
        )
    if kind not in ("hf", "st"):
        spec = spec.partition("@")[0]  # the file that the base model was filled from is not needed again
    return load_model(spec, num_classes=manifest["num_classes"], pretrained=kind == "st")  # which has no other form


def _function(kind: Any, trust: bool, where: str) -> Callable[[nn.Module, Record], nn.Module]:
    name, _, path = str(kind).partition(":")
    own = name.split(".")[0] == "limbeck"
    if not own and not trust:
        raise UsageError(
            "a conversion outside Limbeck is not run from a file",
            where=where,
            found=kind,
            expected="limbeck....:function",
            fix="trust=True, where the folder is your own and your program imports that conversion",
        )
    try:
        target: Any = import_module(name) if own else sys.modules[name]
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, KeyError, AttributeError, ValueError):
        target = None
    # Only what the module itself defines: a name that it imports, such as a function of os, is no conversion.
    if not inspect.isfunction(target) or target.__module__ != name:
        fix = "pip install -U limbeck" if own else f"import {name} before this student is rebuilt"
        raise UsageError("there is no such conversion", where=where, found=kind, expected="module:function", fix=fix)
    return target


def _take_precision(module: nn.Module, weights: Path) -> None:
    """Give each floating-point tensor the precision that it has in the file."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    with safe_open(weights, framework="pt") as file:
        for name in state.keys() & set(file.keys()):
            dtype = file.get_tensor(name).dtype
            if dtype.is_floating_point != state[name].is_floating_point():
                raise UsageError(
                    "a weight is of another kind than in the file",
                    where=f"{weights}: {name}",
                    found=dtype,
                    expected=state[name].dtype,
                )
            if dtype.is_floating_point:
                state[name].data = state[name].data.to(dtype)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
