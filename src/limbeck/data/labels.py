"""Labels of the splits of one data set: numbers, or names that become numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.sources import check_finite, check_labels

_LEARNED = re.compile(r"train|memory|increment_\d+")


def is_learned(split: str) -> bool:
    """Whether a split is one to learn from, so that its classes are classes of the data: the increments of `wa` are.

    Example:
        >>> [is_learned(name) for name in ("train", "increment_2", "test")]
        [True, True, False]
    """
    return _LEARNED.fullmatch(split) is not None


def encode(
    values: Mapping[str, Any], classes: Sequence[str] | None = None
) -> tuple[dict[str, Tensor | None], tuple[str, ...] | None]:
    """Labels as tensors, numbered the same way in all splits.

    Args:
        values: Lists of texts or numbers by split; None for a split without labels. Whole numbers that are all -1 mean
            that there are no labels either.
        classes: Class names in the order of their numbers. Default: the names of the splits to learn from, sorted.

    Returns:
        Labels `[N]` by split, int64 for classes, float32 for numbers that are not whole; and the class names.

    Raises:
        UsageError: A label is out of range, no number, unknown to the training split, or there is one class only.

    Example:
        >>> labels, classes = encode({"train": ["cat", "dog", "cat"], "test": ["dog"]})
        >>> labels["test"].tolist(), classes
        ([1], ('cat', 'dog'))
    """
    first = next((values[k] for k in ("train", *values) if values.get(k) is not None), None)
    if first is None:
        return dict.fromkeys(values), None if classes is None else tuple(classes)
    if isinstance(first[0], str):
        learned = [v for k, v in values.items() if is_learned(k) and v is not None] or [first]
        classes = sorted({name for part in learned for name in part}) if classes is None else classes
    names = None if classes is None else tuple(classes)
    labels = {k: None if v is None else _numbers(v, names, f"{k}: label") for k, v in values.items()}
    if (train := labels.get("train")) is not None and not train.is_floating_point() and len(train.unique()) < 2:
        found = f"class {names[int(train[0])] if names else int(train[0])} in all {len(train)} samples"
        raise UsageError(
            "the training data have one class only",
            where="train: label",
            found=found,
            fix="give data of two classes or more, or name another label column",
        )
    return labels, names


def _numbers(values: Any, classes: tuple[str, ...] | None, where: str) -> Tensor | None:
    if isinstance(values[0], str):
        numbers = {name: number for number, name in enumerate(classes or ())}
        row = next((row for row, v in enumerate(values) if v not in numbers), None)
        if row is not None:
            raise UsageError(
                "a label is out of range",
                where=where,
                found=f"'{values[row]}' in row {row}",
                expected=f"one of the {len(numbers)} classes {', '.join(list(numbers)[:10])}",
                fix="correct it, or name all classes with classes=[...]",
            )
        return torch.tensor([numbers[v] for v in values])
    array = np.asarray(values)
    if array.dtype.kind == "f":
        labels = torch.from_numpy(array.astype(np.float32))
        check_finite(labels, where)
        return labels
    labels = torch.from_numpy(array.astype(np.int64))
    if bool((labels == -1).all()):
        return None
    check_labels(labels, None if classes is None else len(classes), where)
    return labels
