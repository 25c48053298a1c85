"""Data without what they know of a group: a fair latent space, learned by a big encoder and handed to a small one."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.categorical import Columns, columns_of
from limbeck.data.ids import mix
from limbeck.data.synthetic import SyntheticImages, SyntheticTable
from limbeck.diffusion.draws import Draws
from limbeck.evaluate.fairness import synthesise
from limbeck.losses.independence import gaussian_kl, group_distance
from limbeck.methods.checks import check_field
from limbeck.nn.vae import ImageVAE, TableVAE


@dataclass(frozen=True)
class FairLatent(Method):
    """Fair synthetic data by distilling a fair representation (Sikder et al. 2024).

    The teacher, an autoencoder that is told the group, learns samples under a penalty on what its latent says of it (FairDisCo,
    Liu et al. 2022): `rec + kl_weight KL + fairness V^2`. Then a smaller encoder in front of the teacher's decoder learns the
    teacher's latent: `||mu' - mu||^2 + utility KL(teacher || student)`. Last, samples are drawn, with groups of their own.
    Batches have the group as label, and hold what the models read: rows, one-hot, with the target as one of the columns, for
    `TableVAE`; images with their class for `ImageVAE`. What comes out is a `SyntheticTable` or `SyntheticImages`.

    The paper does not tell the losses of the second stage in full, nor how the target is decoded; these are reconstructions
    (inferred).

    Args:
        fairness: Weight of the penalty.
        normalise: Whether the penalty is a share of `integral p(z)^2`, for weights of 1 to 100; without, as in the authors'
            code, the weight grows with the latents, 10^7 for 8.
        kl_weight: Of the distance of latents from the standard normal.
        utility: Weight of the divergence of the student's latent from the teacher's.
        teach_steps: Steps of the first stage; 0 takes the teacher as it is.
        label_decode: How the target is drawn: `marginal`, averaged over groups, or `literal`, as everything else.
        samples: How many to draw; 0 for as many as there are to learn from.

    Example:
        >>> net = lambda hidden: TableVAE((2, 2), latent=2, hidden=hidden)
        >>> m, x = Roles(teacher=net(8), student=net(4)), torch.eye(4)
        >>> batch = Batch(x=x, y=torch.tensor([0, 1, 0, 1]), id=torch.arange(4))
        >>> FairLatent().teach(m, batch).role, FairLatent().step(m, batch).role
        ('teacher', 'student')
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    makes: ClassVar[tuple[str, ...]] = ("teacher",)
    logits: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...] | None] = ()

    fairness: float = 20.0
    normalise: bool = True
    kl_weight: float = 1.0
    utility: float = 1.0
    teach_steps: int = 500
    label_decode: Literal["marginal", "literal"] = "marginal"
    samples: int = 0

    def __post_init__(self) -> None:
        for name in ("fairness", "kl_weight", "utility", "teach_steps", "samples"):
            check_field(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        known = ("marginal", "literal")
        check_field("label_decode", self.label_decode, self.label_decode in known, " | ".join(known))

    def check(self, m: Roles, batch: Batch) -> None:
        """Two models with one decoder and latent, and data that they read."""
        for name in ("teacher", "student"):
            if not isinstance(m[name].module, TableVAE | ImageVAE):
                raise UsageError(
                    "this is no autoencoder that is told a group", where=f"roles.{name}", found=type(m[name].module).__name__,
                    expected="limbeck.nn.vae.TableVAE or ImageVAE",
                )  # fmt: skip
        teacher: Any = m.teacher.module
        student: Any = m.student.module
        forms = [(model.form, [list(p.shape) for p in model.decoder.parameters()]) for model in (teacher, student)]
        if forms[0] != forms[1]:
            raise UsageError(
                "the teacher's decoder does not fit the student", where="roles.student", found=forms[1],
                expected=forms[0], fix="the same columns or shape, groups, latent and decoder",
            )  # fmt: skip
        teacher.check(batch.x)

    def check_data(self, data: Any) -> None:
        """There are two groups at least, and they are whole numbers."""
        groups = getattr(getattr(data, "train", None), "labels", None)
        if groups is None or groups.ndim != 1 or groups.is_floating_point() or len(groups.unique()) < 2:
            raise UsageError(
                "there are no groups to be fair to", where="data.train.y",
                found="none" if groups is None else f"{str(groups.dtype)[6:]}, {groups.unique().tolist()[:3]}",
                expected="the protected attribute, numbered, with two values or more",
            )  # fmt: skip

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """A fair teacher, a small encoder, samples."""
        _check_groups(m.teacher.module, data.train)
        if self.teach_steps:
            yield Train(self.teach, roles={"teacher": None}, data=data.train, steps=self.teach_steps, name="teach")
        yield Convert("student", TakeDecoder(m.teacher.module), name="take the teacher's decoder")
        yield Train(self.step, roles={"student": None}, frozen=self.frozen, data=data.train)
        yield Collect("synthetic", partial(self._synthetic, data.train))

    def teach(self, m: Roles, batch: Batch) -> Update:
        """One update of the teacher."""
        teacher: Any = m.teacher.module
        mean, logvar = teacher.encode(batch.x, batch.y)
        z = mean + (0.5 * logvar).exp() * Draws(m, batch).normal("latent", mean)
        fair = group_distance(mean, logvar, batch.y, teacher.groups, normalise=self.normalise)
        loss = teacher.reconstruction(teacher.decode(z, batch.y), batch.x)
        loss = loss + self.kl_weight * gaussian_kl(mean, logvar) + self.fairness * fair
        return Update("teacher", loss, logs={"group_distance": fair.detach()})

    def step(self, m: Roles, batch: Batch) -> Update:
        """One update of the small encoder."""
        teacher: Any = m.teacher.module
        student: Any = m.student.module
        with torch.no_grad():
            mean, logvar = teacher.encode(batch.x, batch.y)
        own, own_logvar = student.encode(batch.x, batch.y)
        quality = (own - mean).square().sum(1).mean()
        return Update("student", quality + self.utility * gaussian_kl(mean, logvar, own, own_logvar))

    def _synthetic(self, source: Any, m: Roles, folder: Path) -> dict[str, Any]:
        student: Any = m.student.module
        count = self.samples or len(source)
        order = mix(mix(source.ids) + m.seed).argsort()  # some rows are any rows, also of a file that is sorted
        made, groups = synthesise(
            student, source, order[torch.arange(count) % len(order)], m.seed, self.label_decode == "literal"
        )
        info = {"label_decode": self.label_decode, "seed": m.seed, "from_samples": len(source)}
        if isinstance(student, ImageVAE):
            SyntheticImages(made["image"], made["target"], groups, info).save(folder)
        else:
            columns = columns_of(source) or Columns.numbered(student.sizes, student.groups)
            SyntheticTable(columns, student.codes(made), groups, info).save(folder)
        return {"samples": count}


def _check_groups(teacher: Any, source: Any) -> None:
    highest = int(source.labels.max())
    if highest >= teacher.groups:
        raise UsageError(
            "there are more groups than the models know", where="roles.teacher", found=f"{teacher.groups} groups",
            expected=highest + 1, fix="give both models groups=...",
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class TakeDecoder:
    """A model with another one's decoder, which does not learn, as a conversion.

    Args:
        of: The other model.
    """

    of: nn.Module

    def __call__(self, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The model with a copy of the decoder, and the record that keeps it still."""
        made: Any = take_decoder(copy.deepcopy(module), {})
        other: Any = self.of
        made.decoder.load_state_dict({k: v.detach().clone() for k, v in other.decoder.state_dict().items()})
        return made, {"kind": f"{__name__}:take_decoder"}


def take_decoder(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """A model whose decoder does not learn."""
    model: Any = module
    model.decoder.requires_grad_(False)
    return module
