"""The images, the classifier and the networks of `fewstep.py`."""

from functools import cache

import torch
from shared_images import cifar10_images
from torch import Tensor, nn

from limbeck import Batch
from limbeck.data import TensorSource
from limbeck.diffusion import Denoiser, RectifiedFlow

CLASSES, FLOW = 10, RectifiedFlow()


class Judge(nn.Module):
    """A classifier of real images, in whose 32 features samples are compared."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 32),
        )  # fmt: skip
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits."""
        return self.fc(self.body(x).relu())


def digits_images() -> TensorSource:
    """scikit-learn's 1,797 digits `[1, 8, 8]`, from -1 to 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return TensorSource(torch.tensor(found.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(found.target))


@cache
def digits() -> list[TensorSource]:
    """Images to train, to tune and to test on."""
    source = digits_images()
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    return [source.subset(rows) for rows in order.split((1000, 297, 500))]


@cache
def cifar10() -> list[TensorSource]:
    """19,500 images of 32 pixels to train on, 500 to tune and 2,000 to test."""
    train = cifar10_images(20_000, size=32)
    learned, tuned = train.subset(torch.arange(19_500)), train.subset(torch.arange(19_500, 20_000))
    return [learned, tuned, cifar10_images(2000, split="test", size=32)]


def whole(source: TensorSource) -> Batch:
    """All of a source."""
    return source.batch(torch.arange(len(source)), 0)


def unet(size: int = 8, channels: int = 1, widths: tuple[int, ...] = (16, 32)) -> nn.Module:
    """A small U-Net of diffusers as the velocity of a flow; class 10 is the empty one."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths), up_block_types=("UpBlock2D",) * len(widths), norm_num_groups=8,
        add_attention=False, num_class_embeds=CLASSES + 1,
    )  # fmt: skip
    return Denoiser(net, FLOW, "flow_prediction", time_scale=999, null=CLASSES, keyword="class_labels")


def dit(size: int = 8, channels: int = 1, patch: int = 2, heads: int = 2, layers: int = 3) -> nn.Module:
    """A small DiT of diffusers, without its own dropping of classes, which draws from the global generator."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    net = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=24, in_channels=channels, out_channels=channels, num_layers=layers,
        sample_size=size, patch_size=patch, num_embeds_ada_norm=CLASSES, norm_num_groups=1,
    )  # fmt: skip
    for part in net.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0
    return Denoiser(net, FLOW, "flow_prediction", time_scale=999, null=CLASSES, keyword="class_labels")
