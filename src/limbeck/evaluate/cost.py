"""What a model costs: parameters, bytes, operations, time and memory."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class Latency:
    """Time of one call, in seconds, over several calls.

    Args:
        median: Half of the calls were faster.
        p10: A tenth of the calls were faster.
        p90: Nine tenths of the calls were faster.
        p99: All but a hundredth of the calls were faster.
        repeats: Calls timed.
        threads: Threads torch used within an operation.
        device: Where it ran.
    """

    median: float
    p10: float
    p90: float
    p99: float
    repeats: int
    threads: int
    device: str


@dataclass(frozen=True)
class Cost:
    """What one model costs on one machine for one kind of input.

    Args:
        parameters: Numbers in its parameters, shared ones once.
        trainable: Those of them that require a gradient.
        bytes: Size of its stored state.
        flops: Floating-point operations of one call; a multiply-add counts as two.
        latency: Time of one call.
        throughput: Items per second at the median latency.
        peak_memory: Bytes that one call needs over what was held before it.
    """

    parameters: int
    trainable: int
    bytes: int
    flops: int
    latency: Latency
    throughput: float
    peak_memory: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `metrics.json`."""
        return asdict(self)


def measure(module: nn.Module, *args: Any, items: int, warmup: int = 3, repeats: int = 20, **kwargs: Any) -> Cost:
    """All costs of calling a module in eval mode without gradients.

    Args:
        module: The model, on the device to measure; its modes are put back afterwards.
        *args: What it is called with.
        items: Samples in that call, the unit of `throughput`.
        warmup: Calls before the clock starts.
        repeats: Calls timed.
        **kwargs: What it is called with.

    Returns:
        The costs.

    Raises:
        UsageError: `repeats` is below one.

    Example:
        >>> cost = measure(nn.Linear(8, 4), torch.zeros(16, 8), items=16)
        >>> cost.parameters, cost.bytes, cost.flops
        (36, 144, 1024)
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    total, trainable = parameters(module)
    with evaluating(module):

        def call() -> Any:
            return module(*args, **kwargs)

        time_ = latency(call, warmup, repeats, device)
        memory = peak_memory(call, device)
    return Cost(
        parameters=total,
        trainable=trainable,
        bytes=size_bytes(module),
        flops=flops(module, *args, **kwargs),
        latency=time_,
        throughput=items / time_.median,
        peak_memory=memory,
    )


def parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers in a module's parameters, and those of them that are trainable; shared ones are counted once.

    Example:
        >>> encoder, decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        >>> decoder.weight = encoder.weight
        >>> parameters(nn.Sequential(encoder, decoder))
        (16, 16)
    """
    found = list(module.parameters())
    return sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)


def size_bytes(module: nn.Module) -> int:
    """Bytes of a module's stored state: parameters and persistent buffers, shared ones once.

    Sparse and quantised tensors count what they hold: values, indices and scales.

    Example:
        >>> size_bytes(nn.BatchNorm1d(4))
        72
    """
    state = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(map(_tensor_bytes, state.values()))


def flops(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of one call in eval mode: matrix products, convolutions and attention.

    A multiply-add counts as two; element-wise operations and look-ups are not counted (torch's counter).

    Example:
        >>> flops(nn.Linear(8, 4), torch.zeros(16, 8)) == 2 * 16 * 8 * 4
        True
    """
    with evaluating(module), _unfused(), flop_counter() as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also knows the fused attention of CPUs."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def count_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    return FlopCounterMode(display=False, custom_mapping={forward: count, backward: count_backward})


def latency(
    fn: Callable[[], object], warmup: int = 3, repeats: int = 20, device: torch.device | str = "cpu"
) -> Latency:
    """Time of one call of `fn`, with the device waited for before and after each.

    Args:
        fn: What to time; grad and train modes are the caller's.
        warmup: Calls before the clock starts.
        repeats: Calls timed, at least one.
        device: Where `fn` does its work.

    Raises:
        UsageError: `repeats` is below one.

    Example:
        >>> t = latency(lambda: torch.ones(100).sum(), repeats=5)
        >>> 0 < t.p10 <= t.median <= t.p90 <= t.p99, t.repeats
        (True, 5)
    """
    if repeats < 1:
        raise UsageError("a latency needs at least one timed call", where="repeats", found=repeats)
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    seconds = [_seconds(fn, device) for _ in range(repeats)]
    at = torch.tensor([0.5, 0.1, 0.9, 0.99], dtype=torch.float64)
    median, p10, p90, p99 = torch.tensor(seconds, dtype=torch.float64).quantile(at).tolist()
    return Latency(median, p10, p90, p99, repeats, torch.get_num_threads(), str(device))


def throughput(
    fn: Callable[[], object], items: int, warmup: int = 3, repeats: int = 20, device: torch.device | str = "cpu"
) -> float:
    """Items per second at the median latency of `fn`, which handles `items` at a time.

    Example:
        >>> throughput(lambda: torch.ones(100).sum(), items=100, repeats=5) > 0
        True
    """
    return items / latency(fn, warmup, repeats, device).median


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that one call of `fn` needs at its peak, over what was held before it.

    CUDA: torch's allocator, exact. CPU: the resident set of the process, a lower bound for small numbers.
    Without Linux's resettable mark, the growth of the process's all-time peak, again a lower bound.

    Example:
        >>> peak_memory(lambda: torch.ones(2**20)) >= 0
        True
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    _reset_peak()
    held = _resident_peak()
    fn()
    return max(0, _resident_peak() - held)


def _seconds(fn: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each sub-module's own mode is put back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _unfused() -> Iterator[None]:
    """Without the fused encoder layer and the fused LSTM: single operations that the counter does not know."""
    fastpath, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.mkldnn.enabled = mkldnn


def _tensor_bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return sum(_tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        parts = [tensor]
    return sum(t.numel() * t.element_size() for t in parts)


def _reset_peak() -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)  # what is held free goes back to the system, or it would not be seen again
    with suppress(OSError):  # where there is no such mark, _resident_peak only ever grows
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> int:
    """The most bytes that were resident since the mark was reset, or ever."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
