"""Weight aligning: classes arrive in groups, and the newest ones do not drown the older ones."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.convert.heads import AlignHead, ReshapeHead
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.incremental import Increments, herd
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.metrics import topk_accuracy
from limbeck.evaluate.tasks import predict
from limbeck.losses import soft_cross_entropy
from limbeck.losses._reduce import check_labels
from limbeck.methods.checks import check_field
from limbeck.models.embedding import with_embedding
from limbeck.nn.heads import head_of

# Where the public codes differ from each other and from what we read of the paper.
_POINTS: Mapping[str, Mapping[str, Any]] = {
    "norm": {"paper": 2.0, "code": 1.0, "pycil": 2.0},
    "clip": {"paper": True, "code": True, "pycil": False},
    "bias": {"paper": False, "code": False, "pycil": True},
    "clamp": {"paper": False, "code": True, "pycil": False},
    "scale": {"paper": "weights", "code": "logits", "pycil": "weights"},
    "head": {"paper": "copy", "code": "new", "pycil": "copy"},
    "decay": {"paper": 0.0, "code": 1e-4, "pycil": 0.0},
    "share": {"paper": "classes", "code": "increments", "pycil": "classes"},
}


@dataclass(frozen=True)
class WA(Method):
    r"""Classes arrive in groups; the student learns each with a small memory of the older ones, and is aligned after it.

    In increment t the student, whose head has $C_o$ old and $C_n$ new rows, learns new data and memory by

    $(1 - \lambda) \mathrm{CE}(o, y) + \lambda \mathrm{CE}(\mathrm{softmax}(\hat o / \tau),
    \mathrm{softmax}(o_{1..C_o} / \tau))$, $\lambda = C_o / (C_o + C_n)$,

    where $\hat o$ are the logits of the student as the increment before left it, so that the teacher is the student itself;
    the head's weights are kept at 0 or above. After it the new rows are scaled,
    $w_c \leftarrow \gamma w_c$, $\gamma = \mathrm{mean}_{old} \|w_c\|_p / \mathrm{mean}_{new} \|w_c\|_p$
    (Zhao et al. 2020). Then `memory // C` samples of each class are remembered, the most typical ones of
    each new class by herding.

    The increments are `data.train`, divided by classes, or splits of their own: see `limbeck.data.incremental`. The student
    comes with a head over all classes, which is replaced. It leaves with one over all classes in the data's numbering; its
    accuracy on the classes seen so far is recorded after each increment.

    Args:
        increments: Number of groups, or the size of each; not used where the increments are splits.
        order_seed: Seed of the order of the classes; 1993 gives the usual order of CIFAR-100, None that of their numbers.
        memory: Samples that are remembered, of all classes together; at least one of each.
        temperature: `tau > 0`; the loss is not multiplied by its square.
        label_weight: `1 - lambda`, the share of the ground truth in [0, 1]; None computes it for each increment (`share`), 1
            leaves the distillation out. The first increment has the ground truth alone.
        align: Whether the new rows are scaled.
        variant: What the following fields are where they are None: "paper", "code" (the authors') or "pycil" (a usual
            re-implementation).
        norm: `p > 0` of the norms of rows: 2, 1 and 2.
        clip: Whether the head's weights are kept at 0 or above: yes, yes and no.
        bias: Whether the head has a bias: no, no and yes.
        clamp: Whether `gamma` is 1 at most: no, yes and no.
        scale: Whether `gamma` scales "weights", from which the next increment goes on, or "logits" (a bias as well) of the old
            and of the final model, while the student goes on from its own weights: weights, logits and weights.
        head: Whether old rows are a "copy", or the whole head is "new" in each increment: copy, new and copy.
        decay: Base of an L2 penalty on all parameters, `decay / (2 (t + 1)) ||theta||^2`, in addition to the optimizer's: 0,
            1e-4 and 0.
        share: Whether `lambda` is the share of old "classes", or of "increments", `t / (t + 1)`: classes, increments and
            classes. They are the same for groups of equal size.

    Example:
        >>> m = Roles(student=torch.nn.Linear(4, 5), old=torch.nn.Linear(4, 3))
        >>> (update,) = WA().step(m, Batch(x=torch.ones(2, 4), y=torch.tensor([0, 4])))
        >>> update.role, {name: round(value.item(), 2) for name, value in update.logs.items() if name == "label_weight"}
        ('student', {'label_weight': 0.4})
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    logits: ClassVar[tuple[str, ...]] = ("student",)

    increments: int | tuple[int, ...] = 5
    order_seed: int | None = 1993
    memory: int = 2000
    temperature: float = 2.0
    label_weight: float | None = None
    align: bool = True
    variant: Literal["paper", "code", "pycil"] = "paper"
    norm: float | None = None
    clip: bool | None = None
    bias: bool | None = None
    clamp: bool | None = None
    scale: Literal["weights", "logits"] | None = None
    head: Literal["copy", "new"] | None = None
    decay: float | None = None
    share: Literal["classes", "increments"] | None = None

    def __post_init__(self) -> None:
        sizes = (self.increments,) if isinstance(self.increments, int) else self.increments
        weight = self.label_weight
        check_field("increments", self.increments, len(sizes) > 0 and min(sizes) >= 1, "1 or more")
        check_field("memory", self.memory, self.memory >= 1, "1 or more")
        check_field("temperature", self.temperature, self.temperature > 0, "above 0")
        check_field("label_weight", weight, weight is None or 0 <= weight <= 1, "in [0, 1], or none")
        check_field("norm", self.norm, self.norm is None or self.norm > 0, "above 0, or none")
        check_field("decay", self.decay, self.decay is None or self.decay >= 0, "0 or more, or none")

    def point(self, name: str) -> Any:
        """One of the points in which the variants differ: the field, or what the variant says.

        Example:
            >>> WA(variant="code", clip=False).point("clip"), WA(variant="code").point("norm")
            (False, 1.0)
        """
        value = getattr(self, name)
        return _POINTS[name][self.variant] if value is None else value

    def check(self, m: Roles, batch: Batch) -> None:
        """The student ends in a linear layer over the classes, the labels are classes, and there is no teacher."""
        if m.teachers:
            raise UsageError(
                "this method's teacher is the student before the newest classes came",
                where="roles.teacher",
                found=", ".join(m.teachers),
                expected="a student alone",
                fix="leave the teacher out",
            )
        with evaluating(m.student.module):
            logits, _ = with_embedding(m.student, batch)
        if "y" not in batch:
            raise UsageError("this method needs labels and the data have none", where="batch.y", found=repr(batch))
        check_labels("batch.y", batch.y, logits)

    def check_data(self, data: Any) -> None:
        """The classes arrive in groups, each has samples, and the memory has room for all."""
        classes = len(self._increments(data).order)
        check_field("memory", self.memory, self.memory >= classes, f"{classes} or more, one sample of each class")

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """For each increment: grow the head, learn, align, remember."""
        arriving, judged = self._increments(data), data.get("validation")
        memory = [ids[: self.memory // arriving.known] for ids in arriving.memory]
        accuracies, last = list[float](), len(arriving.sizes) - 1
        in_logits = self.align and self.point("scale") == "logits"
        if arriving.known:
            yield Convert("student", ReshapeHead(arriving.order[: arriving.known]), name="known")
        for t in range(last + 1):
            old, seen = arriving.seen(t - 1), arriving.seen(t)
            if old:
                before = arriving.seen(t - 2) if t else 0
                copied = self._aligned(before) if in_logits and before else ReshapeHead()
                yield Convert("old", copied, of="student", name=f"old_{t}")
            yield Convert("student", self._grown(old, seen, 1000 * m.seed + t), name=f"grow_{t}")
            evaluate = None if judged is None else self._evaluate(arriving.judged(judged, t), old, accuracies)
            step = partial(self.step, increment=t + (arriving.known > 0))
            frozen, source = ("old",) if old else (), arriving.train(t, memory)
            metrics = yield Train(step, {"student": None}, frozen, source, evaluate=evaluate, name=f"increment_{t}")
            accuracies = [*accuracies, *([metrics["top1"]] if metrics else [])]
            if old and self.align and (t == last or not in_logits):
                yield Convert("student", self._aligned(old), name=f"align_{t}")
            room = self.memory // seen
            remember = partial(_remember, arriving, memory, seen, room)
            example = [arriving.of_class(c).ids[:room] for c in range(seen)]
            memory = (yield Collect(f"memory_{t}", remember, example)).value
        order = torch.tensor(arriving.order)
        yield Convert("student", ReshapeHead(order.argsort().tolist()), name="order")

    def step(self, m: Roles, batch: Batch, increment: int = 1) -> Iterator[Update]:
        """One update of the student; where there is a role `old`, it is distilled as well.

        Args:
            m: The roles.
            batch: Labels are places in the order of arrival.
            increment: How many came before.
        """
        student = m.student(batch)  # [B, C]
        loss, logs = F.cross_entropy(student, batch.y), dict[str, Tensor]()
        if "old" in m and self.label_weight != 1:
            with torch.no_grad():
                old = m.old(batch)  # [B, C_o]
            kept = old.shape[-1]
            weight = self._label_weight(kept, student.shape[-1], increment)
            soft = soft_cross_entropy(student[:, :kept] / self.temperature, (old / self.temperature).softmax(-1))
            logs = {"labels": loss, "old": soft, "label_weight": loss.new_full((), weight)}
            loss = weight * loss + (1 - weight) * soft
        if decay := self.point("decay"):
            learned = [p for p in m.student.parameters() if p.requires_grad]
            loss = loss + decay / (2 * (increment + 1)) * torch.stack([p.square().sum() for p in learned]).sum()
        yield Update("student", loss, logs=logs)

    def after_update(self, m: Roles, role: str) -> None:
        """Weights of the head below 0 become 0."""
        if self.point("clip"):
            with torch.no_grad():
                head_of(m.student.module).weight.clamp_(min=0)

    def _increments(self, data: Any) -> Increments:
        return Increments.of(data, self.increments, self.order_seed)

    def _label_weight(self, old: int, classes: int, increment: int) -> float:
        if self.label_weight is not None:
            return self.label_weight
        return 1 / (increment + 1) if self.point("share") == "increments" else 1 - old / classes

    def _grown(self, old: int, seen: int, seed: int) -> ReshapeHead:
        kept = old if self.point("head") == "copy" else 0
        return ReshapeHead(range(kept), seen - kept, self.point("bias"), non_negative=self.point("clip"), seed=seed)

    def _aligned(self, old: int) -> AlignHead:
        return AlignHead(old, self.point("norm"), self.point("clamp"), bias=self.point("scale") == "logits")

    def _evaluate(self, source: Source, old: int, accuracies: Sequence[float]) -> Callable[[Roles], dict[str, float]]:
        """Judges the student as it would be after alignment, on classes that have arrived."""

        def evaluate(m: Roles) -> dict[str, float]:
            student = self._aligned(old)(m.student.module)[0] if old and self.align else m.student.module
            scores, labels = predict(Role("student", student, m.student.preprocess), source)
            assert labels is not None
            top1, newest = topk_accuracy(scores, labels).item(), (scores.argmax(-1) >= old).float().mean().item()
            return {"top1": top1, "newest": newest, "average": (sum(accuracies) + top1) / (len(accuracies) + 1)}

        return evaluate


def _remember(arriving: Increments, memory: Sequence[Tensor], seen: int, room: int, m: Roles, _: Any) -> list[Tensor]:
    """Ids of what is remembered of each class seen: fewer of the older ones, the most typical of the new ones."""
    new = [arriving.of_class(c) for c in range(len(memory), seen)]
    chosen = [source.ids[herd(_embeddings(m.student, source), min(room, len(source)))] for source in new]
    return [*(ids[:room] for ids in memory), *chosen]


def _embeddings(role: Role, source: Source, batch_size: int = 256) -> Tensor:
    """What the head reads, of all samples as they are `[N, d]`."""
    device = next(role.module.parameters()).device
    parts = torch.arange(len(source)).split(batch_size)
    with evaluating(role.module):
        return torch.cat([with_embedding(role, source.batch(rows, 0).to(device))[1].float().cpu() for rows in parts])
