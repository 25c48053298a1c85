"""Images with their texts, for models with two encoders, and the prompts by which such models name classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.data.ids import digest
from limbeck.data.sources import Rows
from limbeck.data.text import TextSource


class ImageText(Rows):
    """Pairs of an image and its text, made of a source of images and one of texts in the same order.

    Batches have `x = {"pixel_values": [B, C, H, W], "input_ids": [B, L], "attention_mask": [B, L]}`, the arguments of
    transformers' dual encoders; ids, views and labels are those of the images.

    Args:
        images: The images, with labels where there are classes.
        texts: A text for each image.
        prompts: A text for each class, for `limbeck.evaluate.ZeroShot`.

    Raises:
        UsageError: Images and texts are not as many.

    Example:
        >>> from limbeck.data import TensorSource
        >>> def letters(texts):
        ...     return {"input_ids": [[ord(c) for c in t] for t in texts]}
        >>> pairs = ImageText(TensorSource(torch.zeros(2, 3, 8, 8)), TextSource(["a cat", "dogs"], letters))
        >>> {name: tuple(value.shape) for name, value in pairs.batch(torch.tensor([0, 1]), 0).x.items()}
        {'pixel_values': (2, 3, 8, 8), 'input_ids': (2, 5), 'attention_mask': (2, 5)}
    """

    def __init__(self, images: Any, texts: TextSource, prompts: TextSource | None = None) -> None:
        if len(images) != len(texts):
            found = f"{len(images)} images, {len(texts)} texts"
            raise UsageError("images and texts are no pairs", where="data", found=found, expected="one text per image")
        self.images, self.captions, self.prompts = images, texts, prompts
        self.ids: Tensor = images.ids
        self.views = images.views
        self.labels, self.classes = getattr(images, "labels", None), getattr(images, "classes", None)

    def subset(self, rows: Tensor | Sequence[int]) -> ImageText:
        """The pairs at positions `rows` `[M]`, in that order."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return ImageText(self.images.subset(rows), self.captions.subset(rows), self.prompts)

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The pairs at positions `rows` `[B]`."""
        batch = self.images.batch(rows, view)
        return batch.replace(x={"pixel_values": batch.x, **self.captions.batch(rows, view).x})

    def fingerprint(self) -> str:
        """Of images and texts."""
        return digest(self.images.fingerprint(), self.captions.fingerprint())


def captioned(
    images: Any, template: str, classes: Sequence[str], tokenizer: Callable[..., Any], **options: Any
) -> ImageText:
    """Labelled images with the names of their classes as texts.

    Args:
        images: A source with labels.
        template: With one `{}`, where the name stands: `"a photo of a {}."`.
        classes: Names in the order of the labels.
        tokenizer: See `TextSource`.
        **options: Of `TextSource`.

    Raises:
        UsageError: There are no labels, or the template has no place for the name.

    Example:
        >>> from limbeck.data import TensorSource
        >>> def letters(texts):
        ...     return {"input_ids": [[ord(c) for c in t] for t in texts]}
        >>> images = TensorSource(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 1]))
        >>> captioned(images, "a {}", ["cat", "dog"], letters).captions.texts
        ['a cat', 'a dog', 'a dog']
    """
    if template.count("{}") != 1:
        raise UsageError(
            "the template has no place for the class", where="data.prompt", found=template, expected="one {}"
        )
    if getattr(images, "labels", None) is None:
        raise UsageError("prompts need labelled images", where="data.prompt", found=repr(images))
    texts = [template.format(name) for name in classes]
    own = [texts[label] for label in images.labels.tolist()]
    ids = torch.arange(len(own))
    return ImageText(
        images,
        TextSource(own, tokenizer, ids=ids, **options),
        TextSource(texts, tokenizer, ids=torch.arange(len(texts)), **options),
    )
