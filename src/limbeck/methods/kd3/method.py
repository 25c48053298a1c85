"""Distillation between different distributions: a teacher whose data are gone, and a pool of images from the web."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.adapt import main_output
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Collect, Convert, Stage, Train
from limbeck.core.update import Update
from limbeck.data.mix import mix_distribution
from limbeck.data.pseudo_labels import confident
from limbeck.evaluate.tasks import predict
from limbeck.losses import nt_xent, simkd
from limbeck.methods.checks import check_field
from limbeck.methods.kd3.student import BorrowClassifier, DropEmbedding, read


class Pool(nn.Module):
    """The pool as a role: the images, and the teacher's logits for them, which each epoch's choice needs.

    Args:
        source: The images.
        logits: What the teacher says of them `[N, K]`, in their order.
    """

    logits: Tensor

    def __init__(self, source: Source, logits: Tensor) -> None:
        super().__init__()
        self.source = source
        self.register_buffer("logits", logits)


@dataclass(frozen=True)
class KD3(Method):
    r"""The student learns the teacher's features from those images of a pool that both are sure about; no labels are used.

    $L = \frac{1}{N} \sum_n w_n \|P(f_s)_n - f_t\|^2 / |f_t| + \beta\, \mathrm{NTXent}(h_s, \tilde h_s)$ with
    $w_n = \sigma(\|z_s - z_t\|_2)$, the student's logits $z_s$ from the teacher's classifier behind the projector P, and
    $\tilde h_s$ the embedding of the image in the style of another (Tang et al. 2023, KD^3). At the start of each epoch an
    image is kept if the largest of `softmax(a z_t + (1 - a) z_s)` exceeds its class's threshold, see
    `limbeck.data.pseudo_labels.confident`. An epoch has as many steps as the pool has batches; the images kept fill it.

    The pool is `data.unlabelled`, or `data.train` without its labels. The student that comes out is its own body, the
    projector and the teacher's classifier. The log `disagreement` is the mean of `w`, from 0.5 for none to 1.

    Args:
        cutoff: Confidence that images of the most frequent class must exceed, in [0, 1]; 0 keeps the whole pool.
        horizon: Share of the run at which the teacher's part of the choice, `a`, would reach 0, above 0.
        alone_after: Share of the run after which the student chooses alone, in [0, 1].
        weighted: Whether images on which the two disagree count more; else all `w` are 1.
        contrastive_weight: `beta >= 0`; 0 leaves the mixed images and their forward pass out.
        temperature: Of the contrast, above 0.
        mix_alpha: Styles are mixed by Beta(alpha, alpha), above 0.
        embed_dim: Width of the contrast's embedding, 1 or more.
        variant: "code" adds the contrast of the teacher's features, which cannot reach the student and costs a forward pass
            of the teacher; "paper" leaves it out.

    Example:
        >>> from limbeck.nn.mlp import mlp
        >>> m, batch = Roles(teacher=mlp(4, 8, 3), student=mlp(4, 6, 3)), Batch(x=torch.rand(5, 4))
        >>> _ = m.convert("student", BorrowClassifier.between(m.teacher, m.student, batch))
        >>> [update.role for update in KD3(contrastive_weight=0).step(m, batch)]
        ['student']
    """

    logits: ClassVar[tuple[str, ...]] = ("teacher",)  # the student's own classifier is left out

    cutoff: float = 0.95
    horizon: float = 2 / 3
    alone_after: float = 0.5
    weighted: bool = True
    contrastive_weight: float = 0.001
    temperature: float = 0.3
    mix_alpha: float = 0.1
    embed_dim: int = 128
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        for name in ("cutoff", "alone_after"):
            check_field(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share in [0, 1]")
        check_field("contrastive_weight", self.contrastive_weight, self.contrastive_weight >= 0, "0 or more")
        for name in ("horizon", "temperature", "mix_alpha"):
            check_field(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        check_field("embed_dim", self.embed_dim, self.embed_dim >= 1, "1 or more")

    def check(self, m: Roles, batch: Batch) -> None:
        """The teacher's classifier can be borrowed, and there are images where styles are mixed."""
        BorrowClassifier.between(m.teacher, m.student, batch)
        x = batch.x
        if self.contrastive_weight and not (isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()):
            raise UsageError(
                "styles can be mixed in images only",
                where="method.contrastive_weight",
                found=repr(batch),
                expected="x as floating-point images [B, C, H, W]",
                fix="set contrastive_weight=0",
            )

    def stages(self, m: Roles, data: Any) -> Generator[Stage, Any, None]:
        """The teacher looks at the pool once; then the student borrows its classifier and learns."""
        source = data.unlabelled if "unlabelled" in data else data.train
        first = source.batch(torch.arange(2), 0)
        borrow = BorrowClassifier.between(m.teacher, m.student, first, self.embed_dim if self.contrastive_weight else 0)
        answers = yield Collect("answers", lambda m, folder: predict(m.teacher, source)[0])
        m.pool = Pool(source, answers.value)
        yield Convert("student", borrow, name="borrow")
        yield Train(self.step, roles={"student": None}, frozen=["teacher"], data=source)
        if self.contrastive_weight:
            yield Convert("student", DropEmbedding(), name="finish")

    def teacher_share(self, done: float) -> float:
        """The teacher's part `a` of the choice when a share `done` of the run is over; of 240 epochs, `(e + 1) / 240`."""
        fade: float = 1 - torch.tensor(-5 * (done / self.horizon - 1) ** 2, dtype=torch.float64).exp().item()
        return fade if done <= self.alone_after else 0.0

    def select(self, m: Roles, epoch: int) -> Tensor:
        """The ids of the images that the teacher and the student of this moment are sure about, repeated to fill an epoch."""
        source, share = m.pool.source, self.teacher_share(m.progress)
        mixed = (1 - share) * predict(m.student, source)[0] + share * m.pool.logits.cpu()  # [N, K]
        kept = confident(mixed, self.cutoff).nonzero().flatten()
        order = torch.randperm(len(kept), generator=m.rng("select"))
        return source.ids[kept[order[torch.arange(len(source)) % len(kept)]]]

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        """One update of the student, which has borrowed the teacher's classifier."""
        contrast = self.contrastive_weight > 0
        with torch.no_grad():
            teacher = read(m.teacher, batch, m.student.teacher)
            mixed = (
                mix_distribution(batch.x, alpha=self.mix_alpha, generator=m.rng("mix", batch.x.device))
                if contrast
                else None
            )
        logits, taps = m.student.features(batch, "projector", "backbone")
        projected, target = taps["projector"], teacher.features
        if target.ndim == 4 and target.shape[2] > projected.shape[2]:
            target = F.adaptive_avg_pool2d(target, projected.shape[2:])
        weight = torch.linalg.vector_norm(logits.detach() - teacher.logits, dim=1).sigmoid()  # [B]
        squared = simkd(projected, target, reduction="none")  # [B]
        loss = (weight * squared if self.weighted else squared).mean()
        logs = {"features": loss.detach(), "disagreement": weight.mean()}
        if contrast:
            apart = self._contrast(m, taps["backbone"], mixed, teacher.vector)
            loss = loss + self.contrastive_weight * apart
            logs["contrast"] = apart.detach()
        yield Update("student", loss, logs=logs)

    def _contrast(self, m: Roles, vector: Any, mixed: Any, teacher: Tensor) -> Tensor:
        embed = m.student.embed
        one, other = main_output(vector), m.student.raw(mixed, pooled=True)
        loss = nt_xent(embed["student"](one), embed["student"](other), temperature=self.temperature)
        if self.variant == "paper":
            return loss
        with torch.no_grad():
            again = read(m.teacher, mixed, m.student.teacher).vector
        return loss + nt_xent(embed["teacher"](teacher), embed["teacher"](again), temperature=self.temperature)
