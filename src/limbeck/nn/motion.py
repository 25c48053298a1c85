"""What of a video is motion: representations in which clips are compared, and a head that learns one (MCM, Zhai et al. 2024)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError

Motion = Literal["raw", "diff", "learn", "freql", "freqh"]
MOTIONS = ("raw", "diff", "learn", "freql", "freqh")


def motion_of(x: Tensor, kind: Motion, frames: int = 2) -> Tensor:
    """A clip in a representation of its motion; `learn` is `x` itself, as its head is a module.

    `raw`: the clip; `diff`: each frame less the one before; `freql`, `freqh`: its low and high frequencies in time and space,
    see `butterworth`, which add up to the clip.

    Args:
        x: Clips, time along axis `frames`, such as `[B, C, T, H, W]` with 2 or `[B, T, D]` with 1.
        kind: The representation.
        frames: The axis of time.

    Raises:
        UsageError: There is no such representation.

    Example:
        >>> motion_of(torch.tensor([[[1.0], [3.0], [3.0]]]), "diff", frames=1).flatten().tolist()
        [2.0, 0.0]
    """
    if kind not in MOTIONS:
        raise UsageError("there is no such motion", where="motion", found=kind, expected=" | ".join(MOTIONS))
    if kind == "diff":
        return x.diff(dim=frames)
    if kind in ("freql", "freqh"):
        low = butterworth(x, frames)
        return low if kind == "freql" else x - low
    return x


def butterworth(x: Tensor, frames: int = 2, order: int = 4, cut: float = 0.25) -> Tensor:
    """The low frequencies of clips along time and space, by a Butterworth filter `1 / (1 + (f / cut)^(2 n))`.

    Args:
        x: Clips; space is what comes after axis 2, where there is any.
        frames: The axis of time.
        order: `n`.
        cut: Where half is left, as a share of the highest frequency.

    Example:
        >>> still = torch.ones(1, 8, 2)
        >>> torch.allclose(butterworth(still, frames=1), still)
        True
    """
    axes = [frames, *range(3, x.ndim)]
    squared = torch.zeros(1, device=x.device)
    for axis in axes:
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        squared = squared + (2 * torch.fft.fftfreq(x.shape[axis], device=x.device)).square().view(shape)
    kept = 1 / (1 + (squared / cut**2) ** order)
    return torch.fft.ifftn(torch.fft.fftn(x.float(), dim=axes) * kept, dim=axes).real.to(x.dtype)


class SpatialHead(nn.Module):
    """A small network on each frame, which adds to it: the identity at first.

    `x + conv(...)`: SiLU, then `layers - 1` times convolution, GroupNorm, SiLU, then a convolution that begins at 0.

    Args:
        channels: Of a frame.
        frames: The axis of time.
        hidden: Channels inside.
        layers: Convolutions; 2 of size 1 is MCM's `learn`, 5 of size 3 its `hlearn`.
        kernel: Their size.
        groups: Of the norms.

    Example:
        >>> x = torch.randn(2, 4, 8, 5, 5)
        >>> SpatialHead(4)(x).equal(x)
        True
    """

    def __init__(
        self, channels: int, frames: int = 2, hidden: int = 64, layers: int = 2, kernel: int = 1, groups: int = 32
    ) -> None:
        super().__init__()
        self.frames = frames
        widths = [channels, *[hidden] * (layers - 1)]
        parts: list[nn.Module] = [nn.SiLU()]
        for a, b in pairwise(widths):
            parts += [nn.Conv2d(a, b, kernel, padding=kernel // 2), nn.GroupNorm(math.gcd(groups, b), b), nn.SiLU()]
        last = nn.Conv2d(widths[-1], channels, kernel, padding=kernel // 2)
        for p in last.parameters():
            nn.init.zeros_(p)
        self.net = nn.Sequential(*parts, last)

    def forward(self, x: Tensor) -> Tensor:
        """Clips in the shape of `x`; a frame is `[C]` or `[C, H, W]`."""
        parts = x.movedim(self.frames, 1)  # [B, T, C, ...]
        flat = parts.flatten(0, 1)
        flat = flat if flat.ndim == 4 else flat[:, :, None, None]
        return x + self.net(flat).view(parts.shape).movedim(1, self.frames)


def frames_at(x: Tensor, places: Tensor, frames: int = 2) -> Tensor:
    """Some frames of each clip, as samples of their own.

    Args:
        x: Clips `[B, ...]` with T frames along axis `frames`.
        places: Which frames `[B, n]`.
        frames: The axis of time.

    Returns:
        `[B n, ...]`, those of a clip next to each other.

    Example:
        >>> frames_at(torch.arange(6.0).view(2, 3, 1), torch.tensor([[0, 2], [1, 1]]), frames=1).flatten().tolist()
        [0.0, 2.0, 4.0, 4.0]
    """
    parts = x.movedim(frames, 1)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return parts[rows, places.to(x.device)].flatten(0, 1)
