"""Data sets that come with Limbeck or its extras, by name; none is downloaded."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.core.errors import require
from limbeck.data.data import Data, divide
from limbeck.data.ids import content_ids
from limbeck.data.procedural import shapes, superclasses
from limbeck.data.sources import TensorSource
from limbeck.data.text import TextSource

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def digits(seed: int = 0) -> Data:
    """scikit-learn's 1797 handwritten digits: `x` `[N, 1, 8, 8]` in [0, 1], `y` in 0 .. 9; about 70 / 10 / 20 % by id.

    Example:
        >>> data = digits()
        >>> sum(len(s) for _, s in data.items()), data.num_classes
        (1797, 10)
    """
    found = require("sklearn.datasets", extra="vision").load_digits()
    x = torch.from_numpy(found.images).float().div_(16).unsqueeze(1)
    source = TensorSource(x, torch.from_numpy(found.target), classes=[str(k) for k in range(10)])
    return Data.split(source, SHARES, seed)


def tabular(name: str, seed: int = 0) -> Data:
    """One of scikit-learn's tables (`iris`, `wine`, `breast_cancer`): `x` `[N, F]`, standardised by the training split.

    Example:
        >>> data = tabular("iris")
        >>> data.classes, data.train.batch(torch.arange(2), view=0).x.shape
        (('setosa', 'versicolor', 'virginica'), torch.Size([2, 4]))
    """
    found = getattr(require("sklearn.datasets", extra="vision"), f"load_{name}")()
    x, y = torch.from_numpy(found.data).float(), torch.from_numpy(found.target)
    # Divided by the measured values, before they are standardised by what the division made the training split.
    parts = divide(TensorSource(x, torch.arange(len(x)), ids=content_ids(x)), SHARES, seed)
    std, mean = torch.std_mean(x[parts["train"].labels], dim=0)
    classes = [str(n) for n in found.target_names]
    scaled = (x - mean) / std
    sources = {
        k: TensorSource(scaled[part.labels], y[part.labels], part.ids, classes=classes) for k, part in parts.items()
    }
    return Data(**sources)


def docstrings(tokenizer: Callable[..., Any] | None = None, max_length: int | None = None) -> Data:
    """The docstrings of Python's standard library, divided by module: see `limbeck.data.docstrings`."""
    from limbeck.data.docstrings import SPLITS, load_corpus

    corpus = load_corpus()
    return Data(**{name: TextSource(getattr(corpus, name).texts, tokenizer, max_length=max_length) for name in SPLITS})


TABLES = ("iris", "wine", "breast_cancer")
EMBEDDED: Mapping[str, Callable[..., Data]] = {
    "digits": digits,
    **{name: lambda seed=0, name=name: tabular(name, seed) for name in TABLES},
    "superclasses": superclasses,
    "shapes": shapes,
}
NAMES = (*EMBEDDED, "docstrings")
