"""A step of condensing beside the authors' public code, on the same network and the same images.

    git clone https://github.com/AngusDujw/FTD-distillation
    git clone https://github.com/AngusDujw/Diversity-Driven-Synthesis
    python benchmarks/condense_authors.py --ftd FTD-distillation --dwa Diversity-Driven-Synthesis --out FILE

- FTD: their flat network (`ReparamModule`) and their ConvNet (3 blocks of 32 channels), 100 images of 32 pixels, 10 inner steps
  on all of them without augmentation, a fresh network in every iteration as their loop has it; ours in both forms.
- DWA: their hooks on batch normalisation, torchvision's ResNet-18 with the stem for 32 pixels, one image of each of 10 classes,
  no adjustment of weights; their loop leaves the network's own gradients on, and never clears them.

That both differentiate the same loss is checked first. Ours is a whole run by the engine, longer less shorter, over the steps
between. What is compared takes turns, each in a process of its own; freed memory is kept, as by the command line, for both sides.
Times are of the process's CPU, on one thread.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from condense_sets import following
from measuring import machine, report, spread
from torch import Tensor, nn
from torchvision.models import resnet18

from limbeck import Optim, Roles
from limbeck.core.memory import keep_freed_memory
from limbeck.core.roles import Role
from limbeck.data import Data, TensorSource
from limbeck.data.condensed import Condensed
from limbeck.losses.trajectory import trajectory_matching
from limbeck.methods.dwa.method import DWA
from limbeck.methods.ftd.method import FTD
from limbeck.optim.unroll import call_flat, unroll
from limbeck.prove import fit, seeded
from limbeck.teachers.statistics import Recovery
from limbeck.teachers.trajectories import Trajectories, train_experts

INNER, SIZE, WEIGHT = 10, 0.02, 0.05
FEW, MANY = 2, 8
SIDES = {"ftd": ("theirs", "full", "constant"), "dwa": ("theirs", "a run")}
Calls = dict[str, Callable[[int], Any]]


def module(folder: Path, name: str) -> Any:
    """A module of theirs."""
    sys.path.insert(0, str(folder))
    return import_module(name)


def images(each: int) -> Condensed:
    g = torch.Generator().manual_seed(0)
    return Condensed(torch.rand(10 * each, 3, 32, 32, generator=g), torch.arange(10).repeat_interleave(each))


def seconds(call: Callable[[int], Any]) -> float:
    """Of one step: of many less few, after a first call, in which the process grows to the memory that it needs."""
    call(FEW)
    times = []
    for steps in (FEW, MANY):
        start = time.process_time()
        call(steps)
        times.append(time.process_time() - start)
    return (times[1] - times[0]) / (MANY - FEW)


def peak() -> float:
    """Of this process's memory, in MB; `ru_maxrss` would be that of the process which started it."""
    (line,) = (v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


def turns(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both sides' times, one after another."""
    names = SIDES[part]
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    call = [sys.executable, __file__, "--ftd", str(given.ftd), "--dwa", str(given.dwa), "--alone", part]
    for _ in range(given.rounds):
        for name in names:
            told = subprocess.run([*call, name], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            times[name].append(float(told[-2]))
            peaks[name] = float(told[-1])
    own = {
        f"theirs / ours, {name}": spread([a / b for a, b in zip(times["theirs"], times[name], strict=True)])
        for name in names
        if name != "theirs"
    }
    return {"seconds of theirs": spread(times["theirs"]), "peak of the process in MB": peaks, **own}


def gap(a: Tensor, b: Tensor) -> float:
    """How far two gradients are apart, of their length."""
    found = float((a - b).norm() / a.norm())
    assert found < 1e-4, f"they do not differentiate the same loss: {found}"
    return found


@contextmanager
def trajectories(folder: Path) -> Iterator[tuple[Callable[[], float], Calls]]:
    """How far the gradients are apart, and both sides' loops."""
    networks, flat = module(folder, "networks"), module(folder, "reparam_module").ReparamModule
    small = images(10)

    def make() -> nn.Module:
        return networks.ConvNet(3, 10, 32, 3, "relu", "instancenorm", "avgpooling", (32, 32))

    net = seeded(0, make)
    source = TensorSource(small.x.detach(), small.y)
    same: dict[str, Any] = {"experts": 1, "epochs": 2, "starts": 1, "expert_batch_size": 20, "radius": 0.0, "ema": 0.0}
    method = FTD(**same, student_steps=INNER, expert_epochs=2, step_size=SIZE, step_size_lr=1e-4)
    with tempfile.TemporaryDirectory() as kept:
        train_experts(net, source, kept, method.expert_training)
        experts = Trajectories(kept, net, method.expert_training)

        def ends(x: Tensor) -> list[Tensor]:
            return [experts(0, epoch).to(x.dtype) for epoch in (0, 2)]

        def matched(x: Tensor, size: Tensor) -> Tensor:
            """Their inner loop."""
            start, target = ends(x)
            student, params = flat(make().to(x.dtype)), [start.clone().requires_grad_()]
            student.train()
            for _ in range(INNER):
                rows = torch.randperm(len(x))  # as they draw batches, here of all
                loss = F.cross_entropy(student(x[rows], flat_param=params[-1]), small.y[rows])
                (g,) = torch.autograd.grad(loss, params[-1], create_graph=True)
                params.append(params[-1] - size * g)
            return F.mse_loss(params[-1], target, reduction="sum") / F.mse_loss(start, target, reduction="sum")

        def theirs(steps: int) -> None:
            x, size = small.x.detach().clone().requires_grad_(), torch.tensor(SIZE, requires_grad=True)
            optimizers = [torch.optim.SGD([p], lr=lr, momentum=0.5) for p, lr in ((x, 1.0), (size, 1e-4))]
            for _ in range(steps):
                loss = matched(x, size)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()

        def ours(form: str, steps: int) -> None:
            kind = following(method)
            kind.known = experts
            m = Roles(teacher=net, student=Condensed(small.x.detach().clone(), small.y, info=small.info))
            optim = {"student": Optim("sgd", lr=1.0, momentum=0.5)}
            fit(kind(**vars(replace(method, form=form))), m, Data(train=source), optim, steps=steps, batch_size=1)  # type: ignore[arg-type]

        def apart() -> float:
            """In double precision: in single, ReLUs change sides with the order of images, which was seen to make 0.006."""
            x, size = small.x.detach().double().requires_grad_(), torch.tensor(SIZE).double()
            double = deepcopy(net).double()
            (there,) = torch.autograd.grad(matched(x, size), x)
            start, target = ends(x)
            (end,) = unroll(lambda w, i, x: F.cross_entropy(call_flat(double, w, x), small.y), start, x, size, INNER)
            (here,) = torch.autograd.grad(trajectory_matching(end, start, target), x)
            return gap(there, here)

        yield apart, {"theirs": theirs, "full": partial(ours, "full"), "constant": partial(ours, "constant")}


@contextmanager
def statistics(folder: Path) -> Iterator[tuple[Callable[[], float], Calls]]:
    """How far the gradients are apart, and both sides' loops."""
    utils = module(folder / "distillation", "utils")
    small = images(1)
    net: Any = seeded(0, lambda: resnet18(num_classes=10)).eval()
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()

    def recovered(hooks: list[Any], x: Tensor) -> Tensor:
        loss = F.cross_entropy(net(x), small.y)
        return loss + WEIGHT * torch.stack([(1 if k else 10.0) * hook.r_feature for k, hook in enumerate(hooks)]).sum()

    def hooked() -> list[Any]:
        layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        return [utils.BNFeatureHook(layer, SimpleNamespace(r_var=1.0)) for layer in layers]

    def theirs(steps: int) -> None:
        net.requires_grad_(True)
        hooks, x = hooked(), small.x.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1, betas=(0.5, 0.9))
        for k in range(steps):
            optimizer.zero_grad()
            loss = recovered(hooks, torch.roll(x, (k % 4, k % 3), (2, 3)))
            loss.backward()
            optimizer.step()
            x.data = utils.clip_image(x.data, "cifar10")
        for hook in hooks:
            hook.close()
        net.zero_grad()

    def ours(steps: int) -> None:
        method = DWA(rho=0.0, variance_weight=1.0, bn_weight=WEIGHT, label_epochs=0)
        m = Roles(teacher=net, student=Condensed(small.x.detach().clone(), small.y, info=small.info))
        source = TensorSource(small.x.detach(), small.y)
        fit(method, m, Data(train=source), {"student": Optim("adam", lr=0.1, betas=(0.5, 0.9))}, steps=steps)

    def apart() -> float:
        hooks, x = hooked(), small.x.detach().clone().requires_grad_()
        (there,) = torch.autograd.grad(recovered(hooks, x), x)
        for hook in hooks:
            hook.close()
        (here,) = torch.autograd.grad(Recovery(WEIGHT)(Role("teacher", net), x, small.y), x)
        return gap(there, here)

    yield apart, {"theirs": theirs, "a run": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ftd", "dwa"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", nargs=2, metavar=("PART", "NAME"), help="one side: its seconds, and MB at the peak")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result: dict[str, Any] = {"machine": machine("limbeck", "torchvision")}
    for part, loops in (("ftd", trajectories), ("dwa", statistics)):
        if given.alone and given.alone[0] != part:
            continue
        with loops(getattr(given, part)) as (apart, calls):
            if given.alone:
                print(seconds(calls[given.alone[1]]), peak())
                return
            same = apart()
        result[part] = {"gap of the gradients": same, **turns(part, given)}
    report(result, given.out)


if __name__ == "__main__":
    main()
