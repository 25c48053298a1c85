"""How names and numbers are shown to people."""

import math
import re
from typing import Any, Literal

_SIZES = {"bytes", "memory"}
_COUNTS = {"parameters", "params", "trainable", "flops"}
_TIMES = {"latency", "seconds", "time"}
_LOWER = {"loss", "error", "distance", "ece", "kl", "perplexity", "nfe"} | _SIZES | _COUNTS | _TIMES
_WORDS = {"mrr": "MRR", "f1": "F1", "ece": "ECE", "kl": "KL", "flops": "FLOPs", "lr": "learning rate", "stsb": "STS-B"}
_WORDS |= {"top1": "top-1", "top5": "top-5", "map": "mAP", "ndcg": "nDCG", "onnx": "ONNX", "cpu": "CPU"}
_WORDS |= {"gpu": "GPU", "nfe": "NFE"}


def better(name: str) -> Literal["higher", "lower"]:
    """Which direction of a quantity is the better one, judged by its name.

    Example:
        >>> better("mrr@10"), better("bytes"), better("throughput")
        ('higher', 'lower', 'higher')
    """
    return "lower" if _LOWER & _words(name) and not _is_rate(name) else "higher"


def label(name: str) -> str:
    """A name as people write it.

    Example:
        >>> label("student_before"), label("mrr@10"), label("peak_memory")
        ('Student before', 'MRR@10', 'Peak memory')
    """
    words = re.sub(r"[a-z0-9]+", lambda m: _WORDS.get(m[0], m[0]), name.replace("_", " "))
    return words[:1].upper() + words[1:]


def show(name: str, value: Any) -> str:
    """A value as people read it, by the quantity's name: sizes, counts, times, rates, scores.

    Example:
        >>> show("bytes", 90_872_832), show("parameters", 22_713_216), show("latency", 0.0123), show("seconds", 291)
        ('90.9 MB', '22.7 M', '12.3 ms', '4m 51s')
        >>> show("throughput", 1234.5), show("mrr@10", 0.51234), show("spearman", float("nan")), show("name", "static")
        ('1,234 /s', '0.512', '–', 'static')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    words = _words(name)
    if _is_rate(name):
        return f"{_plain(value)} /s"
    if words & _SIZES:
        return _scaled(value, ["bytes", "kB", "MB", "GB", "TB"])
    if words & _COUNTS:
        return _scaled(value, ["", "k", "M", "G", "T", "P"])
    return _duration(value) if words & _TIMES else _plain(value)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def _is_rate(name: str) -> bool:
    return "throughput" in name.lower() or "per_second" in name.lower()


def _plain(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.2g}"


def _scaled(value: float, units: list[str]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}".strip()


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60}m"
