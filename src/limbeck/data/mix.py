"""Batches of images whose styles are mixed."""

import torch
from torch import Tensor

from limbeck.core.errors import UsageError

_EPS = 1e-6


def symmetric_beta(
    alpha: float, size: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws of Beta(alpha, alpha), from uniform ones (Devroye 1996, Random Variate Generation in One Line of Code).

    Args:
        alpha: Above 0; far below 1 most draws are near 0 or 1.
        size: Number of draws.
        generator: Where the draws come from, on that device.
        device: Where they go.

    Returns:
        Numbers in [0, 1] `[size]`.

    Example:
        >>> draws = symmetric_beta(0.1, 1000, generator=torch.Generator().manual_seed(0))
        >>> 0.45 < draws.mean() < 0.55, (draws - 0.5).abs().median() > 0.49
        (tensor(True), tensor(True))
    """
    u, v, side = torch.rand(3, size, generator=generator, device=device)
    spread = (u ** (-1 / alpha) - 1) * (2 * torch.pi * v).cos().square()
    return 0.5 + 0.5 * (side - 0.5).sign() * (1 + 1 / spread).rsqrt()


def mix_distribution(
    x: Tensor,
    *,
    alpha: float = 0.1,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    partner: Tensor | None = None,
) -> Tensor:
    r"""MixDistribution: each image takes on part of the mean and contrast, channel by channel, of another image of the batch.

    $\tilde x = \frac{x - \mu}{\sigma} (\lambda \sigma + (1 - \lambda) \sigma') + \lambda \mu + (1 - \lambda) \mu'$, with the
    mean and standard deviation of each channel of the image and of its partner, and $\lambda$ of Beta(alpha, alpha): the step
    of MixStyle (Zhou et al. 2021) on pixels, as KD^3 does it (Tang et al. 2023). Values may leave the range of the input.

    Args:
        x: Images `[B, C, H, W]` with two pixels or more; normalised or not, as the step commutes with scaling channels.
        alpha: Above 0; the smaller, the more often an image keeps its style or takes the other's whole.
        generator: Draws the weights and the partners, on the device of `x`.
        weight: `lambda` of each image `[B]`, in place of a draw.
        partner: Row of each image's partner `[B]`, in place of a permutation that is drawn.

    Returns:
        Images like `x`.

    Raises:
        UsageError: Not images, or alpha is not above 0.

    Example:
        >>> x = torch.rand(4, 3, 8, 8)
        >>> torch.allclose(mix_distribution(x, weight=torch.ones(4)), x, atol=1e-6)
        True
    """
    if x.ndim != 4 or x.shape[2] * x.shape[3] < 2 or not x.is_floating_point():
        found, expected = f"{x.dtype} {list(x.shape)}", "floating-point images [B, C, H, W] of two pixels or more"
        raise UsageError("styles are those of images", where="mix_distribution", found=found, expected=expected)
    if alpha <= 0:
        raise UsageError("alpha is out of range", where="mix_distribution", found=alpha, expected="above 0")
    if weight is None:
        weight = symmetric_beta(alpha, len(x), generator=generator, device=x.device)
    if partner is None:
        partner = torch.randperm(len(x), generator=generator, device=x.device)
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)  # [B, C, 1, 1]
    deviation = (variance + _EPS).sqrt()
    weight = weight.to(x.dtype).view(-1, 1, 1, 1)
    scale = weight * deviation + (1 - weight) * deviation[partner]
    return (x - mean) / deviation * scale + weight * mean + (1 - weight) * mean[partner]
