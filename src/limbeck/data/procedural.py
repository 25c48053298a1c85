"""Data sets that are drawn from a seed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.data.data import Data
from limbeck.data.image_text import ImageText
from limbeck.data.sources import TensorSource
from limbeck.data.text import TextSource

SUPER, CLASSES, LATENT = 8, 40, 24
CLASS_OFFSET, NOISE = 0.55, 0.75


def superclasses(seed: int = 0, per_class: int = 60) -> Data:
    r"""40 classes in 8 super-classes of 5, so that a teacher ranks the wrong classes with reason.

    A class's centre in 24 dimensions is its super-class's centre, `N(0, 1)`, plus an offset `N(0, 0.55^2)`; a sample is
    the centre plus noise `N(0, 0.75^2)`, shown as $x = [\tanh(zW), \sin z] \in R^{48}$ with a fixed $W$ of
    `N(0, 1 / 24)`. Class `c` belongs to super-class `c // 5`.

    Args:
        seed: Seed of centres, map and samples.
        per_class: Samples of each class in each split.

    Returns:
        `train`, `validation` and `test` with `x` `[40 * per_class, 48]` and `y` in 0 .. 39.

    Example:
        >>> data = superclasses(per_class=2)
        >>> len(data.train), data.num_classes, data.train.batch(torch.tensor([0]), view=0).x.shape
        (80, 40, torch.Size([1, 48]))
    """
    g = torch.Generator().manual_seed(seed)
    parents = torch.randn(SUPER, LATENT, generator=g).repeat_interleave(CLASSES // SUPER, dim=0)  # [40, 24]
    centres = parents + CLASS_OFFSET * torch.randn(CLASSES, LATENT, generator=g)
    mixing = torch.randn(LATENT, LATENT, generator=g) / math.sqrt(LATENT)
    y = torch.arange(CLASSES).repeat_interleave(per_class)
    names = [f"{c // (CLASSES // SUPER)}.{c % (CLASSES // SUPER)}" for c in range(CLASSES)]

    def draw() -> Tensor:
        z = centres[y] + NOISE * torch.randn(len(y), LATENT, generator=g)  # [40 * per_class, 24]
        return torch.cat([torch.tanh(z @ mixing), torch.sin(z)], dim=1)

    return Data(**{split: TensorSource(draw(), y, classes=names) for split in ("train", "validation", "test")})


def concepts(seed: int, *counts: int) -> list[tuple[Tensor, Tensor]]:
    r"""Points in which four concepts are mixed, each with eight values: tasks on them are related as far as concepts are.

    A point is four codes of 6 dimensions, one for the value of each concept, `N(0, 1.2^2)` once for all points, plus noise
    `N(0, 0.6^2)`, turned by a random rotation R and bent: $x = \tanh(zR) \in R^{24}$.

    Args:
        seed: Seed of codes, rotation and points.
        *counts: Points of each set that is drawn.

    Returns:
        For each count, `x` `[N, 24]` and the values of the concepts `[N, 4]` in 0 .. 7.

    Example:
        >>> (x, values), (other, _) = concepts(0, 5, 3)
        >>> x.shape, values.shape, other.shape
        (torch.Size([5, 24]), torch.Size([5, 4]), torch.Size([3, 24]))
    """
    g = torch.Generator().manual_seed(seed)
    codes = 1.2 * torch.randn(4, 8, 6, generator=g)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=g)).Q
    found = []
    for count in counts:
        values = torch.randint(0, 8, (count, 4), generator=g)
        z = codes[torch.arange(4), values] + 0.6 * torch.randn(count, 4, 6, generator=g)  # [N, 4, 6]
        found.append((torch.tanh(z.flatten(1) @ rotation), values))
    return found


_SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
_COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "pink": (1, 0, 1),
    "white": (1, 1, 1),
}
_PLACES = ("left", "middle", "right")
_TEMPLATES = ("a {} {} on the {}", "the {} {} at {}", "picture of one {} {} , {}")
_WORDS = ("[end]", "[pad]", *_SHAPES, *_COLOURS, *_PLACES, *sorted({w for t in _TEMPLATES for w in t.split()} - {"{}"}))


def words(texts: Sequence[str]) -> dict[str, list[list[int]]]:
    """The tokens of captions of `shapes`: one per word, and a mark of the end.

    Example:
        >>> words(["a red circle on the left"])
        {'input_ids': [[18, 8, 2, 21, 24, 14, 0]]}
    """
    return {"input_ids": [[*(_WORDS.index(word) for word in text.split()), 0] for text in texts]}


def shapes(seed: int = 0, count: int = 4000, held_out: int = 600, size: int = 24) -> Data:
    """Images of one coloured shape each with captions; some combinations are held out, so that their prompts are zero-shot.

    A combination is one of 6 shapes, 6 colours and 3 places; 72 are in `train`, 18 each in `validation` and `test`. Size and
    exact place vary, and pixels have noise `N(0, 0.25^2)`. Captions follow one of three templates; prompts the first.

    Args:
        seed: Seed of everything that is drawn.
        count: Pairs to train on.
        held_out: Pairs of each of the other splits.
        size: Pixels of a side.

    Returns:
        `ImageText` sources whose classes are their combinations; prompts of held-out splits name their own 18.

    Example:
        >>> data = shapes(count=64, held_out=36)
        >>> data.test.batch(torch.arange(2), 0).x["pixel_values"].shape, data.test.prompts.texts[0]
        (torch.Size([2, 3, 24, 24]), 'a pink diamond on the middle')
    """
    g = torch.Generator().manual_seed(seed)
    combinations = [(s, c, p) for s in range(6) for c in range(6) for p in range(3)]
    order = torch.randperm(len(combinations), generator=g).tolist()
    parts = {"train": (order[:72], count), "validation": (order[72:90], held_out), "test": (order[90:], held_out)}
    sources, first = {}, 0
    for split, (members, number) in parts.items():
        y = torch.arange(number) % len(members)
        chosen = [combinations[k] for k in members]
        names = [_TEMPLATES[0].format(list(_COLOURS)[c], _SHAPES[s], _PLACES[p]) for s, c, p in chosen]
        styles = torch.randint(0, len(_TEMPLATES), (number,), generator=g).tolist()
        texts = []
        for label, style in zip(y.tolist(), styles, strict=True):
            s, c, p = chosen[label]
            texts.append(_TEMPLATES[style].format(list(_COLOURS)[c], _SHAPES[s], _PLACES[p]))
        ids = torch.arange(first, first + number)
        images = TensorSource(_draw(torch.tensor(chosen)[y], size, g), y, ids, classes=names)
        prompts = TextSource(names, words, ids=torch.arange(len(names)))
        sources[split] = ImageText(images, TextSource(texts, words, ids=ids), prompts)
        first += number
    return Data(**sources)


def _draw(chosen: Tensor, size: int, g: torch.Generator) -> Tensor:
    """Images `[N, 3, size, size]` of combinations `[N, 3]`."""
    n = len(chosen)
    radius = size * (0.13 + 0.05 * torch.rand(n, generator=g)).view(-1, 1, 1)
    jitter = size * 0.06 * (2 * torch.rand(2, n, generator=g) - 1)
    centre = size * (chosen[:, 2] + 0.6) / 3.2 + jitter[0]
    x = torch.arange(size).float().view(1, 1, -1) - centre.view(-1, 1, 1)
    y = torch.arange(size).float().view(1, -1, 1) - (size / 2 + 2 * jitter[1]).view(-1, 1, 1)
    far, most, least = (x * x + y * y).sqrt(), torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    masks = torch.stack([
        far < radius,
        most < 0.85 * radius,
        (y < 0.8 * radius) & (2 * x.abs() < y + radius),
        (least < 0.3 * radius) & (most < radius),
        (far < 1.1 * radius) & (far > 0.6 * radius),
        x.abs() + y.abs() < 1.15 * radius,
    ], dim=1)  # fmt: skip
    mask = masks[torch.arange(n), chosen[:, 0]].float()  # [N, size, size]
    colour = torch.tensor(list(_COLOURS.values()), dtype=torch.float32)[chosen[:, 1]]
    return mask[:, None] * colour[:, :, None, None] + 0.25 * torch.randn(n, 3, size, size, generator=g)
