"""Small tables and images with a protected attribute, and autoencoders of them."""

import torch

from limbeck.data import TensorSource
from limbeck.nn.vae import ImageVAE, TableVAE

SIZES = (2, 3, 2)


def net(hidden=8, seed=0):
    torch.manual_seed(seed)
    return TableVAE(SIZES, 2, latent=3, hidden=hidden, decoder_hidden=8)


def rows(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (n,), generator=g) for size in SIZES], 1)
    return codes, torch.randint(2, (n,), generator=g)


def source(n=60):
    codes, groups = rows(n)
    return TensorSource(net().one_hot(codes), groups, torch.arange(n))


def eye(hidden=8, seed=0, classes=2):
    torch.manual_seed(seed)
    return ImageVAE(
        (2, 4, 4), classes, latent=3, channels=(4,), hidden=hidden, decoder_channels=(4, 4), decoder_hidden=8
    )


def images(n=60, classes=2):
    """Shades of 0 or 1, the target, in the channel of the group."""
    g = torch.Generator().manual_seed(0)
    groups, targets = (torch.randint(k, (n,), generator=g) for k in (2, classes))
    x = torch.rand(n, 2, 4, 4, generator=g) * torch.nn.functional.one_hot(groups, 2)[:, :, None, None]
    x[:, :, :2] *= targets[:, None, None, None] / (classes - 1)
    return TensorSource({"image": x, "target": targets}, groups, torch.arange(n))
