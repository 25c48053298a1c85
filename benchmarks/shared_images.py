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


def cifar10_images(count: int) -> TensorSource:
    """The first training images of `$LIMBECK_DATA/cifar10/train.parquet` at 16 pixels, standardised."""
    table = parquet.read_table(Path(os.environ["LIMBECK_DATA"]) / "cifar10" / "train.parquet").slice(0, count)
    image, label = (next(c for c in table.column_names if part in c) for part in ("im", "label"))
    pixels = [np.asarray(Image.open(io.BytesIO(value["bytes"]))) for value in table[image].to_pylist()]
    x = F.avg_pool2d(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, 2)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)))
    return TensorSource((x - mean) / std, torch.tensor(table[label].to_pylist()), classes=CLASSES)
