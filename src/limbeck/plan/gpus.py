"""GPUs by name: what they hold and how fast they could be."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One GPU, in its maker's data-sheet figures.

    Args:
        name: As given to `limbeck plan --gpu`.
        memory: Bytes.
        half: Peak of dense 16-bit matrix products, FLOP/s; bfloat16, or float16 where there is no bfloat16.
        single: Peak of float32 outside the tensor cores, FLOP/s.
        bfloat16: Whether it computes in bfloat16.
    """

    name: str
    memory: int
    half: float
    single: float
    bfloat16: bool = True

    def peak(self, precision: str) -> float:
        """FLOP/s at an engine precision."""
        return self.single if precision == "fp32" else self.half


def _gpu(name: str, gigabytes: int, half: float, single: float, bfloat16: bool = True) -> Gpu:
    return Gpu(name, gigabytes * 10**9, half * 1e12, single * 1e12, bfloat16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 16, 65, 8.1, bfloat16=False),
        _gpu("v100-16gb", 16, 125, 15.7, bfloat16=False),
        _gpu("rtx3090", 24, 71, 35.6),
        _gpu("a10", 24, 125, 31.2),
        _gpu("l4", 24, 121, 30.3),
        _gpu("rtx4090", 24, 165, 82.6),
        _gpu("rtx5090", 32, 209, 104.8),
        _gpu("a100-40gb", 40, 312, 19.5),
        _gpu("l40s", 48, 362, 91.6),
        _gpu("a100-80gb", 80, 312, 19.5),
        _gpu("h100", 80, 989, 66.9),
        _gpu("h200", 141, 989, 66.9),
        _gpu("b200", 180, 2250, 75.0),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UsageError: It is not in the table.

    Example:
        >>> find_gpu("a100-80gb").memory // 10**9
        80
    """
    name = name.lower()
    if name in GPUS:
        return GPUS[name]
    near = [gpu for gpu in GPUS if gpu.startswith(name)] or get_close_matches(name, GPUS, n=3, cutoff=0.4)
    raise UsageError("unknown GPU", where="gpu", found=name, expected=" or ".join(near or GPUS))
