"""Results that are written one by one: a benchmark that was stopped goes on where it was."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.core.files import write_text


class Cells:
    """A result file with a cell for each thing measured; what it holds under the same settings is not measured again.

    Args:
        out: The file; None keeps nothing.
        settings: What all cells depend on; where the file has others, it begins anew.
        **head: What else the file says, such as the machine.
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any], **head: Any) -> None:
        self.out, settings = out, json.loads(json.dumps(settings))
        self.result: dict[str, Any] = {**head, "settings": settings, "cells": {}}
        if out is not None and out.exists():
            found = json.loads(out.read_text(encoding="utf-8"))
            self.result = found if found.get("settings") == settings else self.result

    def __call__(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A cell's numbers, measured where they are not there yet; with the seconds of CPU that it took."""
        cells = self.result["cells"]
        if name not in cells:
            began = time.process_time()
            found = dict(measure())
            cells[name] = {**found, "cpu_s": round(time.process_time() - began, 1)}
            print(name, json.dumps(cells[name]), flush=True)
            self.write()
        return dict(cells[name])

    def write(self, **more: Any) -> None:
        """Keep what there is, and further parts of the result."""
        self.result.update(more)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.out, json.dumps(self.result, indent=1) + "\n")


def kept(path: Path, net: nn.Module, train: Callable[[nn.Module], object]) -> nn.Module:
    """A network in evaluation mode, its weights from a file or trained and put there."""
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(net)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    return net.eval()
