"""The residual networks for 32 x 32 images of He et al. 2016, section 4.2: 6n + 2 layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, C, H, W]` to `[B, C', H / stride, W / stride]`."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet(n: int, num_classes: int) -> nn.Sequential:
    """The network with three stages of `n` blocks each, 16, 32 and 64 channels wide."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16, *[16] * n, *[32] * n, *[64] * n]
    for i in range(3 * n):
        layers.append(Block(widths[i], widths[i + 1], 2 if i in (n, 2 * n) else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def resnet56(num_classes: int = 100) -> nn.Module:
    """56 layers, 0.86 M parameters."""
    return resnet(9, num_classes)


def resnet32(num_classes: int = 100) -> nn.Module:
    """32 layers, 0.47 M parameters."""
    return resnet(5, num_classes)


def resnet20(num_classes: int = 100) -> nn.Module:
    """20 layers, 0.28 M parameters."""
    return resnet(3, num_classes)
