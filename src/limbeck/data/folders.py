"""Folders: which files belong to which split, and images in one folder for each class."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from limbeck.core.errors import UsageError
from limbeck.data.ids import text_ids
from limbeck.data.images import Images, image_files
from limbeck.data.labels import is_learned

# The names that people give to splits.
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "devel"),
    "test": ("test", "testing"),
}
ALIASES = {alias: split for split, names in _ALIASES.items() for alias in names}


def split_name(name: str) -> str | None:
    """The split that a file or folder name stands for.

    Example:
        >>> split_name("val-00001-of-00004.parquet"), split_name("cats")
        ('validation', None)
    """
    return ALIASES.get(re.split(r"[^a-z]", name.lower())[0])


def split_files(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Files by split: a folder or the start of a file's name says which; all of them are `train` where none does.

    Example:
        >>> root = Path("data")
        >>> sorted(split_files([root / "train-0.csv", root / "dev.csv", root / "extra.csv"], root))
        ['extra', 'train', 'validation']
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(root).parts
        found.setdefault(next((s for part in parts if (s := split_name(part))), file.stem), []).append(file)
    return found if set(found) & set(_ALIASES) else {"train": list(files)}


def image_folder(root: Path) -> dict[str, Images]:
    """The images below a folder by split, with the names of the innermost-but-split folders as classes.

    `root/train/CLASS/*.png` beside `root/val/...`, or `root/CLASS/*.png` for one split. A split without class folders has
    no labels. Classes are numbered by the sorted names of the splits to learn from, see `is_learned`.

    Args:
        root: The folder.

    Raises:
        UsageError: No images, a class without images, or a class that the training split does not have.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = {split_name(p.name) or p.name: p for p in folders}
    if "train" not in splits:
        splits = {"train": root}
    classes = tuple(sorted({c for name, folder in splits.items() if is_learned(name) for c in _classes(folder)}))
    if len(classes) == 1:
        found, fix = f"the folder {classes[0]}", "images without classes lie in the folder itself"
        raise UsageError("the training images have one class only", where=splits["train"], found=found, fix=fix)
    return {name: _images(folder, root, classes) for name, folder in splits.items()}


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _images(folder: Path, root: Path, classes: tuple[str, ...]) -> Images:
    files = image_files(folder)
    if not files:
        some = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder"
        raise UsageError(
            "there are no images", where=folder, found=some, expected="image files in one folder per class"
        )
    ids = text_ids(file.relative_to(root).as_posix() for file in files)
    own = _classes(folder)
    if not own:
        return Images(files, ids, where=str(folder))
    number = {name: k for k, name in enumerate(classes)}
    if extra := [name for name in own if name not in number]:
        expected = f"the classes of the training images: {', '.join(classes[:10])}"
        raise UsageError(
            "a class is not in the training images", where=folder, found=", ".join(extra[:10]), expected=expected
        )
    tops = [file.relative_to(folder).parts[0] for file in files]
    if loose := [file for file, top in zip(files, tops, strict=True) if top not in number]:
        raise UsageError("images lie beside the class folders", where=loose[0], fix="move them into a class folder")
    if empty := set(own) - set(tops):
        raise UsageError("a class has no images", where=folder / min(empty), fix="add images or remove the folder")
    return Images(files, ids, torch.tensor([number[top] for top in tops]), classes, str(folder))
