"""CelebA (Liu et al. 2015): 202,599 faces at 64 x 64 pixels, whether they smile, and their sex, which is protected.

Put the files of the data set into `data/celeba/`, as torchvision's `CelebA` reads them. Without them drawn images stand in.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CelebA

from limbeck.data import Data, DatasetSource, TensorSource
from limbeck.data.ids import text_ids
from limbeck.nn.vae import ImageVAE

FOLDER = Path("data")
PROTECTED, TARGET, SIZE = "Male", "Smiling", 64


class Faces(Dataset[Any]):
    """Images with the target beside them, and the protected attribute as label."""

    def __init__(self, split: str) -> None:
        steps = [transforms.CenterCrop(178), transforms.Resize(SIZE), transforms.ToTensor()]
        self.faces = CelebA(str(FOLDER), split, "attr", transform=transforms.Compose(steps))
        self.labels, self.targets = (self.faces.attr[:, self.faces.attr_names.index(n)] for n in (PROTECTED, TARGET))

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, row: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"image": self.faces[row][0], "target": self.targets[row]}, self.labels[row]


def data() -> Data:
    """The data set's own three parts."""
    if not (FOLDER / "celeba").is_dir():
        warnings.warn(f"{FOLDER}/celeba is not there: drawn images are taken", stacklevel=2)
        return Data(train=_drawn(512, 0), validation=_drawn(64, 1), test=_drawn(64, 2))
    parts = {"train": Faces("train"), "validation": Faces("valid"), "test": Faces("test")}
    sources = {k: DatasetSource(f, views=1, ids=text_ids(f.faces.filename)) for k, f in parts.items()}
    return Data(**sources)


def teacher() -> nn.Module:
    """The autoencoder of FairDisCo for images: 32, 32, 64 and 64 channels, 256 units."""
    return ImageVAE((3, SIZE, SIZE), latent=32)


def student() -> nn.Module:
    """An encoder of half the channels and a quarter of the units."""
    return ImageVAE((3, SIZE, SIZE), latent=32, channels=(16, 16, 32, 32), hidden=64)


def _drawn(count: int, seed: int) -> TensorSource:
    g = torch.Generator().manual_seed(seed)
    target, group = torch.randint(2, (2, count), generator=g)
    image = torch.rand(count, 3, SIZE, SIZE, generator=g)
    return TensorSource({"image": image, "target": target}, group, torch.arange(count) + 1000 * seed)
