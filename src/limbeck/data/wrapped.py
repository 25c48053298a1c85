"""What a data set of torch, torchvision or Hugging Face says of itself: content, ids, labels, class names."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from limbeck.data.ids import content_ids, digest, mix, text_ids
from limbeck.data.seeding import isolated, reseed

_PROBES = 32


def describe(dataset: Any) -> str:
    """A hash of a data set's content.

    Args:
        dataset: Its own `fingerprint()` counts, then tensors, listed files (path and size), arrays (`data`, `targets`),
            the fingerprint of a Hugging Face data set; failing these, its length and evenly spaced samples.

    Example:
        >>> describe(TensorDataset(torch.ones(2))) == describe(TensorDataset(torch.zeros(2)))
        False
    """
    kind = type(dataset).__qualname__
    if isinstance(dataset, Subset):
        return digest(describe(dataset.dataset), torch.as_tensor(dataset.indices))
    if callable(own := getattr(dataset, "fingerprint", None)):
        return str(own())
    if isinstance(dataset, TensorDataset):
        return digest(kind, *(content_ids(t) for t in dataset.tensors))
    if (files := listed_files(dataset)) is not None:
        return digest(kind, *(f"{path}{os.path.getsize(path)}" for path in files), *_arrays(dataset))
    if isinstance(own := getattr(dataset, "_fingerprint", None), str):
        return digest(kind, own)
    if arrays := _arrays(dataset):
        return digest(kind, *arrays)
    size = len(dataset)
    rows = sorted({i * (size - 1) // _PROBES for i in range(_PROBES + 1)})
    with isolated():
        reseed(0)
        return digest(kind, size, *(_content(dataset[row]) for row in rows))


def known_ids(dataset: Any) -> Tensor:
    """Sample ids `[N]`: the data set's own, else from file paths, else from its content's hash and the position."""
    if isinstance(dataset, Subset):
        return known_ids(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if (ids := getattr(dataset, "ids", None)) is not None and len(ids) == len(dataset):
        return torch.as_tensor(ids)
    if (files := listed_files(dataset)) is not None:
        root = os.path.commonpath([os.path.dirname(f) for f in files])
        return text_ids(Path(os.path.relpath(f, root)).as_posix() for f in files)
    if isinstance(dataset, TensorDataset):
        return content_ids(dataset.tensors[0])
    base = int(describe(dataset), 16) - (1 << 63)
    return mix(mix(torch.tensor(base)) + torch.arange(len(dataset)))


def known_labels(dataset: Any) -> Tensor | None:
    """The labels `[N]` that a data set lists (`labels`, `targets`, or a tensor), read without touching samples."""
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    for name in ("labels", "targets"):
        values = getattr(dataset, name, None)
        if isinstance(values, Tensor | np.ndarray | list) and len(values) == len(dataset):
            try:
                return torch.as_tensor(values)
            except (ValueError, TypeError):
                return None
    return None


def known_classes(dataset: Any) -> tuple[str, ...] | None:
    """The class names that a data set lists."""
    if isinstance(dataset, Subset):
        return known_classes(dataset.dataset)
    feature = (getattr(dataset, "features", None) or {}).get("label")
    names = getattr(dataset, "classes", None) or getattr(feature, "names", None)
    return tuple(str(n) for n in names) if isinstance(names, list | tuple) and names else None


def listed_files(dataset: Any) -> list[str] | None:
    """The files of a data set in the manner of torchvision's folders: `samples` is a list of `(path, label)`."""
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple) and isinstance(samples[0][0], str):
        paths = [sample[0] for sample in samples]
        return paths if os.path.isfile(paths[0]) else None
    return None


def _arrays(dataset: Any) -> list[Tensor]:
    found = [getattr(dataset, name, None) for name in ("data", "targets", "labels")]
    arrays = [torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a for a in found]
    return [content_ids(a) for a in arrays if isinstance(a, Tensor) and len(a) == len(dataset)]


def _content(value: Any) -> str:
    """A hash of an item that is the same in every process."""
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return digest(torch.from_numpy(np.ascontiguousarray(value)))
    if isinstance(value, Mapping):
        return digest(*(part for name, item in value.items() for part in (name, _content(item))))
    if isinstance(value, tuple | list):
        return digest(*map(_content, value))
    if callable(raw := getattr(value, "tobytes", None)):  # an image of PIL
        return digest(raw())
    return digest(without_address(repr(value)))


def without_address(text: str) -> str:
    """The `repr` of an object without its place in memory, which is another every time.

    Example:
        >>> without_address("<function f at 0x7f01>")
        '<function f>'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", text)
