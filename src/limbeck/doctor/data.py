"""Checks of the data: what the models are given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from limbeck.doctor.exam import Exam, Skip
from limbeck.doctor.finding import Finding

_LARGE = 30.0  # standardised inputs stay well below, pixels from 0 to 255 do not


def inputs(exam: Exam) -> Finding | None:
    """What the models get is finite, varies, and has the size of numbers that networks work with."""
    given = {f"roles.{n}": tree_leaves((call.args, call.kwargs)) for n, call in exam.calls.items()}
    given = given or {"batch.x": tree_leaves(exam.batch.get("x"))}
    for where, leaves in given.items():
        for x in leaves:
            if isinstance(x, Tensor) and x.numel() > 1:
                finding = _image_bytes(where, x, exam.ran) if x.dtype == torch.uint8 else _input(where, x)
                if finding is not None:
                    return finding
    return None


def labels(exam: Exam) -> Finding | None:
    """The labels differ, and no class has nearly all of them."""
    known = getattr(exam.stage.data, "labels", None)
    y = exam.batch.get("y") if known is None else known
    if not isinstance(y, Tensor) or y.ndim != 1 or len(y) < 8 or y.is_complex():
        raise Skip("the data have no labels, or fewer than 8")
    values, counts = y.unique(return_counts=True)
    most = int(counts.argmax())
    share = float(counts[most]) / len(y)
    if len(values) == 1:
        return Finding(
            "labels",
            "error",
            "all labels are the same",
            where="data.y",
            found=f"{values[0].item()} for all of {len(y)} samples",
            fix="look at the label column and at how the data were divided",
        )
    if share > 0.9 and not y.is_floating_point():
        return Finding(
            "labels",
            "warning",
            "nearly all labels are the same",
            where="data.y",
            found=f"class {int(values[most])} for {share:.0%} of {len(y)} samples",
            fix="judge by F1 rather than accuracy, and think of sampling the rare classes more often",
        )
    return None


def _image_bytes(where: str, x: Tensor, taken: bool) -> Finding | None:
    if x.ndim < 3:
        return None
    return Finding(
        "inputs",
        "warning" if taken else "error",
        "the model gets bytes",
        where=where,
        found=f"uint8, {int(x.min())} to {int(x.max())}",
        expected="floating-point numbers, normalised",
        fix="divide by 255 and normalise: v2.ToDtype(torch.float32, scale=True)",
    )


def _input(where: str, x: Tensor) -> Finding | None:
    if not x.is_floating_point():
        return None
    if not bool(x.isfinite().all()):
        bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero().flatten()
        found = f"in {len(bad)} of {len(x)} samples, the first is row {int(bad[0])} of the batch"
        fix = "drop or fill these samples, and look for a division by a standard deviation of 0"
        return Finding("inputs", "error", "the model gets NaN or infinite numbers", where, found, "finite numbers", fix)
    low, high = float(x.min()), float(x.max())
    if low == high:
        fix = "look at the transform and the columns that are read"
        return Finding("inputs", "error", "the model gets the same number everywhere", where, f"{low:g}", None, fix)
    if low >= 0 and high > _LARGE:
        fix = "divide by 255 where these are pixels, and normalise; standardise columns of numbers"
        found = f"numbers from {low:g} to {high:g}"
        return Finding(
            "inputs", "warning", "the model gets large numbers", where, found, "about -3 to 3, or 0 to 1", fix
        )
    return None
