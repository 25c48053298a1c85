"""What a small data set is judged by: networks trained on it from scratch, and tested on real samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.core.optim import Optim
from limbeck.core.roles import Role, Roles
from limbeck.core.source import Source
from limbeck.data.augment import Views
from limbeck.data.condensed import Condensed
from limbeck.data.lessons import Lessons
from limbeck.evaluate.cost import evaluating
from limbeck.losses.logits import soft_cross_entropy

SGD = Optim("sgd", lr=0.02, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(0.5,))
ADAMW = Optim(
    "adamw", lr=1e-3, weight_decay=0.01, schedule="cosine"
)  # soft labels at a temperature give small gradients


@dataclass(frozen=True)
class Training:
    """How a network is trained on a small data set: a fixed number of steps, the same for every set that is compared.

    Args:
        steps: Updates.
        labels: `hard`, class numbers; `soft`, the set's own logits; None for soft ones where there are some.
        optim: The optimizer and its schedule; None for `SGD` with hard labels and `ADAMW` with soft ones.
        views: Order, augmentation and mixing. Sets whose labels belong to views of their own (`soft` of `[E, N, C]`) are gone
            through in these, epoch after epoch, again from the first when they are at an end.
        temperature: Of soft labels; None for the set's own, else 1. The loss is not multiplied by its square.
        parts: A batch is shown in so many parts, each with batch statistics of its own, for one step; None for the set's own
            number where its labels are trained on, else 1.
    """

    steps: int = 500
    labels: Literal["hard", "soft"] | None = None
    optim: Optim | None = None
    views: Views = field(default_factory=Views)
    temperature: float | None = None
    parts: int | None = None

    @classmethod
    def own(cls, condensed: Condensed, **fields: Any) -> Training:
        """How a set wants to be trained on by itself, as `condensed.train(network)` does.

        A step size that was learned with the samples is the rate for class numbers, as where these methods are published; how
        samples and labels are mixed is as `info["training"]` says. Sets are compared without either, by `Training()`.

        Args:
            condensed: The set.
            **fields: In the place of these.
        """
        found: dict[str, Any] = {}
        hard = fields.get("labels") == "hard" or condensed.soft is None
        if hard and condensed.step_size is not None:
            found["optim"] = replace(SGD, lr=float(condensed.step_size.detach()))
        if not hard and "training" in condensed.info:
            found["views"] = views_of(condensed.info["training"])
        return cls(**{**found, **fields})

    def resolved(self, condensed: Condensed) -> Training:
        """With what the set says about itself.

        Raises:
            UsageError: Soft labels are asked for and there are none.
        """
        labels = self.labels or ("hard" if condensed.soft is None else "soft")
        if labels == "soft" and condensed.soft is None:
            raise UsageError("this set has no soft labels", where="labels", found="soft", expected="hard")
        optim = self.optim or (SGD if labels == "hard" else ADAMW)
        temperature = self.temperature or condensed.info.get("temperature", 1.0)
        parts = self.parts or (condensed.info.get("label_parts", 1) if labels == "soft" else 1)
        found = replace(self, labels=labels, temperature=temperature, optim=optim, parts=parts)
        if labels == "soft" and condensed.soft is not None and condensed.soft.ndim == 3:
            found = replace(found, views=views_of(condensed.info["views"]))
        return found


def views_of(told: Mapping[str, Any]) -> Views:
    """Views from the plain data that a set tells of them."""
    return Views(**{**told, "operations": tuple(told.get("operations", ()))})


def train_on(
    condensed: Condensed, network: nn.Module, training: Training | None = None, seed: int = 0, **fields: Any
) -> nn.Module:
    """Train a network on a small data set, as it is, in place.

    Args:
        condensed: The set.
        network: Any module that gives logits `[B, C]`.
        training: How; or its fields, such as `steps=500`.
        seed: Of order, augmentation and mixing, where they are not the set's own.
        **fields: In the place of those of `training`.

    Returns:
        The network, in evaluation mode.

    Example:
        >>> small = Condensed(torch.eye(4), torch.arange(4))
        >>> network = train_on(small, nn.Linear(4, 4), steps=60, optim=Optim(lr=0.1))
        >>> network(torch.eye(4)).argmax(1).tolist()
        [0, 1, 2, 3]
    """
    how = replace(training or Training(), **fields).resolved(condensed)
    seen = lessons(condensed, how, seed, next(network.parameters()).device)
    network.train()
    optim = how.optim or SGD
    optimizer = optim.build(network)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.factor(step, how.steps))
    for step in range(how.steps):
        batch = seen(step)
        loss = taught(network, batch.x, batch.target, how)
        optimizer.zero_grad()
        loss.backward()
        if optim.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return network.eval()


def lessons(condensed: Condensed, how: Training, seed: int = 0, device: torch.device | str = "cpu") -> Lessons:
    """What a training sees of a set.

    Args:
        condensed: The set.
        how: A training that is `resolved`.
        seed: Of order, augmentation and mixing, where they are not the set's own.
        device: Where.
    """
    targets = _targets(condensed, how).to(device)
    views = how.views if targets.ndim == 3 else replace(how.views, seed=how.views.seed + 1_000_003 * seed)
    return Lessons(condensed().detach().to(device), targets, views)


def taught(network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, how: Training) -> Tensor:
    """The loss of a batch of a set: cross-entropy with one-hot or mixed labels, or with logits at their temperature.

    Args:
        network: Images to logits `[B, C]`.
        x: Samples `[B, ...]`.
        target: Labels or logits `[B, C]`.
        how: A training that is `resolved`.
    """
    logits = torch.cat([network(part) for part in x.chunk(how.parts or 1)])
    if how.labels == "hard":
        return soft_cross_entropy(logits, target)
    t = how.temperature or 1.0
    return soft_cross_entropy(logits / t, (target / t).softmax(1))


def _targets(condensed: Condensed, how: Training) -> Tensor:
    """One-hot labels `[N, C]`, or logits `[N, C]` or `[E, N, C]`."""
    if how.labels == "soft":
        assert condensed.soft is not None
        return condensed.soft.detach().float()
    return F.one_hot(condensed.y, condensed.num_classes).float()


def fresh(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a network with newly drawn weights, in training mode and with gradients.

    Raises:
        UsageError: A part has weights and no way to draw them again (`reset_parameters`).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> a, b = fresh(net, 1), fresh(net, 1)
        >>> a[0].weight.equal(b[0].weight), a[0].weight.equal(net[0].weight)
        (True, False)
    """
    new = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in new.named_modules():
            part.__dict__.pop("train", None)  # of a frozen role
            draw = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(draw):
                draw()
            elif any(True for _ in part.parameters(recurse=False)):
                raise UsageError(
                    "this network's weights cannot be drawn again", where=name or type(new).__name__,
                    found=type(part).__name__, expected="modules with reset_parameters()",
                    fix="give networks of your own: protocol(condensed, test, {name: function})",
                )  # fmt: skip
    return new.requires_grad_(True).train()


