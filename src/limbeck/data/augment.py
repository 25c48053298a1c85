"""Augmentation that can be differentiated, as a function of keys: the same keys give the same views, anywhere."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.ids import mix, numbers, uniforms

Mix = Literal["none", "mixup", "cutmix"]
DSA = ("color", "shift", "cutout", "flip", "scale", "rotate")


def augment(x: Tensor, keys: Tensor, operations: Sequence[str] = ("shift",)) -> Tensor:
    """Views of images; gradients reach the images.

    `flip` left and right by half; `shift` by up to an eighth of the size, zeros coming in; `roll` as much, cyclic; `crop` a part
    of 8 to 100 % of the area, resized; `cutout` a square of half the size; `scale` by up to 1.2 and `rotate` by up to 15
    degrees; `color` brightness, saturation and contrast, as in differentiable siamese augmentation (Zhao and Bilen 2021), whose
    six operations are `DSA`. All in turn are its `aug_mode` M; `dsa` is one of the six, drawn by the key: mode S, which the
    published codes of DSA, MTT and FTD take.

    Args:
        x: Images `[B, C, H, W]`.
        keys: int64 `[B]`, or `[1]` for one draw for all images (siamese).
        operations: Names, in the order in which they are done.

    Raises:
        UsageError: There is no such operation.

    Example:
        >>> x = torch.rand(4, 1, 8, 8)
        >>> a, b = augment(x, torch.arange(4), DSA), augment(x[2:], torch.tensor([2, 3]), DSA)
        >>> a[2:].equal(b)
        True
    """
    for name in operations:
        if name not in _OPERATIONS and name != "dsa":
            known = ", ".join((*_OPERATIONS, "dsa"))
            raise UsageError("there is no such augmentation", where="augment", found=name, expected=known)
        keys = keys.expand(len(x)) if len(keys) == 1 else keys
        x = _one_of_six(x, keys) if name == "dsa" else _done(name, x, keys)
    return x


def _done(name: str, x: Tensor, keys: Tensor) -> Tensor:
    u = uniforms(mix(keys + zlib.crc32(name.encode())), 4).to(x.device, x.dtype)  # [B, 4]
    return _OPERATIONS[name](x, u)


def _one_of_six(x: Tensor, keys: Tensor) -> Tensor:
    """Each image by the operation that its key draws; those that none draws are not computed."""
    which = (len(DSA) * uniforms(mix(keys + zlib.crc32(b"dsa")), 1)[:, 0]).long()  # [B]
    drawn = sorted(set(numbers(which))) if keys.device.type == "cpu" else range(len(DSA))
    found = x
    for k in drawn:
        there = _done(DSA[k], x, keys)
        found = there if len(drawn) == 1 else torch.where((which == k).to(x.device).view(-1, 1, 1, 1), there, found)
    return found


@dataclass(frozen=True)
class Mixing:
    """How the samples of a batch are mixed in pairs: `share x + (1 - share) x[partner]`, or a box of the partner's pixels.

    Args:
        partner: A permutation of the batch `[B]`.
        share: Of the sample itself, in [0, 1].
        box: Top, bottom, left, right of what comes from the partner; None mixes all pixels.
    """

    partner: Tensor
    share: float
    box: tuple[int, int, int, int] | None = None

    def samples(self, x: Tensor) -> Tensor:
        """Mixed samples `[B, ...]`."""
        if self.box is None:
            return self.share * x + (1 - self.share) * x[self.partner]
        top, bottom, left, right = self.box
        inside = torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
        inside[top:bottom, left:right] = True
        return torch.where(inside, x[self.partner], x)

    def targets(self, z: Tensor) -> Tensor:
        """Mixed targets `[B, C]`: one-hot labels, probabilities or logits."""
        return self.share * z + (1 - self.share) * z[self.partner]


@dataclass(frozen=True)
class Views:
    """What a training sees of a small data set, epoch by epoch: order, augmentation and mixing as functions of (seed, epoch).

    Labels that are given to such views can be stored without them, and are right for whoever goes through them again.

    Args:
        batch_size: Samples of a batch, at most all.
        operations: Names of augmentations, see `augment`.
        mixing: `none`, `mixup` or `cutmix`.
        alpha: Of the Beta distribution of shares.
        seed: Of everything.
        least: A last batch of fewer samples joins the one before.

    Example:
        >>> views = Views(batch_size=2, operations=("flip",), mixing="mixup")
        >>> rows = [rows.tolist() for rows, _ in views.epoch(0, 5)]
        >>> [len(r) for r in rows], sorted(sum(rows, []))
        ([2, 3], [0, 1, 2, 3, 4])
    """

    batch_size: int = 64
    operations: tuple[str, ...] = ()
    mixing: Mix = "none"
    alpha: float = 1.0
    seed: int = 0
    least: int = 2

    def epoch(
        self, epoch: int, count: int
    ) -> Iterator[tuple[Tensor, Callable[[Tensor], tuple[Tensor, Mixing | None]]]]:
        """Batches of an epoch over `count` samples: rows `[B]`, and what makes their images `[B, ...]` views."""
        rng = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch])
        order = torch.from_numpy(rng.permutation(count))
        parts = list(order.split(min(self.batch_size, count)))
        if len(parts) > 1 and len(parts[-1]) < self.least:
            parts[-2:] = [torch.cat(parts[-2:])]
        for rows in parts:
            base = mix(mix(torch.tensor([(self.seed << 20) + epoch])) + rows)
            mixing = self._mixing(rng, len(rows))
            yield rows, _Seen(self.operations, base, mixing)

    def _mixing(self, rng: np.random.Generator, count: int) -> _Draw | None:
        if self.mixing == "none":
            return None
        partner = torch.from_numpy(rng.permutation(count))
        return _Draw(partner, float(rng.beta(self.alpha, self.alpha)), self.mixing, rng.random(2))


@dataclass(frozen=True)
class _Draw:
    partner: Tensor
    share: float
    kind: Mix
    centre: np.ndarray

    def on(self, x: Tensor) -> Mixing:
        if self.kind == "mixup" or x.ndim < 4:
            return Mixing(self.partner, self.share)
        h, w = x.shape[-2:]
        cut = math.sqrt(1 - self.share)
        y, left = self.centre[0] * h, self.centre[1] * w
        box = tuple(int(np.clip(round(c + s * n * cut / 2), 0, n)) for c, n in ((y, h), (left, w)) for s in (-1, 1))
        area = (box[1] - box[0]) * (box[3] - box[2]) / (h * w)
        return Mixing(self.partner, 1 - area, box)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Seen:
    operations: tuple[str, ...]
    keys: Tensor
    draw: _Draw | None

    def __call__(self, x: Tensor) -> tuple[Tensor, Mixing | None]:
        x = augment(x, self.keys, self.operations)
        if self.draw is None:
            return x, None
        mixing = self.draw.on(x)
        return mixing.samples(x), mixing


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)


def _moved(x: Tensor, u: Tensor, cyclic: bool) -> Tensor:
    """Whole pixels up to an eighth of the size, at least one."""
    h, w = x.shape[-2:]
    reach = max(1, round(max(h, w) / 8))
    dy, dx = ((2 * reach + 1) * u[:, :2]).floor().sub(reach).long().unbind(1)
    rows, columns = torch.arange(h, device=x.device) + dy[:, None], torch.arange(w, device=x.device) + dx[:, None]
    found = _gather(x, rows % h, columns % w)
    if cyclic:
        return found
    inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((columns >= 0) & (columns < w))[:, None, None, :]
    return found * inside


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels at rows `[B, H]` and columns `[B, W]`."""
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    top, left = (u[:, 0] * h).floor() - h // 4, (u[:, 1] * w).floor() - w // 4
    y, z = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    inside_y = (y >= top[:, None]) & (y < top[:, None] + h // 2)
    inside_x = (z >= left[:, None]) & (z < left[:, None] + w // 2)
    return x * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])


