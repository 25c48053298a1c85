"""Small programs that the engine's tests run."""

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from limbeck import Batch, Collect, Convert, Ema, Method, Optim, Roles, Search, Train, Update
from limbeck.data.sources import TensorSource


def net(*sizes, seed=0, norm=False):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def table(n=96, dims=8, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=g)
    y = (x @ torch.randn(dims, classes, generator=g)).argmax(1)
    return SimpleNamespace(train=TensorSource(x, y), validation=TensorSource(x[:32], y[:32]))


def pair(**more):
    return Roles(teacher=net(8, 32, 4, seed=1), student=net(8, 6, 4, seed=2), **more)


@dataclass(frozen=True)
class Mimic(Method):
    temperature: float = 2.0

    def step(self, m, batch):
        with torch.no_grad():
            t = m.teacher(batch)
        s = m.student(batch)
        yield Update("student", F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean"))


def accuracy(m):
    source = table().validation
    batch = source.batch(torch.arange(len(source)), 0)
    return {"top1": (m.student(batch).argmax(1) == batch.y).float().mean()}


@dataclass(frozen=True)
class Gan(Method):
    """Critic twice, generator once; each sees the other's updated weights."""

    trains = ("critic", "generator")
    frozen = ()

    def step(self, m, batch):
        x = m.generator(batch.noise)
        for _ in range(2):
            yield Update("critic", F.softplus(m.critic(x.detach())).mean() + F.softplus(-m.critic(batch.x)).mean())
        yield Update("generator", F.softplus(-m.critic(x)).mean())


def gan_roles():
    return Roles(critic=net(2, 8, 1, seed=3), generator=net(2, 8, 2, seed=4))


def gan_data(step, generator):
    return Batch(x=1 + torch.randn(12, 2, generator=generator), noise=torch.randn(12, 2, generator=generator))


@dataclass(frozen=True)
class Narrow:
    """Keeps the hidden units with the largest incoming weights; the record says which."""

    units: int

    def __call__(self, module):
        first, last = module[0], module[2]
        keep = first.weight.norm(dim=1).argsort(descending=True)[: self.units].sort().values
        new = self.rebuild(module, {"keep": keep.tolist()})
        with torch.no_grad():
            new[0].weight.copy_(first.weight[keep])
            new[0].bias.copy_(first.bias[keep])
            new[2].weight.copy_(last.weight[:, keep])
            new[2].bias.copy_(last.bias)
        return new, {"kind": "programs:Narrow.rebuild", "keep": keep.tolist()}

    @staticmethod
    def rebuild(module, record):
        width = len(record["keep"])
        return nn.Sequential(
            nn.Linear(module[0].in_features, width), nn.ReLU(), nn.Linear(width, module[2].out_features)
        )


@dataclass(frozen=True)
class Chain(Method):
    """Collect -> Convert -> Search -> Train -> Train with an average."""

    def stages(self, m, data):
        def targets(m, folder):
            every = data.train.batch(torch.arange(len(data.train)), 0)
            logits = m.teacher(every)
            (folder / "note.txt").write_text("targets")
            return {"targets": logits}

        artefact = yield Collect("targets", targets)
        record = yield Convert("student", Narrow(5), of="teacher")
        assert len(record["keep"]) == 5
        choice = yield Search([0.5, 2.0, 1.0], lambda m, t: -abs(t - 1.0))
        targets = artefact.value["targets"]

        def step(m, batch):
            s = m.student(batch) / choice.candidate
            rows = torch.searchsorted(data.train.ids.sort().values, batch.id)
            t = targets[data.train.ids.argsort()[rows]]
            return Update("student", (s - t).square().mean(), logs={"gap": (s - t).abs().mean()})

        yield Train(step, roles={"student": Optim("sgd", lr=0.05)}, frozen=["teacher"], data=data.train, name="latent")
        yield Train(
            step,
            roles={"student": None},
            frozen=["teacher"],
            data=data.train,
            ema={"average": Ema("student", 0.9)},
            name="label",
        )
