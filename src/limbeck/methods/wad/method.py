"""Weight-aware distillation: a self-supervised encoder says which unlabelled samples to believe, and how much."""

import copy
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Collect, Stage, Train
from limbeck.core.update import Update
from limbeck.data.combine import Concatenated, together
from limbeck.data.pseudo_labels import class_similarities, margin_labels
from limbeck.evaluate.tasks import predict
from limbeck.losses import nt_xent
from limbeck.methods.checks import check_field, outputs
from limbeck.methods.wad.sources import Labelled, Taught, TwoViews, View
from limbeck.nn.heads import find_head, head_of


class Encoder(nn.Module):
    """The body of a classifier with a projection head of two layers, for contrastive learning.

    Args:
        body: A model whose last linear layer, and what comes after it, is left out; copied.
        dim: Width of the embedding.
    """

    def __init__(self, body: nn.Module, dim: int) -> None:
        super().__init__()
        width = head_of(body).in_features
        self.body = copy.deepcopy(body)
        self.body.set_submodule(find_head(body), nn.Identity())
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings `[B, dim]`."""
        return self.head(self.body(x))


@dataclass(frozen=True)
class WAD(Method):
    r"""Cross-entropy with the labels, and with an encoder's labels of unlabelled samples, each by its weight.

    $L = \mathrm{CE}(f(x_l), y_l) + \frac{1}{B} \sum_u w_u \mathrm{CE}(f(x_u), \hat y_u)$ with the cosines $s_k$ of an
    unlabelled sample to the nearest labelled sample of class k, $\hat y = \arg\max_k s_k$ and $w = s_{(1)} - s_{(2)}$, top one
    minus top two (Du et al. 2023). After each round, the unlabelled samples that the student agrees with most (smallest
    cross-entropy) join the labelled ones: a share `base_share (1 - min(t, P) / P)^2` of those left after round t, P the
    number of `promotions`; there are P + 1 rounds, and the student's weights go on from round to round.

    The encoder is the teacher, where one is given; else the role `encoder` is made: the student's body with a projection
    head, which first learns by SimCLR from two augmented views of all samples. A run's epochs and steps are those of each
    stage. The log `weight` is the mean of the batch's weights.

    Args:
        promotions: P, 0 or more; 0 is one round without promotion.
        base_share: Share of the first promotion before its factor, in [0, 1].
        weighted: Whether weights count; else all are 1.
        fresh_views: Whether the encoder looks at another augmented view in each round, as the official code does; else
            always at view 0.
        temperature: Of the contrast that makes the encoder, above 0.
        embed_dim: Width of its embedding, 1 or more.

    Example:
        >>> m = Roles(student=nn.Linear(4, 3))
        >>> unlabelled = {"x": torch.ones(2, 4), "y": torch.tensor([1, 1]), "weight": torch.tensor([0.1, 0.3])}
        >>> batch = Batch(x=torch.ones(2, 4), y=torch.tensor([0, 2]), unlabelled=unlabelled)
        >>> [update.role for update in WAD().step(m, batch)]
        ['student']
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    logits: ClassVar[tuple[str, ...]] = ("student",)

    promotions: int = 5
    base_share: float = 0.1
    weighted: bool = True
    fresh_views: bool = False
    temperature: float = 0.5
    embed_dim: int = 128

    def __post_init__(self) -> None:
        check_field("promotions", self.promotions, self.promotions >= 0, "0 or more")
        check_field("base_share", self.base_share, 0 <= self.base_share <= 1, "a share in [0, 1]")
        check_field("temperature", self.temperature, self.temperature > 0, "above 0")
        check_field("embed_dim", self.embed_dim, self.embed_dim >= 1, "1 or more")

    def check(self, m: Roles, batch: Batch) -> None:
        """The student classifies, and a teacher that is given gives vectors."""
        if "teacher" not in m:
            find_head(m.student.module)
            return
        (found,) = outputs(m, batch, "teacher")
        if found.ndim != 2:
            raise UsageError(
                "the teacher gives no vector for a sample",
                where="roles.teacher",
                found=list(found.shape),
                expected="embeddings [B, D]",
                fix="pool its outputs, or leave the teacher out: one is made then",
            )

    def check_data(self, data: Any) -> None:
        """There are labelled samples of each class, and unlabelled ones."""
        size = len(data.unlabelled)
        labels = labels_of(data.train)
        if labels is None:
            raise UsageError(
                "this method needs some labels and the data have none",
                where="data.train",
                found=repr(data.train),
                fix="give labelled samples as the training data, the others as data.unlabelled",
            )
        missing = (labels.bincount(minlength=data.num_classes or 0) == 0).nonzero().flatten().tolist()
        if missing:
            raise UsageError(
                "classes without a labelled sample",
                where="data.train",
                found=f"none of class {', '.join(map(str, missing[:5]))}",
                expected="at least one of each class",
                fix="label a sample of each class, or leave those classes out",
            )
        first = self.promoted(1, size)
        if first > len(labels):
            warnings.warn(
                f"WAD: the first round promotes {first} pseudo-labelled samples to {len(labels)} labelled ones, whose mistakes "
                f"then teach the next rounds; method.base_share={len(labels) / size * self.base_share / 2:.2g} or "
                "method.promotions=0 is safer",
                stacklevel=2,
            )

    def promoted(self, t: int, left: int) -> int:
        """How many of the `left` unlabelled samples join the labelled ones after round t, from 1.

        Example:
            >>> [WAD().promoted(t, 1000) for t in range(1, 7)]
            [64, 36, 16, 4, 0, 0]
        """
        rest = max(0, self.promotions - t)
        return int(Fraction(str(self.base_share)) * rest**2 * left / self.promotions**2) if rest else 0

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """An encoder if none is given; then rounds of labelling, learning and promotion."""
        y = labels_of(data.train)
        assert y is not None
        labelled: Any = Labelled(data.train, y)
        unlabelled = data.unlabelled
        if "teacher" not in m:
            both = TwoViews(Concatenated(labelled, unlabelled))
            m.encoder = Role("encoder", Encoder(m.student.module, self.embed_dim), m.student.preprocess)
            yield Train(self.contrast, roles={"encoder": None}, data=both, name="encoder")
        left, joined = torch.arange(len(unlabelled)), labelled  # rows, and a source that grows
        for t in range(1, self.promotions + 2):
            view = t if self.fresh_views else 0
            pool, samples = unlabelled.subset(left), joined
            example = {"label": torch.zeros(len(left), dtype=torch.int64), "weight": torch.zeros(len(left))}
            known = yield Collect(f"labels-{t}", self._labelling(samples, pool, view), example)
            label, weight = known.value["label"], known.value["weight"]
            taught = Taught(samples, pool, label, weight, seed=t)
            yield Train(self.step, roles={"student": None}, frozen=[encoder_of(m).name], data=taught, name=f"round-{t}")
            if count := self.promoted(t, len(left)):
                found = yield Collect(f"promotion-{t}", self._ranking(pool, label), torch.arange(len(left)))
                best, rest = found.value[:count], found.value[count:].sort().values
                joined = Concatenated(joined, Labelled(pool.subset(best), label[best]))
                left = left[rest]

    def _labelling(self, labelled: Any, unlabelled: Any, view: int) -> Callable[[Roles, Any], Any]:
        return lambda m, folder: self.labels(m, labelled, unlabelled, view)

    def _ranking(self, unlabelled: Any, label: Tensor) -> Callable[[Roles, Any], Any]:
        return lambda m, folder: self.agreed(m, unlabelled, label)

    def contrast(self, m: Roles, batch: Batch) -> Tensor:
        """SimCLR's loss of the encoder on two views of each sample."""
        return nt_xent(m.encoder(batch), m.encoder(batch.other), temperature=self.temperature)

    def labels(self, m: Roles, labelled: Any, unlabelled: Any, view: int = 0) -> dict[str, Tensor]:
        """The encoder's labels `[U]` for unlabelled samples, and their weights `[U]`."""
        known, new = (F.normalize(predict(encoder_of(m), View(s, view))[0], dim=1) for s in (labelled, unlabelled))
        y = labelled.labels
        label, weight = margin_labels(class_similarities(new, known, y, int(y.max()) + 1))
        return {"label": label, "weight": weight}

    def agreed(self, m: Roles, unlabelled: Any, label: Tensor) -> Tensor:
        """The rows of the unlabelled samples, those first whose labels the student agrees with most."""
        return F.cross_entropy(predict(m.student, unlabelled)[0], label, reduction="none").argsort(stable=True)

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student on labelled samples, and as many unlabelled ones with `y` and `weight`."""
        unlabelled = Batch(**batch.unlabelled)
        inputs, count = together(batch)
        known, new = (logits := m.student(inputs))[:count], logits[count:]
        pseudo = F.cross_entropy(new, unlabelled.y, reduction="none")  # [B]
        weight = unlabelled.weight if self.weighted else torch.ones_like(unlabelled.weight)
        loss = F.cross_entropy(known, batch.y) + (weight * pseudo).mean()
        yield Update("student", loss, logs={"weight": weight.mean()})


def encoder_of(m: Roles) -> Role:
    """The teacher that was given, or the encoder that was made."""
    return m.teacher if "teacher" in m else m.encoder


def labels_of(source: Any) -> Tensor | None:
    """The labels of all samples of a source `[N]`; None where it has none."""
    if (known := getattr(source, "labels", None)) is not None:
        return known
    found = [source.batch(rows, 0).get("y") for rows in torch.arange(len(source)).split(256)]
    return None if found[0] is None else torch.cat(found)
