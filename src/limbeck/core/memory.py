"""The memory of this process, between one step and the next."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next step, as torch does on a GPU.

    glibc gives large blocks back to the system as soon as they are freed, and each step of a training on the CPU gets them anew,
    page by page: a third of the time of a small convolutional network. The process's peak is as it was; what is kept is given
    back when it ends. The command line does this; a program may, before it trains.

    Returns:
        Whether it is done. It is not where the C library is another one, or where MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_
        or GLIBC_TUNABLES say what is wanted.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    said = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    mallopt = None if said or sys.platform != "linux" else getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    )
