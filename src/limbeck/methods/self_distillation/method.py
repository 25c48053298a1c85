"""Self-distillation guided by the labels: the same network, refitted on them and on its own last outputs."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.evaluate.tasks import predict
from limbeck.losses._reduce import check_labels
from limbeck.methods.checks import check_classes, check_field, outputs
from limbeck.methods.self_distillation.kernel import optimal_label_weight
from limbeck.methods.self_distillation.restart import Copy, Redraw
from limbeck.teachers import Cached


@dataclass(frozen=True)
class SelfDistillation(Method):
    r"""The student is trained from the beginning again and again, each time on the labels and on what it last said.

    $L = w\, \mathrm{MSE}(p, e) + (1 - w)\, \mathrm{MSE}(p, q)$ with the student's probabilities p, the labels as one-hot
    vectors e and the probabilities q of the generation before, the mean over samples and classes (Borup and Andersen 2021,
    whose code calls w alpha). Without labels (w = 0) each generation regularises more, to collapse in the end; with them the
    chain has a limit that is one fit with the penalty divided by w. See `limbeck.methods.self_distillation.kernel`.

    A role `teacher` is the first fit, if there is one; else the student is first fitted to the labels, by MSE as well.

    Args:
        generations: Number of times that the network is refitted after the first fit, 1 or more. The theory counts the first
            fit as its step 1.
        label_weight: `w` in [0, 1], the share of the ground truth in every generation; 1 never asks the generation before.
            "estimate" finds one for each generation: it trains a network on the outputs of the generation before alone, g_0,
            finds by `optimal_label_weight` the mix of g_0 and of the first fit g_1 that is closest to the labels of
            `data.validation`, and trains another network at that weight. That is two trainings for each generation.
        restart: Where each training begins: "fresh", at new random weights (also the first one, whatever weights the student
            has), or "initial", at the weights that the student came with, such as pre-trained ones.
        norm_penalty: `rho >= 0` of a further term `rho sum_i ||theta_i||_2` over the student's tensors, the norms not squared,
            which the official code has. The theory's penalty is the squared one: the optimizer's `weight_decay`.

    Example:
        >>> m = Roles(teacher=torch.nn.Linear(4, 3), student=torch.nn.Linear(4, 3))
        >>> update = SelfDistillation(label_weight=0.5).step(m, Batch(x=torch.ones(2, 4), y=torch.tensor([0, 2])))
        >>> update.role, list(update.logs)
        ('student', ['labels', 'previous'])
    """

    generations: int = 3
    label_weight: float | Literal["estimate"] = "estimate"
    restart: Literal["fresh", "initial"] = "fresh"
    norm_penalty: float = 0.0

    frozen: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        weight = self.label_weight
        ok = weight == "estimate" if isinstance(weight, str) else 0 <= weight <= 1
        check_field("generations", self.generations, self.generations >= 1, "1 or more")
        check_field("label_weight", weight, ok, "a share in [0, 1], or estimate")
        check_field("restart", self.restart, self.restart in ("fresh", "initial"), "fresh or initial")
        check_field("norm_penalty", self.norm_penalty, self.norm_penalty >= 0, "0 or more")

    def check(self, m: Roles, batch: Batch) -> None:
        """There are labels, the first fit has the same classes and can be asked about them, and a network can begin anew."""
        if "teacher" in m:
            check_classes(m, batch, labels=True)
        elif "y" not in batch:
            raise UsageError("this method needs labels and the data have none", where="batch.y", found=repr(batch))
        else:
            check_labels("batch.y", batch.y, outputs(m, batch, "student")[0])
        if "teacher" in m and self.label_weight == "estimate" and isinstance(m.teacher.module, Cached):
            raise UsageError(
                "label weights are estimated on data that the teacher's stored outputs do not cover",
                where="method.label_weight",
                found="estimate, with cache",
                fix="leave the cache out, or set a number",
            )
        if self.restart == "fresh":
            Redraw(0)(m.student.module)

    def check_data(self, data: Any) -> None:
        """Label weights are estimated on labelled samples that are not trained on."""
        if self.label_weight == "estimate":
            _check_held_out(data)

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """The first fit, if none is given; then the generations."""
        previous, estimates = "teacher" if "teacher" in m else "previous", self.label_weight == "estimate"
        if self.restart == "initial":
            yield Convert("initial", Copy(), of="student", name="initial")
        if previous == "previous":
            yield from self._fit(m, data, 1.0, previous, "first")
            yield Convert("previous", Copy(), of="student", name="previous_0")
        first: Any = None
        if estimates:
            first = (yield Collect("first_outputs", partial(_probabilities, data, previous))).value
        for t in range(1, self.generations + 1):
            weight = self.label_weight
            if estimates:
                yield from self._fit(m, data, 0.0, previous, f"unguided_{t}")
                weight = (yield Collect(f"label_weight_{t}", partial(_estimate, data, first), 0.5)).value
            yield from self._fit(m, data, float(weight), previous, f"generation_{t}")
            if t < self.generations:
                previous = "previous"
                yield Convert("previous", Copy(), of="student", name=f"previous_{t}")

    def _fit(self, m: Roles, data: Any, weight: float, previous: str, name: str) -> Generator[Stage, Any, None]:
        """One training from the beginning; its random weights follow from the run's seed and the name."""
        if self.restart == "initial":
            yield Convert("student", Copy(), of="initial", name=f"restart_{name}")
        else:
            yield Convert("student", Redraw(crc32(f"{m.seed}/{name}".encode())), name=f"restart_{name}")
        frozen = (previous,) if weight < 1 else ()
        step = partial(self.step, label_weight=weight, previous=previous)
        yield Train(step, {"student": None}, frozen, data.train, name=name)

    def step(self, m: Roles, batch: Batch, label_weight: float | None = None, previous: str = "teacher") -> Update:
        """One update of the student.

        Args:
            m: The roles.
            batch: Labels `y` `[B]` are not read at a label weight of 0.
            label_weight: In this generation; default the method's own, where that is a number.
            previous: The role that was fitted before; not asked at a label weight of 1.
        """
        weight = self.label_weight if label_weight is None else label_weight
        if isinstance(weight, str):
            raise UsageError(
                "a step needs a number", where="method.label_weight", found=weight, fix="step(m, batch, label_weight=...)"
            )  # fmt: skip
        p = m.student(batch).float().softmax(-1)  # [B, C]
        parts = dict[str, Tensor]()
        if weight > 0:
            e = torch.zeros_like(p).scatter_(-1, batch.y.unsqueeze(-1), 1.0)  # [B, C]
            parts["labels"] = F.mse_loss(p, e)
        if weight < 1:
            with torch.no_grad():
                q = m[previous](batch).float().softmax(-1)  # [B, C]
            parts["previous"] = F.mse_loss(p, q)
        shares = {"labels": weight, "previous": 1 - weight}
        loss = torch.stack([shares[name] * part for name, part in parts.items()]).sum()
        if self.norm_penalty:
            learned: Sequence[Tensor] = [p for p in m.student.parameters() if p.requires_grad]
            loss = loss + self.norm_penalty * torch.stack([p.norm() for p in learned]).sum()
        return Update("student", loss, logs=parts)