def _affine(x: Tensor, matrix: Tensor, padding: str = "zeros") -> Tensor:
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    sizes = 1 / 1.2 + (1.2 - 1 / 1.2) * u[:, :2]
    zero = torch.zeros_like(sizes[:, 0])
    rows = [torch.stack([sizes[:, 0], zero, zero], 1), torch.stack([zero, sizes[:, 1], zero], 1)]
    return _affine(x, torch.stack(rows, 1))


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = math.radians(15) * (2 * u[:, 0] - 1)
    zero = torch.zeros_like(angle)
    rows = [torch.stack([angle.cos(), -angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)]
    return _affine(x, torch.stack(rows, 1))


def _crop(x: Tensor, u: Tensor) -> Tensor:
    area, ratio = 0.08 + 0.92 * u[:, 0], (4 / 3) ** (2 * u[:, 1] - 1)
    height, width = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
    y, z = (1 - height) * (2 * u[:, 2] - 1), (1 - width) * (2 * u[:, 3] - 1)
    zero = torch.zeros_like(y)
    rows = [torch.stack([width, zero, z], 1), torch.stack([zero, height, y], 1)]
    return _affine(x, torch.stack(rows, 1), "border")


def _color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, saturation, contrast, by the ranges of the authors' code (1, 2 and 0.5)."""
    bright, saturation, contrast = (v.view(-1, 1, 1, 1) for v in u[:, :3].unbind(1))
    x = x + (bright - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


_OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "roll": lambda x, u: _moved(x, u, cyclic=True),
    "rotate": _rotate,
    "scale": _scale,
    "shift": lambda x, u: _moved(x, u, cyclic=False),
}
