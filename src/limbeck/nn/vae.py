"""Variational autoencoders of tables and images, told of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import UsageError


class TableVAE(nn.Module):
    """Rows of categorical columns as one-hot vectors side by side, a latent, and back (FairDisCo, Liu et al. 2022).

    Args:
        sizes: Categories of each column.
        groups: Values of the protected attribute, which encoder and decoder are told.
        latent: Z.
        hidden: Units of the encoder.
        decoder_hidden: Units of the decoder; a smaller encoder goes with a decoder of the same size.
        target: The column that is predicted downstream.

    Example:
        >>> net = TableVAE((2, 3), groups=2, latent=4, hidden=8)
        >>> x = net.one_hot(torch.tensor([[0, 2], [1, 1]]))
        >>> mean, logvar = net.encode(x, torch.tensor([0, 1]))
        >>> mean.shape, [part.shape[1] for part in net.columns(net.decode(mean, torch.tensor([0, 1])))]
        (torch.Size([2, 4]), [2, 3])
    """

    def __init__(
        self, sizes: Sequence[int], groups: int = 2, latent: int = 8, hidden: int = 64, decoder_hidden: int = 64,
        target: int = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes, self.groups, self.latent = tuple(sizes), groups, latent
        self.target = target % len(self.sizes)
        self.classes, self.draws = self.sizes[self.target], len(self.sizes)
        width = sum(self.sizes)
        self.encoder = nn.Sequential(nn.Linear(width + groups, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent + groups, decoder_hidden), nn.ReLU(), nn.Linear(decoder_hidden, width)
        )

    @property
    def form(self) -> dict[str, Any]:
        """What models must have in common to share a decoder."""
        return {"sizes": self.sizes, "groups": self.groups, "latent": self.latent, "target": self.target}

    def check(self, x: Tensor) -> None:
        """Raise a `UsageError` for rows that are none of this table."""
        if not isinstance(x, Tensor) or x.shape[1:] != (sum(self.sizes),):
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UsageError("rows do not fit the models", where="data", found=found, expected=sum(self.sizes))
        if type(x) is Tensor and not bool((self.one_hot(self.codes(x)) == x).all()):  # fake tensors have no values
            raise UsageError(
                "rows are not one-hot", where="data", found="other numbers than 0 and 1", expected="one category a column",
                fix="limbeck.data.categorical.table_data puts numbers into bins",
            )  # fmt: skip

    def one_hot(self, codes: Tensor) -> Tensor:
        """Rows of category numbers `[B, F]` as `[B, sum of sizes]`."""
        return torch.cat([F.one_hot(c, n) for c, n in zip(codes.unbind(1), self.sizes, strict=True)], 1).float()

    def codes(self, x: Tensor) -> Tensor:
        """One-hot rows as category numbers `[B, F]`."""
        return torch.stack([part.argmax(1) for part in self.columns(x)], 1)

    def columns(self, x: Tensor) -> list[Tensor]:
        """The part of each column `[B, size]`."""
        return list(x.split(list(self.sizes), dim=1))

    def divided(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a classifier sees of rows `[B, D]`, and the class it is to tell `[B]`."""
        parts = self.columns(x)
        target = parts.pop(self.target)
        return torch.cat(parts, 1), target.argmax(1)

    def encode(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance `[B, Z]` of the latent, the latter within [-8, 8]."""
        mean, logvar = self.encoder(torch.cat([x, _one_hot(group, self.groups, x)], 1)).chunk(2, 1)
        return mean, logvar.clamp(-8, 8)

    def decode(self, z: Tensor, group: Tensor) -> Tensor:
        """Logits of all categories `[B, sum of sizes]`."""
        return self.decoder(torch.cat([z, _one_hot(group, self.groups, z)], 1))

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """Logits at the mean of the latent; without groups, of group 0."""
        group = torch.zeros(len(x), dtype=torch.int64, device=x.device) if group is None else group
        return self.decode(self.encode(x, group)[0], group)

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropies of all columns, added up; the mean over rows."""
        pairs = zip(self.columns(logits), self.columns(x), strict=True)
        return torch.stack([F.cross_entropy(found, true) for found, true in pairs]).sum()

    def target_logits(self, logits: Tensor) -> Tensor:
        """Those of the target `[B, K]`."""
        return self.columns(logits)[self.target]

    def draw(self, logits: Tensor, target: Tensor, u: Tensor) -> Tensor:
        """Rows, one-hot.

        Args:
            logits: As `decode` gives them.
            target: Probabilities of the target `[B, K]`, in the place of the decoder's.
            u: Uniform numbers `[B, draws]`, one for each column.
        """
        parts = [part.softmax(1) for part in self.columns(logits)]
        parts[self.target] = target
        return self.one_hot(torch.stack([_drawn(p, own) for p, own in zip(parts, u.unbind(1), strict=True)], 1))


class ImageVAE(nn.Module):
    """Images and their class, a latent, and back; the decoder is told a group, the encoder is not (FairDisCo, Liu et al. 2022).

    Inputs are mappings: `image` `[B, C, H, W]` within [0, 1] and `target`, class numbers `[B]`. The class goes into the latent
    and comes out of it beside the image, as the target of a table does (inferred).

    Args:
        shape: Of an image, `(C, H, W)`.
        classes: Of the target.
        groups: Values of the protected attribute, which the decoder is told.
        latent: Z.
        channels: Of the encoder's convolutions, each of which halves the image.
        hidden: Units of the encoder.
        decoder_channels: Of the decoder's transposed convolutions, from the small image on.
        decoder_hidden: Units of the decoder.

    Raises:
        UsageError: The image cannot be halved so often.

    Example:
        >>> net = ImageVAE((3, 8, 8), latent=4, channels=(8,), hidden=16, decoder_channels=(8, 8), decoder_hidden=16)
        >>> x = {"image": torch.rand(2, 3, 8, 8), "target": torch.tensor([0, 1])}
        >>> mean, logvar = net.encode(x)
        >>> {name: t.shape for name, t in net.decode(mean, torch.tensor([0, 1])).items()}
        {'image': torch.Size([2, 3, 8, 8]), 'target': torch.Size([2, 2])}
    """

    draws = 1

    def __init__(
        self, shape: Sequence[int], classes: int = 2, groups: int = 2, latent: int = 32,
        channels: Sequence[int] = (32, 32, 64, 64), hidden: int = 256,
        decoder_channels: Sequence[int] = (64, 64, 32, 32), decoder_hidden: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape, self.classes, self.groups, self.latent = tuple(shape), classes, groups, latent
        self.encoder = _ImageEncoder(self.shape, classes, latent, channels, hidden)
        self.decoder = _ImageDecoder(self.shape, classes, latent + groups, decoder_channels, decoder_hidden)

    @property
    def form(self) -> dict[str, Any]:
        """What models must have in common to share a decoder."""
        return {"shape": self.shape, "classes": self.classes, "groups": self.groups, "latent": self.latent}

    def check(self, x: Mapping[str, Tensor]) -> None:
        """Raise a `UsageError` for inputs that are no such images with a class."""
        named = {k: list(t.shape[1:]) for k, t in x.items()} if isinstance(x, Mapping) else type(x).__name__
        expected = {"image": list(self.shape), "target": []}
        if named != expected:
            raise UsageError("images do not fit the models", where="data", found=named, expected=expected)
        image, target = x["image"], x["target"]
        if type(image) is not Tensor:  # fake tensors have no values
            return
        for name, t, highest in (("image", image, 1), ("target", target, self.classes - 1)):
            low, high = t.aminmax()
            if low < 0 or high > highest:
                found = f"{float(low):g} to {float(high):g}"
                raise UsageError(
                    "values are out of range", where=f"data, {name}", found=found, expected=f"0 to {highest}"
                )

    def divided(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What a classifier sees, all pixels `[B, D]`, and the class it is to tell `[B]`."""
        return x["image"].flatten(1), x["target"]

    def encode(self, x: Mapping[str, Tensor], group: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance `[B, Z]` of the latent, the latter within [-8, 8]; the group is not looked at."""
        mean, logvar = self.encoder(x["image"], _one_hot(x["target"], self.classes, x["image"])).chunk(2, 1)
        return mean, logvar.clamp(-8, 8)

    def decode(self, z: Tensor, group: Tensor) -> dict[str, Tensor]:
        """Logits of the pixels, `image` `[B, C, H, W]`, and of the class, `target` `[B, K]`."""
        return self.decoder(torch.cat([z, _one_hot(group, self.groups, z)], 1))

    def forward(self, image: Tensor, target: Tensor, group: Tensor | None = None) -> Tensor:
        """Logits of the pixels at the mean of the latent; without groups, of group 0."""
        group = torch.zeros_like(target) if group is None else group
        return self.decode(self.encode({"image": image, "target": target})[0], group)["image"]

    def reconstruction(self, logits: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """Binary cross-entropies of all pixels, added up, and the cross-entropy of the class; the mean over images."""
        pixels = F.binary_cross_entropy_with_logits(logits["image"], x["image"], reduction="sum") / len(x["image"])
        return pixels + F.cross_entropy(logits["target"], x["target"])

    def target_logits(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Those of the class `[B, K]`."""
        return logits["target"]

    def draw(self, logits: Mapping[str, Tensor], target: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Images at the decoder's mean, with classes drawn from `target` `[B, K]` by uniform numbers `u` `[B, 1]`."""
        return {"image": logits["image"].sigmoid(), "target": _drawn(target, u[:, 0])}


class _ImageEncoder(nn.Module):
    def __init__(self, shape: Sequence[int], classes: int, latent: int, channels: Sequence[int], hidden: int) -> None:
        super().__init__()
        pairs = zip((shape[0], *channels[:-1]), channels, strict=True)
        self.features = nn.Sequential(
            *(part for c, k in pairs for part in (nn.Conv2d(c, k, 4, 2, 1), nn.ReLU())), nn.Flatten()
        )
        width = channels[-1] * _halved(shape, len(channels)).numel()
        self.latent = nn.Sequential(nn.Linear(width + classes, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.latent(torch.cat([self.features(image), target], 1))


class _ImageDecoder(nn.Module):
    def __init__(self, shape: Sequence[int], classes: int, inputs: int, channels: Sequence[int], hidden: int) -> None:
        super().__init__()
        small = (channels[0], *_halved(shape, len(channels)))
        self.hidden = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU())
        pairs = zip(channels, (*channels[1:], shape[0]), strict=True)
        grown = (part for c, k in pairs for part in (nn.ReLU(), nn.ConvTranspose2d(c, k, 4, 2, 1)))
        self.image = nn.Sequential(nn.Linear(hidden, torch.Size(small).numel()), nn.Unflatten(1, small), *grown)
        self.target = nn.Linear(hidden, classes)

    def forward(self, told: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(told)
        return {"image": self.image(hidden), "target": self.target(hidden)}


def _halved(shape: Sequence[int], times: int) -> torch.Size:
    if any(side % 2**times for side in shape[1:]):
        raise UsageError(
            "the image cannot be halved so often", where="shape", found=list(shape),
            expected=f"sides that are multiples of {2**times} for {times} convolutions",
        )  # fmt: skip
    return torch.Size(side >> times for side in shape[1:])


def _one_hot(numbers: Tensor, count: int, like: Tensor) -> Tensor:
    return F.one_hot(numbers.long(), count).to(like.dtype)


def _drawn(probabilities: Tensor, u: Tensor) -> Tensor:
    """Numbers `[B]` of categories of probabilities `[B, K]`."""
    return (probabilities.cumsum(1) < u[:, None]).sum(1).clamp(max=probabilities.shape[1] - 1)
