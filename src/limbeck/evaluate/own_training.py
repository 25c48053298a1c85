"""A network trained on a condensed set by a run, with what the set holds: `limbeck distill --data condensed:FOLDER`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.recipe import plain
from limbeck.core.roles import Roles
from limbeck.core.stages import Stage, Train
from limbeck.data.condensed import Condensed, condensed_folder
from limbeck.data.condensed_graphs import check_readout
from limbeck.data.lessons import CondensedSource, SetsSource
from limbeck.evaluate.condensation import Training, lessons, taught

NAME = f"{__name__}:OwnTraining"


@dataclass(frozen=True)
class OwnTraining(Method):
    """A student that learns from a condensed set alone: `train_on`, and for graphs `train_on_sets`, as a run.

    Soft labels are learned at the set's temperature. Where they belong to views of their own, epoch by epoch, or where the set
    says how its samples are mixed, the batches are the set's; else they are the run's. Sets of trees are drawn by their counts.

    Args:
        labels: `hard`, class numbers; `soft`, the set's own logits; None for soft ones where there are some.

    Example:
        >>> import torch
        >>> source = CondensedSource(Condensed(torch.eye(3), torch.arange(3), soft=4 * torch.eye(3)))
        >>> m = Roles(student=torch.nn.Identity())
        >>> OwnTraining().step(Training().resolved(source.condensed), m, source.batch(torch.arange(3), 0)).item() > 0
        True
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    logits: ClassVar[tuple[str, ...]] = ("student",)

    labels: Literal["hard", "soft"] | None = None

    def check_data(self, data: Any) -> None:
        """The data are a condensed set, with soft labels where these are asked for."""
        source = getattr(data, "train", None)
        if not isinstance(source, CondensedSource | SetsSource):
            raise UsageError(
                "these data are no condensed set", where="data", found=type(source).__name__,
                expected="condensed:FOLDER", fix="limbeck.evaluate.baselines:Supervised trains on labels of any data",
            )  # fmt: skip
        if isinstance(source, CondensedSource):
            self.how(source)
        elif self.labels == "soft":
            raise UsageError("condensed graphs have no soft labels", where="labels", found="soft", expected="hard")

    def how(self, source: CondensedSource) -> Training:
        """The training, with what the set says."""
        return Training.own(source.condensed, labels=self.labels).resolved(source.condensed)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """One training."""
        source = data.train
        if isinstance(source, SetsSource):
            check_readout(m.student.module)
            yield Train(self.on_sets, roles={"student": None}, data=source.drawn)
            return
        how = self.how(source)
        own = (how.labels == "soft" and source.condensed.soft.ndim == 3) or "training" in source.condensed.info
        seen = lessons(source.condensed, how, m.seed) if own else source
        yield Train(partial(self.step, how), roles={"student": None}, data=seen)

    def step(self, how: Training, m: Roles, batch: Batch) -> Tensor:  # type: ignore[override]
        """The loss of `train_on`."""
        target = batch.get("target", batch.get("soft") if how.labels == "soft" else None)
        if target is None:
            return F.cross_entropy(m.student(batch), batch.y)
        return taught(m.student, batch.x, target, how)

    def on_sets(self, m: Roles, batch: Batch) -> Tensor:
        """Cross-entropy on sets of trees."""
        return F.cross_entropy(m.student(batch), batch.y)


def own_settings(data: Any, engine: Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a recipe says of a training on condensed data where its author does not: steps, and the student's optimizer.

    Args:
        data: `condensed:FOLDER`, or a mapping with such a `spec`.
        engine: What is said of the engine.
        overrides: `field.path=value` that come later.

    Returns:
        `engine` and `optim` of a recipe.
    """
    spec = data["spec"] if isinstance(data, Mapping) else data
    path, said = str(spec).partition(":")[2], {text.partition("=")[0] for text in overrides}
    steps = not {"epochs", "steps"} & set(engine) and not {"engine.epochs", "engine.steps"} & said
    optim = Optim("adam", lr=0.01)  # that of `train_on_sets`
    if condensed_folder(path) is not None:
        small = Condensed.load(path)
        optim = Training.own(small).resolved(small).optim or optim
    return {
        "engine": {**engine, **({"steps": Training.steps} if steps else {})},
        "optim": {"student": plain(optim)},
    }
