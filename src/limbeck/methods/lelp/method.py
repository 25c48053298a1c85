"""Learning embedding linear projections: what a teacher of few classes knows within each class."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.convert.subclasses import AddSubclasses, has_subclasses, subclass_path
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.evaluate.cost import evaluating
from limbeck.losses import kl
from limbeck.losses._reduce import full_precision
from limbeck.methods.checks import check_classes, check_field
from limbeck.models.embedding import embedding_layer, embedding_size, readout, with_embedding
from limbeck.nn.subspace import ClassMoments, class_subspaces
from limbeck.teachers import Ensemble

_ROOM = 2**32  # bytes that the covariances of all classes may fill


@dataclass(frozen=True)
class LELP(Method):
    r"""The student learns S pseudo-subclasses of each class, made of directions in the teacher's embedding.

    $\tau^2\, \mathrm{KL}(p \,\|\, \mathrm{softmax}(o / \tau))$ over all C S subclasses, with the student's subclass logits
    $o$ and $p_{cs} = \mathrm{softmax}(t / \tau)_c\, \mathrm{softmax}(z_c / \beta)_s$, $z_{cs} = v_{cs} \cdot (h - \mu_c)$,
    where $t$ are the teacher's logits and $h$ is its embedding, what its last linear layer reads. $\mu_c$ is the mean and
    $v_c$ are the principal directions of class c, outside of the row space of that layer's weights and rotated at random
    (Loo, Iliopoulos, Hu and Vee 2024, section 3). The paper's cross-entropy is this and the entropy of $p$, which has no
    gradient. The student returns class logits $\tau \log \sum_s \exp(o_{cs} / \tau)$; with one subclass this is `kd` without
    labels.

    Args:
        temperature: `tau > 0` of the class probabilities.
        subclasses: S per class, at least 1. Fewer than the samples of each class, and no more than the embedding has
            dimensions outside of the C that the last layer sees.
        subclass_temperature: `beta > 0`; lower makes subclasses harder. In deviations of z where it is standardised.
        label_weight: The share of the labels in [0, 1], by cross-entropy with the class logits; 0 wherever a batch has none.
        null_space: Leave out what the last linear layer sees, which its logits already tell.
        standardise: Divide $z_c$ by its deviation over the samples of class c; False is the paper's, where beta depends on
            the scale of the embedding.

    Example:
        >>> from limbeck.data import TensorSource
        >>> m = Roles(teacher=nn.Linear(8, 2), student=nn.Linear(8, 2))
        >>> source = TensorSource(torch.randn(40, 8), torch.arange(40) % 2)
        >>> method = LELP(subclasses=3)
        >>> method.prepare(m, source)
        >>> [update.role for update in method.step(m, source.batch(torch.arange(4), view=0))]
        ['student']
        >>> m.student(torch.ones(1, 8)).shape
        torch.Size([1, 2])
    """

    temperature: float = 1.0
    subclasses: int = 5
    subclass_temperature: float = 0.5
    label_weight: float = 0.0
    null_space: bool = True
    standardise: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "subclass_temperature"):
            check_field(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        check_field("subclasses", self.subclasses, self.subclasses >= 1, "1 or more")
        check_field("label_weight", self.label_weight, 0 <= self.label_weight <= 1, "a share in [0, 1]")

    def check(self, m: Roles, batch: Batch) -> None:
        """One teacher whose embedding is wide enough, and a student that ends in a linear layer too."""
        classes = check_classes(m, batch, labels=self.label_weight > 0 and "y" in batch)
        if isinstance(m.teacher.module, Ensemble):
            found = f"{len(m.teacher.members)} teachers"
            raise UsageError("an ensemble has no embedding of its own", where="teacher", found=found, fix="name one")
        with evaluating(m.teacher.module):
            _, embedding = with_embedding(m.teacher, batch)
        self._check_size(classes, embedding.shape[-1])
        if not has_subclasses(m.student.module, self.subclasses):
            with evaluating(m.student.module):
                with_embedding(m.student, batch)

    def check_data(self, data: Any) -> None:
        """Each class has more samples than subclasses, where the labels are known."""
        labels = getattr(data.train, "labels", None)
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            few = int(labels.unique(return_counts=True)[1].min())
            check_field("subclasses", self.subclasses, self.subclasses < few, f"below {few}, the samples of a class")

    def stores(self, role: Role, batch: Batch) -> Sequence[str]:
        """The layer that gives the embedding."""
        return [embedding_layer(role, batch)]

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """Find the subspaces from the teacher's embeddings, give the student its subclasses, train it."""
        size, classes = embedding_size(m.teacher)
        rows = classes * self.subclasses
        example = {"weight": torch.zeros(rows, size), "bias": torch.zeros(rows)}
        found = yield Collect("subspaces", lambda m, _: self.fit(m, data.train), example=example)
        m.subspaces = coordinates(found.value)
        yield Convert("student", AddSubclasses(self.subclasses, self.temperature))
        yield Train(self.step, roles={"student": None}, frozen=("teacher", "subspaces"), data=data.train)

    def prepare(self, m: Roles, source: Source) -> None:
        """What comes before training, for a loop of one's own: adds the role `subspaces`, and converts the student.

        Args:
            m: Roles with a `teacher` and a `student`.
            source: The training data; one pass of the teacher over it.
        """
        device = next((p.device for p in m.teacher.module.parameters()), torch.device("cpu"))
        m.subspaces = coordinates(self.fit(m, source)).to(device)
        m.freeze("subspaces")
        m.convert("student", AddSubclasses(self.subclasses, self.temperature))

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student."""
        with torch.no_grad():
            logits, embedding = with_embedding(m.teacher, batch)  # [B, C], [B, D]
            map_, beta = m.subspaces, self.subclass_temperature
            target = subclass_targets(
                logits, embedding, map_.weight, map_.bias, temperature=self.temperature, subclass_temperature=beta
            )  # [B, C S]
        path = subclass_path(m.student.module)
        classes, taps = m.student.features(batch, path)  # [B, C], [B, C S]
        soft = kl(taps[path], self.temperature * target, temperature=self.temperature)
        if self.label_weight == 0 or "y" not in batch:
            yield Update("student", soft)
            return
        hard = F.cross_entropy(classes, batch.y)
        loss = (1 - self.label_weight) * soft + self.label_weight * hard
        yield Update("student", loss, logs={"soft": soft, "hard": hard})

    @torch.no_grad()
    def fit(self, m: Roles, source: Source, batch_size: int = 256) -> dict[str, Tensor]:
        """The map from an embedding to its coordinates in all subspaces, from one pass of the teacher.

        A sample's class is its label, and the teacher's answer where there is none. Augmented data are seen once, with view 0.

        Args:
            m: Roles with a `teacher`.
            source: The data, N samples.
            batch_size: Samples of one call.

        Returns:
            `weight` `[C S, D]` and `bias` `[C S]` of `z`; the `deviation` of `z` before it is standardised and the `share`
            of the variance that the subspace holds, of each class `[C]`; all float32.

        Raises:
            UsageError: A class has too few samples, or too few directions.
        """
        size, classes = embedding_size(m.teacher)
        device = next((p.device for p in m.teacher.module.parameters()), torch.device("cpu"))
        moments = ClassMoments(classes, size, device)
        with evaluating(m.teacher.module):
            for rows in torch.arange(len(source)).split(batch_size):
                batch = source.batch(rows, 0).to(device)
                logits, embedding = with_embedding(m.teacher, batch)
                y = batch.get("y")
                moments.add(embedding, logits.argmax(-1) if y is None or y.is_floating_point() else y)
            seen = readout(m.teacher, source, batch_size) if self.null_space else None
        found = class_subspaces(moments, self.subclasses, seen, m.rng("rotation"))
        weight, bias = found.coordinates(self.standardise)
        values = {"weight": weight, "bias": bias, "deviation": found.variances.mean(1).sqrt(), "share": found.share}
        return {name: value.float().cpu() for name, value in values.items()}

    def _check_size(self, classes: int, size: int) -> None:
        room = size - classes if self.null_space else size
        if self.subclasses > room:
            raise UsageError(
                "the teacher's embedding is too small for so many subclasses",
                where="method.subclasses",
                found=f"{self.subclasses} subclasses, {size} dimensions of which the last layer sees up to {classes}",
                expected=f"at most {max(room, 0)}" + (" outside of what it sees" if self.null_space else ""),
                fix="take fewer subclasses, a wider teacher, or null_space=false",
            )
        if (needed := 8 * classes * size**2) > _ROOM:
            raise UsageError(
                "there are too many classes: this method is for few",
                where="data",
                found=f"{classes} classes of {size} dimensions, whose covariances fill {needed / 2**30:.0f} GiB",
                expected=f"at most {_ROOM // 2**30} GiB",
                fix="use kd or pld, whose targets tell more the more classes there are",
            )


def coordinates(found: Mapping[str, Tensor]) -> nn.Linear:
    """The map from embeddings `[B, D]` to coordinates `[B, C S]` that `LELP.fit` found, as a layer."""
    rows, size = found["weight"].shape
    layer = nn.utils.skip_init(nn.Linear, size, rows)
    layer.load_state_dict({"weight": found["weight"], "bias": found["bias"]})
    return layer


@full_precision
def subclass_targets(
    logits: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    temperature: float = 1.0,
    subclass_temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities of all pseudo-subclasses, those of the wrong classes too.

    `log softmax(t / tau)_c + log softmax(z_c / beta)_s`, `z = A h + a` (Loo, Iliopoulos, Hu and Vee 2024, section 3).

    Args:
        logits: The teacher's `t` `[B, C]`.
        embedding: The teacher's `h` `[B, D]`.
        weight: `A` `[C S, D]`.
        bias: `a` `[C S]`.
        temperature: `tau > 0`.
        subclass_temperature: `beta > 0`.

    Returns:
        `[B, C S]` in fp32 or wider; the probabilities of a class's subclasses sum to the probability of the class.

    Example:
        >>> target = subclass_targets(torch.zeros(1, 2), torch.ones(1, 3), torch.zeros(4, 3), torch.zeros(4))
        >>> target.exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    z = F.linear(embedding, weight, bias).unflatten(-1, (logits.shape[-1], -1))  # [B, C, S]
    classes = (logits / temperature).log_softmax(-1).unsqueeze(-1)  # [B, C, 1]
    return (classes + (z / subclass_temperature).log_softmax(-1)).flatten(-2)
