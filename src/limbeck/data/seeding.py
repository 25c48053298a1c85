"""Random draws of a transform as a function of a seed, whichever global generator it draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated() -> Iterator[None]:
    """Put the global generators of torch (CPU), `random` and numpy back at the end of the block.

    Example:
        >>> before = torch.get_rng_state()
        >>> with isolated():
        ...     reseed(3)
        ...     a = torch.rand(())
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def reseed(seed: int) -> None:
    """Seed the global generators of torch (CPU), `random` and numpy.

    Args:
        seed: Any whole number of 64 bits.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed & 0xFFFFFFFFFFFFFFFF)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
