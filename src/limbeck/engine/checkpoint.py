"""Checkpoints that are whole or not there: written aside, checksummed, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.errors import RunError

FORMAT = 1


class Checkpoints:
    """The checkpoint folder of a run.

    Each checkpoint is a folder `<stage index>-<stage>-<step>` with `roles/<role>.safetensors`, `state.pt` (optimizers,
    counters, random states; read with `weights_only`) and `manifest.json` with the SHA-256 of each file.

    Args:
        folder: Where they live.
        keep: Newest ones to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def names(self) -> list[str]:
        """Finished checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def save(
        self,
        name: str,
        roles: dict[str, dict[str, Any]],
        state: dict[str, Any],
        protect: set[str],
        info: dict[str, Any],
    ) -> Path:
        """Write one, then drop old ones that are not protected."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch, final = self.folder / f".{name}", self.folder / name
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "roles").mkdir(parents=True)
        extra = {}
        for role, values in roles.items():
            tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
            extra[role] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
            save_file(_separate(tensors), scratch / "roles" / f"{role}.safetensors")
        torch.save({**state, "format": FORMAT, "extra": extra}, scratch / "state.pt")
        files = {str(p.relative_to(scratch)): _sha256(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
        (scratch / "manifest.json").write_text(json.dumps({"format": FORMAT, **info, "sha256": files}, indent=1))
        if final.exists():
            # The same state written again after a resume; the old copy is as good until the new one is in place.
            stale = self.folder / f".stale-{name}"
            shutil.rmtree(stale, ignore_errors=True)
            os.replace(final, stale)
        os.replace(scratch, final)
        self._tidy({name, *protect})
        return final

    def _tidy(self, protect: set[str]) -> None:
        newest = self.names()[-self.keep :]
        for path in self.folder.iterdir():
            if path.name not in newest and path.name not in protect:
                shutil.rmtree(path)

    def load(self, name: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """The role states and the rest.

        Raises:
            RunError: A file is missing or differs from its checksum, or a newer version wrote it.
        """
        path = self.folder / name
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            damaged = [f for f, digest in manifest["sha256"].items() if _sha256(path / f) != digest]
        except (OSError, ValueError, KeyError) as error:
            raise RunError("a checkpoint is damaged", where=path, found=f"{type(error).__name__}: {error}") from None
        if damaged:
            raise RunError("a checkpoint is damaged", where=path, found=f"wrong checksum of {', '.join(damaged)}")
        if manifest["format"] > FORMAT:
            raise RunError(
                "a checkpoint of a newer version",
                where=path,
                found=manifest["format"],
                expected=FORMAT,
                fix="upgrade limbeck",
            )
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        extra = state.pop("extra")
        return {role: {**load_file(path / "roles" / f"{role}.safetensors"), **extra[role]} for role in extra}, state

    def latest(self, warn: Any) -> tuple[str, dict[str, dict[str, Any]], dict[str, Any]] | None:
        """The newest good checkpoint; damaged ones are refused with a word to `warn` and the one before is used."""
        names = self.names()
        for name in reversed(names):
            try:
                return name, *self.load(name)
            except RunError as error:
                if "newer" in error.what:
                    raise
                warn(f"{error}\n  the checkpoint before it is used")
        if names:
            raise RunError(
                "all checkpoints are damaged", where=self.folder, fix="delete the run folder, or run with another `out`"
            )
        return None


def random_state() -> dict[str, Any]:
    """The state of all global random generators, as plain data."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global random generators back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no storage, which the format asks for."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor.clone() if shared else tensor
    return result


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
