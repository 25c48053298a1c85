"""CIFAR-10 for the benchmarks that are given a folder of data."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image

from limbeck.data import TensorSource

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


MEAN, DEVIATION = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def cifar10_images(count: int, split: str = "train", standardised: bool = True, size: int = 16) -> TensorSource:
    """The first images of `$LIMBECK_DATA/cifar10/SPLIT.parquet` at 16 or 32 pixels, standardised, or in [0, 1]."""
    table = parquet.read_table(Path(os.environ["LIMBECK_DATA"]) / "cifar10" / f"{split}.parquet").slice(0, count)
    image, label = (next(c for c in table.column_names if part in c) for part in ("im", "label"))
    pixels = [np.asarray(Image.open(io.BytesIO(value["bytes"]))) for value in table[image].to_pylist()]
    x = F.avg_pool2d(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, 32 // size)
    if standardised:
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, DEVIATION))
        x = (x - mean) / std
    return TensorSource(x, torch.tensor(table[label].to_pylist()), classes=CLASSES)
