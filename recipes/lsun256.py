"""The EDMs of LSUN at 256 x 256 pixels (526 M parameters), of bedrooms or of cats, as denoisers, and noise as data.

    python recipes/lsun256.py edm_bedroom256_ema.pt

takes a file that was published with consistency models (Song et al. 2023), `edm_bedroom256_ema.pt` or `edm_cat256_ema.pt`, and
writes it beside this file as `weights/edm_bedroom256_ema.safetensors`.
"""

import sys
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import nn

from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import EDMDenoiser

HERE = Path(__file__).parent / "weights"


def denoiser(width: int = 256, layers: int = 2) -> nn.Module:
    """The structure of Dhariwal and Nichol 2021: six resolutions, attention at the lower three, no classes."""
    groups = min(32, width)
    unet = UNet2DModel(
        sample_size=256, in_channels=3, out_channels=3, layers_per_block=layers, attention_head_dim=min(64, width),
        block_out_channels=(width, width, 2 * width, 2 * width, 4 * width, 4 * width),
        down_block_types=(*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3), downsample_type="resnet",
        up_block_types=(*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3), upsample_type="resnet",
        attn_norm_num_groups=groups, norm_num_groups=groups,
    )  # fmt: skip
    return EDMDenoiser(unet, time_scale=1000)


def teacher() -> nn.Module:
    """The structure, with random weights; `@FILE` fills it."""
    return denoiser()


def noise() -> Data:
    """Noise alone."""
    return Data(train=Noise((3, 256, 256), 50_000))


def main() -> None:
    """Bring a published file into the names of diffusers."""
    from limbeck.export.safetensors import save
    from limbeck.models.adm import load_adm

    model: Any = teacher()
    load_adm(model.net, sys.argv[1])
    HERE.mkdir(exist_ok=True)
    save(model, HERE / f"{Path(sys.argv[1]).stem}.safetensors")


if __name__ == "__main__":
    main()
