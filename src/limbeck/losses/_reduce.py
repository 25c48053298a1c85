"""What every loss shares: widening to full precision, argument checks, reduction."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

Reduction = Literal["mean", "sum", "none"]
Variant = Literal["paper", "code"]
P = ParamSpec("P")


def reduce(per_sample: Tensor, reduction: Reduction) -> Tensor:
    """Average, add up, or keep the losses of single samples."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run a loss outside autocast, on floating tensors widened to one common dtype of at least fp32."""
    call: Callable[..., Tensor] = loss

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        floats = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        if not floats:
            raise UsageError(
                "a loss needs floating-point tensors",
                where=loss.__name__,
                found=", ".join(str(a.dtype) if isinstance(a, Tensor) else type(a).__name__ for a in args) or "nothing",
                fix="pass tensors of logits or features as the first two arguments",
            )
        dtype = functools.reduce(torch.promote_types, [a.dtype for a in floats], torch.float32)

        def widen(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        with _no_autocast(floats[0].device.type):
            return call(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})

    return run


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    # The meta device has no autocast to switch off.
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def check_same(where: str, student: Tensor, teacher: Tensor, *, dims: int | None = None) -> None:
    """Both tensors have one shape, with `dims` dimensions if given."""
    if student.shape != teacher.shape:
        raise UsageError(
            "student and teacher differ in shape",
            where=where,
            found=f"student {list(student.shape)}, teacher {list(teacher.shape)}",
            expected="equal shapes",
            fix="map the student to the teacher's shape first (class map, projector or pooling)",
        )
    if dims is not None and student.ndim != dims:
        _wrong_dims(where, student, f"{dims} dimensions")


def check_batch(where: str, student: Tensor, teacher: Tensor, *, dims: int | None = None, at_least: int = 1) -> None:
    """Both tensors hold the same samples along dimension 0, each with its own features behind it."""
    for tensor in (student, teacher):
        if tensor.ndim < 2 or (dims is not None and tensor.ndim != dims):
            _wrong_dims(where, tensor, f"{dims} dimensions" if dims else "[B, ...] with two dimensions or more")
    if len(student) != len(teacher) or len(student) < at_least:
        raise UsageError(
            "student and teacher must hold the same samples",
            where=where,
            found=f"batches of {len(student)} and {len(teacher)}",
            expected=f"equal batches of at least {at_least}",
            fix="feed both the same batch (drop the last, incomplete one)",
        )


def check_labels(where: str, labels: Tensor, logits: Tensor) -> Tensor:
    """One class index per row of `logits`, returned as int64.

    The range is read on the CPU only: reading it on a device would wait for the device, whose own index check traps.
    """
    if labels.shape != logits.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(
            "labels must be one class index per sample",
            where=where,
            found=f"{labels.dtype} {list(labels.shape)}",
            expected=f"integers of shape {list(logits.shape[:-1])}",
            fix="with mixed or soft labels use `soft_cross_entropy` or `kl`, or pass `teacher.argmax(-1)`",
        )
    classes = logits.shape[-1]
    # Fake tensors and traces have no values to look at.
    if type(labels) is Tensor and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise UsageError(
                "label out of range",
                where=where,
                found=int(wrong[0]),
                expected=f"0 .. {classes - 1}",
                fix="drop ignored positions from student, teacher and labels before the call",
            )
    return labels.long()


def check_classes(where: str, logits: Tensor) -> None:
    """There are two classes or more."""
    if logits.shape[-1] < 2:
        raise UsageError(
            "at least two classes are needed", where=where, found=list(logits.shape), expected="[..., C >= 2]"
        )


def check_positive(where: str, **values: float) -> None:
    """Every value is larger than zero."""
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive", where=where, found=value, expected="> 0")


def check_choice(where: str, value: object, allowed: tuple[str, ...]) -> None:
    """The value is one of the allowed words."""
    if value not in allowed:
        raise UsageError(f"unknown {where}", found=repr(value), expected=" | ".join(allowed))


def _wrong_dims(where: str, tensor: Tensor, expected: str) -> None:
    raise UsageError(
        "tensor has the wrong number of dimensions", where=where, found=list(tensor.shape), expected=expected
    )
