"""Simple semi-supervised label distillation: a strong teacher, no labels, and a pool of further images."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.stages import Collect, Stage, Train
from limbeck.core.update import Update
from limbeck.data.combine import Concatenated
from limbeck.data.pool import is_images, near_duplicates, top_per_class
from limbeck.evaluate.tasks import predict
from limbeck.losses import jensen_shannon, kl, symmetric_kl
from limbeck.methods.checks import check_classes, check_field

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"code": symmetric_kl, "paper": jensen_shannon, "kl": kl}


@dataclass(frozen=True)
class SSLD(Method):
    r"""The student learns the teacher's probabilities on all images there are; labels are never read.

    $L = \frac{1}{2} [\mathrm{KL}(p_t \| p_s) + \mathrm{KL}(p_s \| p_t)]$ at temperature 1 (Cui et al. 2021), first on
    `data.train` and `data.unlabelled` together, then on `data.train` alone at a hundredth of the learning rate. Without
    `data.unlabelled` there is the first stage only. Images of the pool that are in the validation or test data too are left out.

    Args:
        images_per_class: From the pool, only so many images per class are taken, those that the teacher's probability of the
            class is highest for; None takes all.
        finetune_epochs: Passes over `data.train` in the second stage, 0 or more; 0 leaves it out. 30 in the paper, after 360.
        finetune_lr: Factor on the learning rate in the second stage, above 0.
        duplicates: Correlation with an image of the validation or test data above which one of the pool is left out, in
            (0, 1]; 1 compares nothing.
        variant: "code", the mean of the two KL divergences, which the official code calls Jensen-Shannon; "paper", the
            Jensen-Shannon divergence that the text names; "kl", which has the gradient of the soft cross-entropy that some
            of the official configurations use.

    Example:
        >>> m = Roles(teacher=torch.nn.Linear(4, 3), student=torch.nn.Linear(4, 3))
        >>> SSLD().step(m, Batch(x=torch.ones(2, 4))).role
        'student'
    """

    images_per_class: int | None = None
    finetune_epochs: float = 1.0
    finetune_lr: float = 0.01
    duplicates: float = 0.98
    variant: Literal["code", "paper", "kl"] = "code"

    def __post_init__(self) -> None:
        few = self.images_per_class
        check_field("images_per_class", few, few is None or few >= 1, "1 or more, or none for all")
        check_field("finetune_epochs", self.finetune_epochs, self.finetune_epochs >= 0, "0 or more")
        check_field("finetune_lr", self.finetune_lr, self.finetune_lr > 0, "above 0")
        check_field("duplicates", self.duplicates, 0 < self.duplicates <= 1, "a correlation in (0, 1]")
        check_field("variant", self.variant, self.variant in _LOSSES, " or ".join(_LOSSES))

    def check(self, m: Roles, batch: Batch) -> None:
        """Teacher and student have the same classes."""
        check_classes(m, batch, labels=False)

    def check_data(self, data: Any) -> None:
        """A choice per class is made from a pool, which has to be there."""
        if self.images_per_class is not None and "unlabelled" not in data:
            raise UsageError(
                "there is no pool to choose images from",
                where="data.unlabelled",
                found=f"images_per_class={self.images_per_class}, and data.train alone",
                expected="unlabelled images",
                fix="give a pool (--set data.unlabelled=FOLDER), or leave images_per_class out",
            )

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Choose from the pool, train on all, then on the training data alone."""
        roles, source = {"student": None}, data.train
        if "unlabelled" in data:
            everything = torch.arange(len(data.unlabelled))
            chosen = yield Collect("pool", lambda m, folder: self.choose(m, data, folder), example=everything)
            source = Concatenated(data.train, data.unlabelled.subset(chosen.value))
        yield Train(self.step, roles, self.frozen, source, name="train")
        if "unlabelled" in data and self.finetune_epochs > 0:
            yield Train(
                self.step,
                roles,
                self.frozen,
                data.train,
                epochs=self.finetune_epochs,
                lr_factor=self.finetune_lr,
                name="finetune",
            )

    def choose(self, m: Roles, data: Any, folder: Path | None = None) -> Tensor:
        """The positions of the images that are taken from the pool `[M]`; `pool.txt` in the folder says how many and why."""
        pool = data.unlabelled
        kept, judged = torch.arange(len(pool)), [data[name] for name in ("validation", "test") if name in data]
        if self.duplicates < 1 and judged and is_images(pool):
            kept = kept[~near_duplicates(pool, *judged, threshold=self.duplicates)]
        copies = len(pool) - len(kept)
        if self.images_per_class is not None:
            scores = predict(m.teacher, pool.subset(kept))[0].softmax(-1)  # [N, C]
            kept = kept[top_per_class(scores, self.images_per_class)]
        if not len(kept):
            raise UsageError(
                "nothing is left of the pool", where="data.unlabelled", found=f"{copies} copies of judged images"
            )
        if folder is not None:
            told = (
                f"{len(pool)} images in the pool\n{copies} are in the validation or test data too\n{len(kept)} taken\n"
            )
            (folder / "pool.txt").write_text(told, encoding="utf-8")
        return kept

    def step(self, m: Roles, batch: Batch) -> Update:
        """One update of the student."""
        with torch.no_grad():
            teacher = m.teacher(batch)  # [B, C]
        return Update("student", _LOSSES[self.variant](m.student(batch), teacher))
