"""Data: named sources whose samples have stable ids, and whose augmentation is a function of (sample, seed)."""

from limbeck.data.combine import Concatenated, Paired, together
from limbeck.data.data import Data
from limbeck.data.images import Normalise, image_transform, normalise
from limbeck.data.load import load_data
from limbeck.data.loading import batches
from limbeck.data.sources import DatasetSource, Subset, TensorSource
from limbeck.data.text import TextSource

__all__ = [
    "Concatenated",
    "Data",
    "DatasetSource",
    "Normalise",
    "Paired",
    "Subset",
    "TensorSource",
    "TextSource",
    "batches",
    "image_transform",
    "load_data",
    "normalise",
    "together",
]
