"""A run warns of numbers beyond a method's limits, once in a stage, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from limbeck import Engine, Method, Optim, Roles, Update
from limbeck.core.limits import Limit
from limbeck.core.stages import Train
from limbeck.data import TensorSource
from limbeck.engine.progress import Lines, Silent
from limbeck.engine.run import execute
from limbeck.engine.watch import Watch

OVER = Limit("error/a", 2.0, "a is lost", "find it", over="error/b")
ALONE = Limit("size", 3.0, "it grows", "stop it")


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass(frozen=True)
class Growing(Method):
    """Logs numbers that grow with the steps, in two stages."""

    limits = (OVER, ALONE)
    frozen = ()

    def stages(self, m: Roles, data: Any) -> Any:
        for name in ("first", "second"):
            yield Train(self.step, roles={"student": None}, frozen=(), data=data.train, name=name)

    def step(self, m: Roles, batch: Any) -> Update:
        loss = m.student(batch).square().mean()
        step = torch.tensor(float(m.step))
        return Update("student", loss, logs={"size": step, "error/a": step, "error/b": torch.tensor(100.0)})


def run(method: Method, **more: Any) -> list[str]:
    heard, source = Heard(), TensorSource(torch.randn(16, 2), ids=torch.arange(16))
    engine = Engine(steps=8, batch_size=4, log_every=2, evaluate_every=0)
    execute(method, Roles(student=nn.Linear(2, 1)), SimpleNamespace(train=source), engine, progress=heard, **more)
    return heard.said


def test_a_run_warns_once_in_each_stage() -> None:
    said = run(Growing())
    assert len(said) == 2
    assert said[0] == "warning: stage 'first', step 6: it grows\n    found: size 4.5\n    fix: stop it"
    assert "stage 'second', step 6" in said[1]


def test_a_method_without_limits_is_not_watched() -> None:
    class Plain(Growing):
        limits = ()

    assert run(Plain()) == []


@pytest.mark.parametrize(
    ("a", "b", "told"), [(5.0, 2.0, 1), (4.0, 2.0, 0), (5.0, 0.0, 1), (0.0, 0.0, 0), (5.0, None, 0)]
)
def test_a_multiple_of_another_number(a: float, b: float | None, told: int) -> None:
    heard: list[str] = []
    row = {"stage": "train", "step": 3, "train/error/a": a}
    Watch([OVER, ALONE], heard.append)(row if b is None else {**row, "train/error/b": b})
    assert len(heard) == told
    assert not heard or f"error/a {a:.3g}, error/b {b:.3g}" in heard[0]


@pytest.mark.parametrize(("rate", "lost"), [(3e-3, False), (0.5, True)])
def test_a_follower_that_diverges_is_named_and_a_sound_one_is_not(rate: float, lost: bool) -> None:
    from limbeck.data.noise import Noise
    from limbeck.diffusion import Denoiser, RectifiedFlow, ring
    from limbeck.methods.disback.method import DisBack
    from limbeck.nn.time_mlp import TimeMLP
    from limbeck.prove import seeded

    def network() -> nn.Module:
        return Denoiser(seeded(0, lambda: TimeMLP(2, 32)), RectifiedFlow(), "flow_prediction")

    heard, m = Heard(), Roles(teacher=ring(8, schedule=RectifiedFlow()), student=network(), fake=network())
    optim = {"student": Optim("adam", lr=1e-3), "fake": Optim("adam", lr=rate)}
    engine = Engine(steps=40, batch_size=64, log_every=5, evaluate_every=0)
    data = SimpleNamespace(train=Noise((2,), 640))
    execute(DisBack(nodes=()), m, data, engine, optim=optim, progress=heard)
    assert any("'fake' has lost" in text for text in heard.said) == lost
    assert lost or not heard.said


def test_a_conversion_is_announced_without_steps(capsys):
    for name, total in (("copy the teacher", None), ("train", 3)):
        Lines().stage(name, total)
    assert capsys.readouterr().err.splitlines() == ["copy the teacher", "train: 3 steps"]
