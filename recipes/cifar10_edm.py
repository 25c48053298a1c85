"""A class-conditional EDM of CIFAR-10 (35 M parameters) as a denoiser, and noise or images as data.

    python recipes/cifar10_edm.py UNET

takes the folder of a UNet of diffusers that was trained under the preconditioning of EDM and writes
`weights/edm-cifar10.safetensors` beside this file. The networks that Karras et al. published have blocks of their own (another
order of the condition, attention in fewer places), which no class of diffusers holds, in pickles of their code: those files are
not read. Published EDMs that are: `imagenet64.py` and `lsun256.py`.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from limbeck.data import Data, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import EDM, EDMDenoiser
from limbeck.models.specs import import_object

HERE = Path(__file__).parent / "weights"
Labelled: Any = import_object(f"{Path(__file__).with_name('imagenet64.py')}:Labelled")


def denoiser(width: int = 128, layers: int = 2, classes: int = 10) -> nn.Module:
    """The structure of Ho et al. 2020: four resolutions, attention at 16 x 16 pixels."""
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=layers, num_class_embeds=classes,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width), attention_head_dim=2 * width,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_num_groups=min(32, width),
    )  # fmt: skip
    return EDMDenoiser(Labelled(unet), EDM())


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it."""
    return denoiser()


def noise() -> Data:
    """Noise for the ten classes in turn."""
    return Data(train=Noise((3, 32, 32), 50_000, classes=10))


def images() -> Data:
    """The training images with their classes, between -1 and 1."""
    folder = Path("data/cifar10")
    if not folder.is_dir():
        warnings.warn(f"{folder} is not there: twenty images of noise for each class are taken", stacklevel=2)
        x = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Data(train=TensorSource(x / 127.5 - 1, torch.arange(200) % 10, classes=list(map(str, range(10)))))
    from torchvision.datasets import CIFAR10

    known = CIFAR10(folder, train=True)
    x = torch.from_numpy(known.data).movedim(-1, 1) / 127.5 - 1  # [N, 3, 32, 32]
    return Data(train=TensorSource(x, torch.tensor(known.targets), classes=known.classes))


def main() -> None:
    """Bring the weights into one file."""
    from limbeck.export.safetensors import save

    model: Any = teacher()
    model.net.unet = UNet2DModel.from_pretrained(sys.argv[1])
    HERE.mkdir(exist_ok=True)
    save(model, HERE / "edm-cifar10.safetensors")


if __name__ == "__main__":
    main()
