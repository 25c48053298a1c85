"""Three programs with the shapes that the methods so far do not have: alternating updates, a chain of stages, a search."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Collect, Convert, Method, Optim, Roles, Search, Train, Update
from limbeck.convert.layers import InheritLayers
from limbeck.losses import logit_mse


@dataclass(frozen=True)
class Alternating(Method):
    """Critic twice, then the generator against the critic's new weights."""

    noise: int = 3
    trains = ("critic", "generator")
    frozen = ()

    def step(self, m: Roles, batch: Batch) -> Iterator[Update]:
        noise = batch.x[:, : self.noise]  # of the sample, so that parts of a batch see what the whole sees
        fake = m.generator(noise)
        for _ in range(2):
            real, wrong = m.critic(batch.x), m.critic(fake.detach())
            yield Update("critic", F.softplus(-real).mean() + F.softplus(wrong).mean())
        yield Update("generator", F.softplus(-m.critic(fake)).mean(), logs={"level": fake.mean()})


@dataclass(frozen=True)
class Staged(Method):
    """The teacher's answers are stored; the student takes its layers, a temperature is chosen, then it learns, twice."""

    layers: int = 2

    def stages(self, m: Roles, data) -> Generator:
        def answers(m, folder):
            every = data.train.batch(torch.arange(len(data.train)), 0)
            logits = m.teacher(every)
            (folder / "count.txt").write_text(str(len(logits)))
            return {"logits": logits}

        stored = yield Collect("answers", answers)
        yield Convert("student", InheritLayers(self.layers), of="teacher")
        choice = yield Search([0.25, 1.0, 4.0], lambda m, t: self._score(m, data, t), name="temperature")
        targets, order = stored.value["logits"], data.train.ids.argsort()

        def step(m, batch):
            rows = order[torch.searchsorted(data.train.ids[order], batch.id)]
            return Update("student", logit_mse(m.student(batch) / choice.candidate, targets[rows]))

        def task(m, batch):
            return F.cross_entropy(m.student(batch), batch.y)

        yield Train(step, roles={"student": None}, frozen=["teacher"], data=data.train, name="mimic")
        slow = {"student": Optim("sgd", lr=0.02, momentum=0.9)}
        yield Train(task, roles=slow, frozen=["teacher"], data=data.train, epochs=1, name="task")

    @staticmethod
    def _score(m: Roles, data, temperature: float) -> float:
        every = data.train.batch(torch.arange(len(data.train)), 0)
        return -logit_mse(m.student(every) / temperature, m.teacher(every)).item()


@dataclass(frozen=True)
class Choosing(Method):
    """A choice is the product: which layers of the teacher make the best student as they are."""

    keep: int = 2

    def stages(self, m: Roles, data) -> Generator:
        every = data.train.batch(torch.arange(len(data.train)), 0)

        def score(m, layers):
            with torch.no_grad():
                return -F.cross_entropy(InheritLayers(layers)(m.teacher.module)[0](every.x), every.y).item()

        candidates = [[a, b] for a in range(4) for b in range(a + 1, 4)]
        choice = yield Search(candidates, score, name="layers")
        yield Convert("student", InheritLayers(choice.candidate), of="teacher")


class Residual(nn.Module):
    """One of the repeated layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x):
        return x + 0.3 * torch.tanh(self.map(x))


def tower(inputs: int, width: int, depth: int, outputs: int) -> nn.Module:
    """A model with a list of repeated layers."""
    layers = nn.Sequential(*[Residual(width) for _ in range(depth)])
    return nn.Sequential(nn.Linear(inputs, width), layers, nn.Linear(width, outputs))
