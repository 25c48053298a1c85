"""What makes a run this run: the file in its folder that says so, and the refusal of another's."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import UsageError
from limbeck.core.files import write_text
from limbeck.core.source import Source
from limbeck.engine.train import digest

if TYPE_CHECKING:
    from limbeck.engine.run import Run

_FILE = "run.json"
# Settings that may differ between two starts of one run without changing what it computes.
_FREE = {"workers", "checkpoint_every", "keep", "trackers", "device", "processes"}


def identity(run: Run) -> dict[str, Any]:
    """Plain data in which a start of a run and its resume must agree, with their hash as `id`."""
    method = run.method
    settings: dict[str, Any] = asdict(method) if is_dataclass(method) else {}
    engine = {f.name: getattr(run.engine, f.name) for f in fields(run.engine) if f.name not in _FREE}
    named = getattr(run.data, "__dict__", {}) if run.data is not None else {}
    sources = {k: v for k, v in named.items() if isinstance(v, Source)}
    found = {
        "method": f"{type(method).__module__}.{type(method).__qualname__}",
        "method fields": json.loads(json.dumps(settings, default=str)),
        "engine": json.loads(json.dumps(engine, default=list)),
        "optim": {k: str(v) for k, v in run.optim.items()},
        "data": {k: v.fingerprint() for k, v in sources.items()},
        "roles": {n: hashlib.sha256(str(digest(r.module)).encode()).hexdigest()[:16] for n, r in run.m.items()},
    }
    return {**found, "id": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]}


def check_claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder in which another run was started."""
    path = out / _FILE
    if not path.exists():
        return
    before = json.loads(path.read_text())["identity"]
    for key, value in identity.items():
        if before.get(key) != value and key != "id":
            raise UsageError(
                "the run folder holds another run", where=out, found=f"{key} = {before.get(key)}",
                expected=f"{key} = {value}", fix="choose another `out`, or delete the folder",
            )  # fmt: skip


def note(run: Run, out: Path, status: str) -> None:
    """Write how far the run is, and on what machine, into its folder."""
    packages = {name: version(name) for name in ("limbeck", "torch", "numpy")}
    info = {
        "status": status,
        "seconds": round(run.history.elapsed(), 1),
        "seed": run.engine.seed,
        "versions": {**packages, "python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "device": str(run.runtime.device),
            "processes": run.runtime.world,
        },
        "changed": time.strftime("%Y-%m-%d %H:%M:%S"),
        "identity": run.identity,
    }
    write_text(out / _FILE, json.dumps(info, indent=1, default=str) + "\n")
