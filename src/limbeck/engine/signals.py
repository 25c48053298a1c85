"""SIGINT and SIGTERM: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from limbeck.engine.runtime import Runtime


class Signals:
    """Notes a signal while a run works; the second one interrupts at once. A context manager."""

    def __init__(self) -> None:
        self.name = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def caught(self, runtime: Runtime, step: int, every: int) -> bool:
        """Whether to stop now; several processes agree on it every so many steps."""
        if runtime.world == 1:
            return bool(self.name)
        if step % every:
            return False
        flag = torch.tensor(float(bool(self.name)), device=runtime.device)
        runtime.add([flag])
        self.name = self.name or ("a signal to another process" if flag.item() else "")
        return bool(flag.item())
