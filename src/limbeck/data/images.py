"""Images in files or bytes, decoded when they are asked for, and the transforms that go with them."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError, require
from limbeck.data.ids import digest

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SMALL = 64  # pixels up to which images are cropped after padding, as is usual for CIFAR
_HEADERS = 2000
_ENDS = 2048


class Images:
    """A map-style data set of PIL images in RGB, with labels where there are any.

    Args:
        items: Paths, or the bytes of image files.
        ids: Sample ids `[N]`.
        labels: Class numbers `[N]`.
        classes: Class names.
        where: The file or folder, for messages.
    """

    def __init__(
        self,
        items: Sequence[Any],
        ids: Tensor,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
        where: str = "images",
    ) -> None:
        self.items, self.labels, self.classes, self.where = items, labels, classes, where
        self.ids = ids

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        image = self.open(row)
        return image if self.labels is None else (image, self.labels[row])

    def open(self, row: int) -> Any:
        """The decoded image; a `UsageError` names it where it cannot be read."""
        from PIL import Image

        item = self.items[row]
        try:
            with Image.open(item if isinstance(item, str | os.PathLike) else io.BytesIO(item)) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._unreadable(row, error) from None

    def subset(self, rows: Tensor) -> "Images":
        """The images at some positions."""
        labels = None if self.labels is None else self.labels[rows]
        return Images(_Picked(self.items, rows), self.ids[rows], labels, self.classes, self.where)

    def check(self) -> tuple[int, int]:
        """Open the headers of up to 2000 evenly spaced images; returns the first one's width and height.

        Raises:
            UsageError: A file is missing or is no image; names it.
        """
        image = require("PIL.Image", extra="vision")
        first = (0, 0)
        count = len(self)
        for row in range(0, count, -(-count // _HEADERS)):
            item = self.items[row]
            try:
                with image.open(item if isinstance(item, str | os.PathLike) else io.BytesIO(item)) as head:
                    first = first if row else head.size
            except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
                raise self._unreadable(row, error) from None
        return first

    def fingerprint(self) -> str:
        """Of ids, labels and the sizes of files."""
        sizes = (str(os.path.getsize(i) if isinstance(i, str | os.PathLike) else len(i)) for i in self.items)
        return digest("images", self.ids, " ".join(sizes), *(() if self.labels is None else (self.labels,)))

    def _unreadable(self, row: int, error: Exception) -> UsageError:
        item = self.items[row]
        name = item if isinstance(item, str | os.PathLike) else f"{self.where}, row {row}"
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'cannot be decoded'}"
        return UsageError("an image cannot be read", where=name, found=reason, fix="repair it or take it out")


class _Picked(Sequence[Any]):
    """Some items of another sequence, looked up when asked for."""

    def __init__(self, items: Sequence[Any], rows: Tensor) -> None:
        self.items, self.rows = items, rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        return self.items[self.rows[row]]


class Normalise(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel: `(x - mean) / std`.

    Args:
        mean: One number for each channel, for pixels in [0, 1].
        std: One number above 0 for each channel.

    Example:
        >>> Normalise([0.5], [0.25])(torch.ones(2, 1, 4, 4)).unique().tolist()
        [2.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise UsageError("mean and std do not fit", where="normalise", found=f"{mean}, {std}", expected="std > 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, x: Any) -> Any:
        """Images `[..., C, H, W]` in [0, 1], normalised; of a mapping, its `pixel_values`."""
        if isinstance(x, Mapping):
            return {**x, "pixel_values": self(x["pixel_values"])}
        if x.ndim < 3 or x.shape[-3] != len(self.mean):
            found, expected = tuple(x.shape), f"[..., {len(self.mean)}, H, W]"
            raise UsageError("the input has other channels than the model", where="x", found=found, expected=expected)
        if self.mean.device != x.device:
            self.to(x.device)
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def extra_repr(self) -> str:
        """The numbers."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalise(mean: Sequence[float], std: Sequence[float]) -> Normalise:
    """A module that normalises images: see `Normalise`."""
    return Normalise(mean, std)


def image_transform(size: int, augment: bool) -> Callable[[Any], Tensor]:
    """The usual transform of PIL images to tensors `[3, size, size]` in [0, 1], made of torchvision's v2 transforms.

    Args:
        size: Pixels of a side.
        augment: Whether the image is cropped and flipped at random: a crop of 8 % to 100 % of the area that is resized, or
            up to 64 pixels a crop after padding by an eighth. Otherwise the centre of the image resized by 256/224 is
            taken, or up to 64 pixels of the resized image.

    Example:
        >>> from PIL import Image
        >>> image_transform(32, augment=False)(Image.new("RGB", (40, 50))).shape
        torch.Size([3, 32, 32])
    """
    v2: Any = require("torchvision.transforms.v2", extra="vision")
    if augment and size <= SMALL:
        steps = [
            v2.Resize(size),
            v2.CenterCrop(size),
            v2.RandomCrop(size, padding=size // 8),
            v2.RandomHorizontalFlip(),
        ]
    elif augment:
        steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(size if size <= SMALL else size * 8 // 7), v2.CenterCrop(size)]
    return v2.Compose([*steps, pixels])


def pixels(image: Any) -> Tensor:
    """A PIL image as float32 `[C, H, W]` in [0, 1].

    Example:
        >>> from PIL import Image
        >>> pixels(Image.new("L", (3, 2), 255)).shape
        torch.Size([1, 2, 3])
    """
    image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    values = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)  # [H, W, C]
    return values.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def blob_key(blob: bytes | memoryview) -> bytes:
    """The first and last 2 kB of an image file and its length: enough to tell images apart without reading all of it."""
    return bytes(blob[:_ENDS]) + bytes(blob[-_ENDS:]) + len(blob).to_bytes(8, "little")