@torch.no_grad()
def accuracy(network: nn.Module, source: Source, batch_size: int = 256) -> float:
    """The share of right answers on a source, in [0, 1]."""
    device = next(network.parameters()).device
    right = 0.0
    for rows in torch.arange(len(source)).split(batch_size):
        batch = source.batch(rows, 0).to(device)
        right += float((network(batch.x).argmax(1) == batch.y).sum())
    return right / len(source)


def protocol(
    condensed: Condensed,
    test: Source,
    networks: Mapping[str, Callable[[], nn.Module]],
    training: Training | None = None,
    trainings: int = 3,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The accuracies of several networks, each trained several times from scratch on a set; those of the last step.

    Args:
        condensed: The set.
        test: Real samples that it was not made from.
        networks: Functions that make a network with new weights, by name; those of other kinds than the set was made with
            are the point.
        training: How they are trained.
        trainings: Times each.
        seed: Of the first training; the others follow.

    Example:
        >>> from limbeck.data import TensorSource
        >>> small, test = Condensed(torch.eye(3), torch.arange(3)), TensorSource(torch.eye(3), torch.arange(3))
        >>> protocol(small, test, {"linear": lambda: nn.Linear(3, 3)}, Training(50, optim=Optim(lr=0.1)), trainings=2)
        {'linear': [1.0, 1.0]}
    """
    found: dict[str, list[float]] = {}
    for name, make in networks.items():
        for k in range(seed, seed + trainings):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(k)
                network = make()
            found.setdefault(name, []).append(accuracy(train_on(condensed, network, training, k), test))
    return found


class Condensation:
    """Judges a condensed set by networks like the teacher, trained from scratch on it: the mean of their accuracies, `top1`.

    All sets have the same training, `Training()` unless another one is given: a learned step size and a set's own mixing are
    for `condensed.train`. The teacher is judged as it is; before training the set is random real samples.

    Args:
        source: Held-out real samples.
        batch_size: Samples of one call.
        training: How networks are trained.
        trainings: How many.

    Example:
        >>> from limbeck.data import TensorSource
        >>> source = TensorSource(torch.eye(3), torch.arange(3))
        >>> m = Roles(student=Condensed(torch.eye(3), torch.arange(3)), teacher=nn.Linear(3, 3))
        >>> Condensation(source, training=Training(50, optim=Optim(lr=0.1)))(m)
        {'top1': 1.0}
    """

    task, primary = "data-set condensation", "top1"

    def __init__(
        self, source: Source, batch_size: int = 256, training: Training | None = None, trainings: int = 1
    ) -> None:
        self.source, self.batch_size = source, batch_size
        self.training, self.trainings = training or Training(), trainings

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        if role != "student":
            with evaluating(m[role].module):
                return {"top1": accuracy(whole(m[role], m[role].module), self.source, self.batch_size)}
        condensed: Any = m[role].module
        teacher = next(iter(m.teachers.values()))
        scores = []
        with torch.enable_grad():
            for k in range(self.trainings):
                network = train_on(condensed, whole(teacher, fresh(teacher.module, k)), self.training, k)
                scores.append(accuracy(network, self.source, self.batch_size))
        return {"top1": sum(scores) / len(scores)}


def whole(role: Role, network: nn.Module) -> nn.Module:
    """A network with what a role does to its inputs first; its parameters have the same order."""
    return network if role.preprocess is None else nn.Sequential(_First(role.preprocess), network)


class _First(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)
