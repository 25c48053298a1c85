"""Models and data of one's own, for the command line.

limbeck distill --teacher examples/own_model.py:teacher --student examples/own_model.py:student \
    --data examples/own_model.py:digits --method kd --epochs 5 --set optim.student.lr=0.01
"""

import torch
from torch import nn
from torch.nn import functional as F

from limbeck.data import Data, load_data


class Net(nn.Module):
    """Any module will do: it is called with the inputs and returns the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[B, 10]` of images `[B, 1, 8, 8]`."""
        return self.head(F.max_pool2d(self.stem(x).relu(), 2).flatten(1))


def digits() -> Data:
    """Data: whatever `limbeck.data.load_data` takes may be returned, such as tensors `(x, y)` or a data set of torch."""
    return load_data("digits")


def teacher() -> nn.Module:
    """A trained teacher. Here it is trained on the spot; yours reads a file."""
    torch.manual_seed(0)
    train = digits().train
    net, everything = Net(32), train.batch(torch.arange(len(train)), view=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(40):
        F.cross_entropy(net(everything.x), everything.y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def student() -> nn.Module:
    """A student, before training."""
    torch.manual_seed(1)
    return Net(4)
