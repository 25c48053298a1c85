"""The class-conditional EDM of ImageNet at 64 x 64 pixels (296 M parameters) as a denoiser, a smaller student, and the images.

    python recipes/imagenet64.py edm_imagenet64_ema.pt

takes the file that was published with consistency models (Song et al. 2023), and writes `weights/edm-imagenet64.safetensors`
beside this file.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from limbeck.data import Data, DatasetSource, TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import EDM, EDMDenoiser

HERE = Path(__file__).parent / "weights"


class Labelled(nn.Module):
    """A UNet under the preconditioning of EDM, whose times are a thousand times as large."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Any:
        """What the UNet predicts for images `[B, 3, H, W]`, `ln(sigma) / 4` `[B]` and class labels `[B]` (default: the first)."""
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        return self.unet(x, 1000 * time, class_labels=labels).sample


def denoiser(width: int = 192, layers: int = 3, classes: int = 1000) -> nn.Module:
    """The structure of Dhariwal and Nichol 2021, four resolutions, attention at the lower three."""
    groups = min(32, width)
    unet = UNet2DModel(
        sample_size=64, in_channels=3, out_channels=3, layers_per_block=layers, num_class_embeds=classes,
        block_out_channels=(width, 2 * width, 3 * width, 4 * width), attention_head_dim=min(64, width),
        down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3), downsample_type="resnet",
        up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"), upsample_type="resnet",
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=groups, norm_num_groups=groups,
    )  # fmt: skip
    return EDMDenoiser(Labelled(unet), EDM())


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it."""
    return denoiser()


def student() -> nn.Module:
    """Two thirds of the width: 55 % fewer parameters."""
    return denoiser(128)


def noise() -> Data:
    """Noise for the thousand classes in turn."""
    return Data(train=Noise((3, 64, 64), 50_000, classes=1000))


def images() -> Data:
    """The training images, a folder for each class, between -1 and 1."""
    folder = Path("data/imagenet64/train")
    if not folder.is_dir():
        warnings.warn(f"{folder} is not there: two images of noise for each class are taken", stacklevel=2)
        x = torch.randint(0, 256, (2000, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        names = [str(c) for c in range(1000)]
        return Data(train=TensorSource(x / 127.5 - 1, torch.arange(2000) % 1000, classes=names))
    steps = [transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    return Data(train=DatasetSource(ImageFolder(folder, transforms.Compose(steps)), views=1))


def main() -> None:
    """Bring the published file into the names of diffusers."""
    from limbeck.export.safetensors import save
    from limbeck.models.adm import load_adm

    model: Any = teacher()
    load_adm(model.net.unet, sys.argv[1])
    HERE.mkdir(exist_ok=True)
    save(model, HERE / "edm-imagenet64.safetensors")


if __name__ == "__main__":
    main()
