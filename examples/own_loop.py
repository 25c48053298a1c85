"""A method in a training loop of one's own: no engine, no run folder."""

import torch
from torch import nn
from torch.nn import functional as F

from limbeck import Roles
from limbeck.data import load_data
from limbeck.methods.kd.method import KD


def mlp(width: int) -> nn.Module:
    """A network for the digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def main() -> None:
    """Train a teacher on the digits, distil it with `KD`, and print what both know."""
    torch.manual_seed(0)
    data = load_data("digits")
    everything = data.train.batch(torch.arange(len(data.train)), view=0)
    held_out = data.test.batch(torch.arange(len(data.test)), view=0)

    teacher, student = mlp(256), mlp(16)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.01)
    for _ in range(100):
        F.cross_entropy(teacher(everything.x), everything.y).backward()
        optimizer.step()
        optimizer.zero_grad()

    method, m = KD(temperature=4.0), Roles(teacher=teacher, student=student)
    m.freeze("teacher")
    optimizers = {"student": torch.optim.AdamW(student.parameters(), lr=0.01)}
    for _ in range(20):
        for rows in torch.randperm(len(data.train)).split(64):
            for update in method.step(m, data.train.batch(rows, view=0)):
                update.backward(m)
                optimizers[update.role].step()
                optimizers[update.role].zero_grad()

    for name, role in m.items():
        right = (role(held_out).argmax(1) == held_out.y).float().mean()
        print(f"{name}: {100 * right:.1f} % of {len(held_out)} held-out digits")


if __name__ == "__main__":
    main()
