"""Small data sets in the place of big ones."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.errors import UsageError, require
from limbeck.core.files import aside
from limbeck.core.source import Source
from limbeck.data.ids import mix
from limbeck.data.lessons import CondensedSource

NAME = "condensed"
_DATA, _NOTES = "condensed.safetensors", "condensed.json"
_PARTS = ("x", "y", "soft", "compensators", "composed", "step_size")


class Condensed(nn.Module):
    """A small labelled data set: what condensing methods make, and the role `student` while they do.

    Args:
        x: Samples `[n, ...]`, images or rows, as networks are to see them.
        y: Class numbers `[N]`, N = n without compensators.
        soft: Logits of teachers: `[N, C]`, or one table for each epoch of `info["views"]`, `[E, N, C]`; None for none.
        compensators: Additive images `[U, ...]` that several samples share (INFER); None for none.
        composed: `[N, 2]`: sample i is `x[a]`, plus `compensators[b]` where b is not -1, clipped to `info["clip"]`.
        step_size: The learning rate that belongs to the data, where it was learned with them.
        learn: Which of `x`, `compensators`, `step_size` require a gradient.
        info: Plain data: how it is to be trained on: `clip` (lowest and highest value, each a number or one for each channel),
            `views` (fields of `Views`), or `training`, those of a single table of labels, `temperature`, `classes`; and how it
            was made, `made`: method, its fields, seed, fingerprints of data and teachers, version, as a run writes it.

    Raises:
        UsageError: Sizes do not fit, or values are not finite.

    Example:
        >>> small = Condensed(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]))
        >>> small(torch.tensor([2])).shape, small.bytes()
        (torch.Size([1, 1, 8, 8]), {'x': 1024, 'y': 4})
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        soft: Tensor | None = None,
        compensators: Tensor | None = None,
        composed: Tensor | None = None,
        step_size: float | Tensor | None = None,
        learn: Sequence[str] = ("x",),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        count = len(x) if composed is None else len(composed)
        sizes = {"y": len(y)} | ({} if soft is None else {"soft": soft.shape[-2]})
        if any(size != count for size in sizes.values()) or not count:
            raise UsageError("labels and samples differ in number", where="condensed", found=sizes, expected=count)
        _check_finite({"x": x, "soft": soft, "compensators": compensators, "step_size": step_size})
        self.x = nn.Parameter(x.detach().clone(), requires_grad="x" in learn)
        self.compensators = _parameter(compensators, "compensators" in learn)
        self.step_size = _parameter(None if step_size is None else torch.as_tensor(step_size), "step_size" in learn)
        self.register_buffer("y", torch.as_tensor(y).to(torch.int64))
        self.register_buffer("soft", soft)
        self.register_buffer("composed", composed)
        self.info = dict(info or {})

    y: Tensor
    soft: Tensor | None
    composed: Tensor | None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """Classes, from the names or the labels."""
        return len(self.info.get("classes") or ()) or int(self.y.max()) + 1

    @property
    def images_per_class(self) -> int:
        """Samples of each class, as noted, or from the labels."""
        return self.info.get("images_per_class") or len(self.y) // self.num_classes

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """The samples `[N, ...]`, or those at `rows` `[B]`; gradients reach what is learned."""
        if self.composed is None:
            return self.x if rows is None else self.x[rows]
        base, added = (self.composed if rows is None else self.composed[rows]).unbind(1)
        x = self.x[base]
        if self.compensators is None:
            return x
        shape = (-1, *(1,) * (x.ndim - 1))
        summed = x + self.compensators[added.clamp_min(0)]
        return torch.where((added >= 0).view(shape), self.clipped(summed), x)

    def clipped(self, x: Tensor) -> Tensor:
        """Samples within `info["clip"]`, where there is one."""
        if self.info.get("clip") is None:
            return x
        shape = (-1, *(1,) * (x.ndim - 2)) if x.ndim > 2 else (-1,)
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device).view(shape) for bound in self.info["clip"])
        return x.clamp(low, high)

    def parts(self) -> dict[str, Tensor]:
        """What there is to store, by name."""
        named = {name: getattr(self, name) for name in _PARTS}
        found = {name: t.detach() for name, t in named.items() if t is not None}
        found["y"] = found["y"].to(torch.uint8 if int(self.y.max()) < 256 else torch.int32)
        if "composed" in found:
            found["composed"] = found["composed"].to(torch.int32)
        return found

    def bytes(self) -> dict[str, int]:
        """The true size of each part as it is stored: samples, labels, compensators."""
        return {name: t.numel() * t.element_size() for name, t in self.parts().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `condensed.safetensors` and `condensed.json` into a folder, whole or not at all.

        Raises:
            UsageError: Samples, soft labels, compensators or the step size are not finite.
        """
        _check_finite(self.parts())
        with aside(Path(path) / _NOTES) as scratch:
            save_file({name: t.contiguous() for name, t in self.parts().items()}, scratch.with_name(_DATA))
            learned = [name for name, p in self.named_parameters() if p.requires_grad]
            notes = {"format": 1, "learn": learned, "info": self.info, "bytes": self.bytes()}
            scratch.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Condensed:
        """Read the folder that `save` wrote, or that of the run which made it.

        Raises:
            UsageError: There is no condensed data set in the folder, it is damaged, or holds NaN.
        """
        folder = condensed_folder(path)
        if folder is None:
            raise UsageError("this folder holds no condensed data set", where=path, expected=f"{_DATA} and {_NOTES}")
        try:
            notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
            parts = load_file(folder / _DATA)
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError("this condensed data set is damaged", where=folder, found=error) from None
        return cls(**parts, learn=notes.get("learn", ()), info=notes.get("info", {}))

    def source(self) -> CondensedSource:
        """The samples with their class numbers and, where there is one table, soft labels, for a training of any kind."""
        return CondensedSource(self)

    def dataset(self) -> torch.utils.data.TensorDataset:
        """The same as a data set of torch: items `(x, y)`, or `(x, y, soft)` with logits `[C]`, or `[E, C]` of epochs."""
        more = () if self.soft is None else (self._by_sample,)
        return torch.utils.data.TensorDataset(self.source().x, self.y, *more)

    def hf(self) -> Any:
        """The same as a data set of Hugging Face: columns `x`, `label` and, of soft labels, `soft_label` (`[C]` or `[E, C]`)."""
        columns = {"x": self.source().x.numpy(), "label": self.y.numpy()}
        if self.soft is not None:
            columns["soft_label"] = self._by_sample.numpy()
        return require("datasets", extra="language").Dataset.from_dict({k: list(v) for k, v in columns.items()})

    @property
    def _by_sample(self) -> Tensor:
        """Soft labels with the samples first, `[N, C]` or `[N, E, C]`."""
        assert self.soft is not None
        return self.soft if self.soft.ndim == 2 else self.soft.transpose(0, 1)

    def __repr__(self) -> str:
        shape = [len(self), *self.x.shape[1:]]
        soft = "" if self.soft is None else f", soft labels {list(self.soft.shape)}"
        return f"Condensed({shape} of {self.num_classes} classes{soft}{told(self.info)})"

    def train(self, mode: bool | nn.Module = True, **training: Any) -> Any:
        """`condensed.train(network, steps=500)` trains a network on the data and returns it; see `train_on` and `Training.own`.

        With a Boolean it is what `train` is for any module.
        """
        if not isinstance(mode, nn.Module):
            return super().train(mode)
        from limbeck.evaluate.condensation import Training, train_on

        seed, given = training.pop("seed", 0), training.pop("training", None)
        return train_on(self, mode, given or Training.own(self, **training), seed, **(training if given else {}))


def told(info: Mapping[str, Any]) -> str:
    """How a set was made, for its `repr`; empty where it does not say."""
    made = info.get("made")
    return "" if not made else f", made by {made['method']}, seed {made['seed']}, limbeck {made['limbeck']}"


def _check_finite(parts: Mapping[str, Any]) -> None:
    for name, value in parts.items():
        t = value.detach() if isinstance(value, Tensor) else None if value is None else torch.as_tensor(value)
        if t is None or type(t) is not Tensor or t.is_meta or not t.is_floating_point():  # fake tensors have no values
            continue
        if not bool(t.isfinite().all()):
            what = "samples hold" if name == "x" else f"{name.replace('_', ' ')} of this set hold"
            raise UsageError(f"the {what} NaN or infinite values", where=f"condensed.{name}", fix="drop or mend them")


@dataclass(frozen=True, eq=False)
class Become:
    """Another condensed set in the place of one, as a conversion.

    Args:
        condensed: The other.

    Example:
        >>> small = Condensed(torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> Become(Condensed(small.x, small.y, step_size=0.1))(small)[0].step_size.item()
        0.10000000149011612
    """

    condensed: Condensed

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the set, and the record that makes one of its form."""
        named = {name: getattr(self.condensed, name) for name in _PARTS}
        forms = {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in named.items() if t is not None}
        learn = [name for name, p in self.condensed.named_parameters() if p.requires_grad]
        record = {"kind": f"{__name__}:become", "parts": forms, "learn": learn, "info": self.condensed.info}
        return copy.deepcopy(self.condensed), record


def become(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """A set of the form that a record tells, of zeros."""
    parts = {n: torch.zeros(shape, dtype=getattr(torch, kind)) for n, (shape, kind) in record["parts"].items()}
    return Condensed(**parts, learn=record["learn"], info=record["info"])


def from_source(source: Source, images_per_class: int, seed: int = 0, noise: bool = False) -> Condensed:
    """Random samples of each class, the same for the same seed and ids: where condensing starts, and what it is compared with.

    Args:
        source: Labelled samples.
        images_per_class: Samples of each class.
        seed: Of the choice.
        noise: Standard normal numbers in the place of the samples.

    Raises:
        UsageError: There are no labels, a class has too few samples, or values are not finite.

    Example:
        >>> from limbeck.data.sources import TensorSource
        >>> source = TensorSource(torch.rand(30, 4), torch.arange(30) % 3)
        >>> from_source(source, 2).y.tolist()
        [0, 0, 1, 1, 2, 2]
    """
    rows = per_class(source, images_per_class, seed)
    batch = source.batch(rows, 0)
    x = batch.x if isinstance(batch.x, Tensor) else None
    if x is None:
        raise UsageError("these samples cannot be condensed", where="data", found=repr(batch), expected="one tensor")
    if noise:
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    classes = getattr(source, "classes", None)
    info = {"images_per_class": images_per_class} | ({} if classes is None else {"classes": list(classes)})
    return Condensed(x, batch.y, info=info)


def per_class(source: Source, count: int, seed: int = 0) -> Tensor:
    """Rows of `count` random samples of each class `[C * count]`, class by class.

    Raises:
        UsageError: There are no labels, or a class has too few samples.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        raise UsageError(
            "condensing needs labels", where="data.train", found="none", expected="a class for each sample"
        )
    if count < 1:
        raise UsageError("images_per_class is out of range", where="images_per_class", found=count, expected=">= 1")
    classes = getattr(source, "num_classes", None) or int(labels.max()) + 1
    order = mix(mix(source.ids) + seed).argsort()
    rows = []
    for c in range(classes):
        own = order[labels[order] == c]
        if len(own) < count:
            raise UsageError(
                "a class has too few samples", where=f"data.train, class {c}", found=len(own), expected=f">= {count}",
                fix=f"ask for at most {len(own)} for each class" if len(own) else "leave the class out",
            )  # fmt: skip
        rows.append(own[:count])
    return torch.cat(rows)


def blank(shape: Sequence[int], classes: int, images_per_class: int) -> Condensed:
    """A set without values, where only sizes count: it takes no memory, however large it is."""
    y = torch.arange(classes).repeat_interleave(images_per_class)
    x = torch.empty(len(y), *shape, device="meta")
    return Condensed(x, y, info={"images_per_class": images_per_class})


def condensed_size(spec: str) -> int | None:
    """The samples of each class that a student's spec `condensed:N` asks for; None for other specs.

    Raises:
        UsageError: N is no number above 0.

    Example:
        >>> condensed_size("condensed:10"), condensed_size("copy")
        (10, None)
    """
    kind, _, number = spec.partition(":")
    if kind != NAME:
        return None
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(
            "this does not say how many samples of each class", where="student", found=spec, expected="condensed:10"
        )
    return int(number)


def condensed_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a condensed data set: this one, or the student of this run; None for others."""
    return next((p for p in (Path(path), Path(path) / "student") if (p / _NOTES).is_file()), None)


def _parameter(value: Tensor | None, learns: bool) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.detach().clone().float(), requires_grad=learns)
