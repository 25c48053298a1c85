"""What condensing costs, as ratios within one run.

    python benchmarks/condense_speed.py --out benchmarks/results/condense-speed.json

- An epoch of 20 experts trained side by side (`vmap` over stacked weights) against one after another, each a plain loop of
  torch: 1,257 digits, batches of 64, an MLP 64-64-10 and a ConvNet of two blocks of 16 channels; seconds, on one and two threads.
- Trajectory matching with 5, 20 and 50 inner steps, ConvNet, 100 images: time of a step in constant memory over the full graph's,
  and the memory of each at its peak, by the records of torch's allocator.
- The same step over one written as the published code of MTT is: flat parameters through torch's `functional_call`, and all of
  it differentiated by torch.
- A step of recovery from batch statistics, 10 images of each of 10 classes in 10 slots: slot after slot over all of them in one
  call, by ConvNets of three blocks of 32 channels with batch normalisation, at 8 and 32 pixels.

Times are of the process's CPU, on one thread, where nothing else is said; what is compared takes turns, in an order that is drawn
for each round. Freed memory is kept, as by the command line, for both sides.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import machine, options, report, spread
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from limbeck.core.memory import keep_freed_memory
from limbeck.core.roles import Role
from limbeck.data import TensorSource, load_data
from limbeck.data.condensed import from_source
from limbeck.evaluate.condensation import fresh
from limbeck.losses.trajectory import trajectory_matching
from limbeck.nn.convnet import ConvNet
from limbeck.nn.mlp import mlp
from limbeck.optim.unroll import call_flat, flatten, unroll
from limbeck.prove import seeded
from limbeck.teachers.statistics import Recovery
from limbeck.teachers.trajectories import ExpertTraining, train_experts

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), mlp(64, 64, 10)),
    "convnet": lambda: ConvNet(10, 1, 8, 16, 2),
}


def together(net: nn.Module, source: Any, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_experts(net, source, folder, ExpertTraining(count, 1, 0.05, batch_size=64))


def one_by_one(net: nn.Module, source: Any, count: int) -> None:
    """As a plain script does it; the weights are written after the epoch too."""
    with tempfile.TemporaryDirectory() as folder:
        for k in range(count):
            own = fresh(net, k)
            torch.save(own.state_dict(), Path(folder) / f"{k}-0.pt")
            optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
            for rows in torch.randperm(len(source)).split(64):
                loss = F.cross_entropy(own(source.x[rows]), source.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.save(own.state_dict(), Path(folder) / f"{k}-1.pt")


def published(
    net: nn.Module, start: Tensor, images: Tensor, y: Tensor, size: Tensor, steps: int, target: Tensor
) -> Tensor:
    """The inner loop of MTT's code, from its description: a list of flat parameters, all in one graph."""
    params, shapes = [start.detach().requires_grad_()], {name: p.shape for name, p in net.named_parameters()}
    for _ in range(steps):
        parts = zip(shapes.items(), params[-1].split([s.numel() for s in shapes.values()]), strict=True)
        named = {name: part.view(shape) for (name, shape), part in parts}
        loss = F.cross_entropy(functional_call(net, named, (images,)), y)
        (g,) = torch.autograd.grad(loss, params[-1], create_graph=True)
        params.append(params[-1] - size * g)
    whole = F.mse_loss(params[-1], target, reduction="sum") / F.mse_loss(start, target, reduction="sum")
    whole.backward()
    return whole


def matching(form: str, steps: int) -> Callable[[], None]:
    net = seeded(0, NETWORKS["convnet"])
    small = from_source(load_data("digits").train, 10)
    size = torch.tensor(0.01, requires_grad=True)
    start = flatten([p.detach() for p in net.parameters()])
    target = start + 0.01 * torch.randn(len(start), generator=torch.Generator().manual_seed(0))

    def inner(w: Tensor, i: int, images: Tensor) -> Tensor:
        return F.cross_entropy(call_flat(net, w, images), small.y)

    def step() -> None:
        small.x.grad = size.grad = None
        if form == "published":
            published(net, start, small.x, small.y, size, steps, target)
            return
        (end,) = unroll(inner, start, small.x, size, steps, form=form)  # type: ignore[arg-type]
        trajectory_matching(end, start, target).backward()

    return step


def recovering(size: int) -> dict[str, Callable[[], None]]:
    channels = 1 if size == 8 else 3
    net = seeded(0, lambda: ConvNet(10, channels, size, 32, 3, norm="batch")).eval().requires_grad_(False)
    role, recovery = Role("teacher", net), Recovery()
    x = torch.rand(100, channels, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(10).repeat(10)

    def alone() -> None:
        parts = zip(x.split(10), y.split(10), strict=True)
        torch.autograd.grad(torch.stack([recovery(role, a, b) for a, b in parts]).sum(), x)

    def together() -> None:
        torch.autograd.grad(recovery(role, x, y, groups=10).sum(), x)

    return {"alone": alone, "together": together}


def peak(step: Callable[[], None]) -> int:
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        step()
    held = top = 0
    for event in records.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top


def turns(
    what: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in what}
    for k in range(rounds + 1):
        for name in random.Random(k).sample(list(what), len(what)):
            start = clock()
            what[name]()
            if k:
                times[name].append(clock() - start)
    return times


def main() -> None:
    args = options("What condensing costs", experts=20, rounds=5)
    torch.set_num_threads(1)
    keep_freed_memory()
    part = load_data("digits").train
    batch = part.batch(torch.arange(len(part)), 0)
    source = TensorSource(batch.x, batch.y)
    result: dict[str, Any] = {"machine": machine("limbeck"), "experts": {}, "matching": {}, "recovery": {}}
    for name, make in NETWORKS.items():
        net, found = seeded(0, make), {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            times = turns({
                "together": lambda net=net: together(net, source, args.experts),
                "one by one": lambda net=net: one_by_one(net, source, args.experts),
            }, args.rounds, time.perf_counter)  # fmt: skip
            pairs = zip(times["one by one"], times["together"], strict=True)
            found[f"{threads} threads"] = spread([a / b for a, b in pairs])
        torch.set_num_threads(1)
        result["experts"][name] = {"one by one / together": found}
    for steps in (5, 20, 50):
        forms = {form: matching(form, steps) for form in ("full", "constant", "published")}
        times = turns(forms, args.rounds)
        ratio = {
            f: spread([a / b for a, b in zip(times[f], times["full"], strict=True)]) for f in ("constant", "published")
        }
        result["matching"][str(steps)] = {
            "time over the full graph's": ratio,
            "peak in MB": {form: round(peak(step) / 1e6, 2) for form, step in forms.items()},
        }
    for size in (8, 32):
        times = turns(recovering(size), 4 * args.rounds)
        each = zip(times["alone"], times["together"], strict=True)
        result["recovery"][f"{size} pixels"] = {"slot after slot / together": spread([a / b for a, b in each])}
    report(result, args.out)


if __name__ == "__main__":
    main()