def _check_held_out(data: Any) -> None:
    """There are held-out samples that will do."""
    held, fix = data.validation, "give data.validation, or set label_weight to a number"
    found = None
    if torch.isin(held.ids, data.train.ids).all():
        found = "samples that are trained on"
    elif "y" not in held.batch(torch.zeros(1, dtype=torch.int64), 0):
        found = "no labels"
    if found is not None:
        raise UsageError(
            "label weights are estimated on held-out data", where="data.validation", found=found,
            expected="labelled samples that are not trained on", fix=fix,
        )  # fmt: skip


def _probabilities(data: Any, role: str, m: Roles, folder: Any) -> Tensor:
    return predict(m[role], data.validation)[0].softmax(-1)


def _estimate(data: Any, first: Tensor, m: Roles, folder: Any) -> float:
    return estimate_label_weight(m.student, first, data.validation)


def estimate_label_weight(student: Role, first: Tensor, source: Source) -> float:
    """The label weight for the next training, from held-out data.

    Args:
        student: A network that was trained on the outputs of the generation before alone.
        first: Probabilities of the first fit on the held-out data `[N, C]`.
        source: The held-out data, with labels.

    Returns:
        `optimal_label_weight` of the two, in [0, 1].

    Example:
        >>> from limbeck.data import TensorSource
        >>> source = TensorSource(torch.eye(2), torch.tensor([0, 1]))
        >>> estimate_label_weight(Role("student", torch.nn.Identity()), torch.eye(2), source)
        1.0
    """
    scores, y = predict(student, source)
    assert y is not None, "label weights are estimated on labels"
    return optimal_label_weight(F.one_hot(y, scores.shape[-1]), first, scores.softmax(-1))
