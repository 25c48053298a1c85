"""Data and a teacher for the tests of the output store; run as a program, it collects and may be killed on the way."""

import os
import signal
import sys
import time

import torch
from torch import nn

from limbeck.core.batch import Batch


class Points:
    """Vectors that are a function of (id, view)."""

    def __init__(self, size=50, views=2, dim=5, name="points"):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randperm(10 * size, generator=generator)[:size] * 7**15 - 10**12
        self.x = torch.randn(size, dim, generator=generator)
        self.views, self.name = views, name

    def __len__(self):
        return len(self.ids)

    def batch(self, rows, view):
        x = self.x[rows] * (1 + view)
        return Batch(x=x, id=self.ids[rows], view=torch.full_like(rows, view))

    def fingerprint(self):
        return self.name


def net(classes=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.Sequential(nn.ReLU(), nn.Linear(8, 8)),
        nn.Dropout(),
        nn.Linear(8, classes),
    )


class Slow(nn.Module):
    """Tells that a batch was computed, and gives time to be killed."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        print("batch", flush=True)
        time.sleep(0.02)
        return self.net(x)


def collect_slowly(folder):
    from limbeck.teachers.collect import collect

    return collect(Slow(), Points(200, views=2), folder, batch_size=8, dtype="fp32", shard_bytes=2000)


def main():
    from limbeck.teachers import collect as _  # noqa: F401
    from limbeck.teachers import store  # noqa: F401

    module = sys.modules["limbeck.teachers.writer"]
    torch.set_num_threads(1)
    module._FLUSH_SECONDS = 0.0
    if "half" in sys.argv:  # die with half of a shard's bytes on disk
        save, saved = module.save_file, []

        def half(columns, path, metadata):
            saved.append(path)
            save(columns, path, metadata)
            if len(saved) == 7:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        module.save_file = half
    collect_slowly(sys.argv[1])


if __name__ == "__main__":
    main()
