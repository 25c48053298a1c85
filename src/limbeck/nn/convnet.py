"""The convolutional network that data-set distillation is judged on."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from limbeck.core.errors import UsageError

Norm = Literal["instance", "batch", "none"]


class ConvNet(nn.Module):
    """Blocks of convolution 3 x 3, normalisation, ReLU and average pooling by 2, and a linear layer (Gidaris and Komodakis 2018).

    Args:
        classes: Outputs.
        channels: Of the images.
        size: Pixels of a side; each block halves it.
        width: Channels of each block.
        depth: Blocks: 3 for 32 pixels, 4 for 64, 5 for 128 are usual.
        norm: `instance` (a group for each channel, with scale and shift), `batch`, or `none`.

    Raises:
        UsageError: The images are too small for so many blocks.

    Example:
        >>> import torch
        >>> ConvNet(10, channels=1, size=8, width=16, depth=2)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self, classes: int, channels: int = 3, size: int = 32, width: int = 128, depth: int = 3, norm: Norm = "instance"
    ) -> None:
        super().__init__()
        if size >> depth < 1:
            raise UsageError(
                "the images are too small", where="size", found=size, expected=f">= {2**depth} for {depth} blocks"
            )
        layers: list[nn.Module] = []
        for k in range(depth):
            layers.append(nn.Conv2d(width if k else channels, width, 3, padding=1))
            if norm != "none":
                layers.append(nn.GroupNorm(width, width) if norm == "instance" else nn.BatchNorm2d(width))
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, C, H, W]`."""
        return self.classifier(self.features(x))
