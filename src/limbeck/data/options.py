"""How data are read: the `data:` block of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from limbeck.core.errors import UsageError


@dataclass(frozen=True)
class DataOptions:
    """The fields of the `data:` block of a recipe, beside `spec`.

    Args:
        text: Text column, or two for pairs of texts. Default: found by name.
        label: Label column. Default: found by name.
        image: Image column. Default: the first that holds images.
        features: Columns of numbers. Default: all but the label, where there is no text and no image.
        columns: Names of the columns of a file without a line of names.
        classes: Class names in the order of their numbers. Default: what the data say, else sorted.
        image_size: Pixels of a side. Default: the first image's shorter side, at most 224.
        augment: Whether training images are cropped and flipped at random.
        views: Number of augmentation seeds; 0 for a new one every epoch. Storing a teacher's outputs needs 1 or more.
        max_length: Tokens of a text that are kept; None keeps what the tokenizer allows.
        block_size: Tokens of a block, for causal language models: `.txt` files are one long text, cut into blocks.
        tokenizer: Of that text, and of texts that go with images: the name of one of transformers. Default: bytes.
        prompt: Template of a class as a text, such as `"a photo of a {}."`: labelled images become pairs with texts, for models
            of images and texts. Tables that name both `image` and `text` are pairs without it.
        validation: Share of the training samples that becomes the validation split where there is none, in [0, 1).
        test: Share that becomes the test split where there is one split only, in [0, 1).
        unlabelled: Further samples without labels, named like `spec`: they become the split `unlabelled`.
        held_out: For `condensed:FOLDER`: data named like `spec`, divided like those, whose test samples judge what is trained on
            the set; of data that are not divided (`validation` and `test` 0), all. Default: those of the run that made it.
        seed: Seed of the division, the augmentation, and data that are drawn.
    """

    text: str | tuple[str, str] | None = None
    label: str | None = None
    image: str | None = None
    features: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    image_size: int | None = None
    augment: bool = True
    views: int = 0
    max_length: int | None = None
    block_size: int | None = None
    tokenizer: str | None = None
    prompt: str | None = None
    validation: float = 0.1
    test: float = 0.1
    unlabelled: str | None = None
    held_out: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shares = self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1
        size = self.image_size is None or self.image_size > 0
        length = self.max_length is None or self.max_length > 0
        for name, ok, expected in [
            ("validation", shares, "validation and test are 0 or more and together below 1"),
            ("image_size", size, "1 or more"),
            ("views", self.views >= 0, "0 or more"),
            ("max_length", length, "1 or more"),
            ("block_size", self.block_size is None or self.block_size > 1, "2 or more"),
        ]:
            if not ok:
                found = getattr(self, name)
                raise UsageError(f"{name} is out of range", where=f"data.{name}", found=found, expected=expected)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> DataOptions:
        """Options from a recipe's plain data; an unknown field is an error that names near ones.

        Example:
            >>> DataOptions.of({"text": ["premise", "hypothesis"]}).text
            ('premise', 'hypothesis')
        """
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                near = get_close_matches(name, names, n=3, cutoff=0.5) or names
                raise UsageError("unknown field", where=f"data.{name}", found=name, expected=" or ".join(near))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(**values)
