"""Engine step / hand-written loop, same loader and loss in both, on the CPU with one thread.

python benchmarks/engine.py --out benchmarks/results/engine.json
"""

import copy
import time
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import torch
from measuring import machine, options, report, spread
from torch import nn

from limbeck import Engine, Method, Optim, Roles, Update
from limbeck.data import TensorSource
from limbeck.engine.run import execute
from limbeck.losses import kl


class KD(Method):
    def step(self, m, batch):
        with torch.no_grad():
            t = m.teacher(batch)
        yield Update("student", kl(m.student(batch), t, temperature=4.0))


def hand_written(student, teacher, source, steps, batch_size):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, fused=True)
    teacher.eval().requires_grad_(False)
    done, epoch, losses = 0, 0, []
    while done < steps:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(epoch))
        for i in range(0, len(source), batch_size):
            batch = source.batch(order[i : i + batch_size], 0)
            with torch.no_grad():
                t = teacher(batch.x)
            loss = kl(student(batch.x), t, temperature=4.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            done += 1
            if done == steps:
                break
        epoch += 1
    return torch.stack(losses)


def mlp(*sizes):
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def measure(width, batch_size, steps, repeats):
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    source = TensorSource(x, torch.arange(4096) % 10)
    data = SimpleNamespace(train=source)
    teacher, student = mlp(64, 2 * width, 2 * width, 10), mlp(64, width, width, 10)
    optim = {"student": Optim("sgd", lr=0.01, momentum=0.9)}
    engine = Engine(steps=steps, batch_size=batch_size, log_every=50, evaluate_every=0)
    times = {"hand": [], "engine": []}
    for turn in range(repeats + 1):
        start = time.process_time()
        hand_written(copy.deepcopy(student), copy.deepcopy(teacher), source, steps, batch_size)
        times["hand"].append((time.process_time() - start) / steps)
        roles = Roles(teacher=copy.deepcopy(teacher), student=copy.deepcopy(student))
        start = time.process_time()
        execute(KD(), roles, data, engine, optim=optim)
        times["engine"].append((time.process_time() - start) / steps)
        if turn == 0:  # warms up
            times = {"hand": [], "engine": []}
    ratios = [e / h for e, h in zip(times["engine"], times["hand"], strict=True)]
    return {
        "hand_ms": round(median(times["hand"]) * 1e3, 3),
        "engine_ms": round(median(times["engine"]) * 1e3, 3),
        "ratio": spread(ratios),
    }


def main():
    given = options(__doc__.splitlines()[0], repeats=9)
    torch.set_num_threads(1)
    result = {
        "machine": machine(),
        "what": "process CPU time of a step; the ratio is the median over repeats that take turns",
        "step of about 1 ms": measure(96, 64, 600, given.repeats),
        "step of about 10 ms": measure(768, 128, 80, given.repeats),
    }
    report(result, given.out)


if __name__ == "__main__":
    main()
