"""The convolutional network of the condensing papers, for CIFAR-10."""

from torch import nn

from limbeck.nn.convnet import ConvNet


def convnet(num_classes: int = 10) -> nn.Module:
    """Three blocks of 128 channels with instance normalisation, for 32 x 32 images."""
    return ConvNet(num_classes, channels=3, size=32, width=128, depth=3)
