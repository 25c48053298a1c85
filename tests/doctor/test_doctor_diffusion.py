"""The doctor's checks of diffusion models: a teacher that predicts something else, the scale of samples, guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data import TensorSource
from limbeck.data.noise import Noise
from limbeck.diffusion import (
    EDM,
    Cosine,
    Denoiser,
    Draws,
    EDMDenoiser,
    Experts,
    GaussianMixture,
    RectifiedFlow,
    Sampler,
)
from limbeck.diffusion.schedule import PREDICTIONS, Table
from limbeck.diffusion.scores import check_denoisers, noisy, predicted, schedule_of
from limbeck.diffusion.signs import likely_prediction, network_of, warn_if_misdeclared
from limbeck.doctor import Diagnosis, diagnose
from limbeck.engine.settings import Engine
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import seeded

SHAPE, CLASSES = (3, 4, 4), 4


def truth(schedule: Any) -> GaussianMixture:
    """A pattern of pixels for each class."""
    means = torch.randn(CLASSES, 48, generator=torch.Generator().manual_seed(0)).sign()
    return GaussianMixture(means, 0.3, schedule, labels=torch.arange(CLASSES))


class Exact(nn.Module):
    """A network that predicts exactly this, of images that it knows."""

    def __init__(self, schedule: Any, kind: Any) -> None:
        super().__init__()
        self.known, self.kind, self.weight = truth(schedule), kind, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t.clamp(1e-3, 1 - 1e-3)  # some predictions are not defined at an end
        return self.known.schedule.convert(self.known(x, t, condition), x, t, "sample", self.kind) + self.weight


def teacher(kind: str, declared: Any, schedule: Any = None) -> Denoiser:
    schedule = schedule or Cosine()
    return Denoiser(Exact(schedule, kind), schedule, declared, null=CLASSES)


@dataclass(frozen=True)
class Follow(Method):
    """The student predicts what the guided teacher predicts."""

    guidance: float | tuple[float, float] = 1.0
    logits = ()

    def step(self, m: Roles, batch: Batch) -> Tensor:
        x_t, t = noisy(schedule_of(m.teacher), Draws(m, batch), "x", batch.x, 0.02, 0.98)
        scale = self.guidance[1] if isinstance(self.guidance, tuple) else self.guidance
        with torch.no_grad():
            target = predicted(m.teacher, x_t, t, batch.get("y"), scale)
        return (m.student(x_t, t=t, condition=batch.get("y")) - target).square().mean()


@dataclass
class Bench:
    """A job, built by hand."""

    roles: Roles
    data: Any
    method: Any = field(default_factory=Follow)
    engine: Engine = field(default_factory=lambda: Engine(batch_size=32, epochs=2))
    optim: Any = field(default_factory=lambda: {"student": Optim("adam", lr=1e-3)})
    evaluate: Any = None
    recipe: Any = None
    out: Path = Path("unused")
    taught: Any = None


def images(scale: float = 1.0) -> TensorSource:
    y = torch.arange(64) % CLASSES
    x = truth(Cosine()).sample(64, torch.Generator().manual_seed(1), y).view(-1, *SHAPE)
    return TensorSource(scale * x, y, ids=torch.arange(64))


def examined(net: nn.Module, source: Any = None, guidance: Any = 1.0) -> Diagnosis:
    schedule: Any = net.schedule
    student = Denoiser(seeded(0, lambda: TimeMLP(48, 16, classes=CLASSES)), schedule, "sample", null=CLASSES)
    data = SimpleNamespace(train=source or Noise(SHAPE, 64, classes=CLASSES))
    return diagnose(Bench(Roles(teacher=net, student=student), data, Follow(guidance)))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), Table.scaled_linear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_what_a_network_predicts_is_told_from_samples(kind: str, schedule: Any) -> None:
    source, net = images().batch(torch.arange(32), 0), teacher(kind, kind, schedule)
    noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(2))
    assert likely_prediction(net, noise, source.y, source.x) == (kind,)
    both = ("epsilon", "flow_prediction")
    assert likely_prediction(net, noise, source.y) == (both if kind in both else ())


@pytest.mark.parametrize("data", [images, lambda: None], ids=["images", "noise"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_teacher_as_declared_passes(kind: str, data: Any) -> None:
    report = examined(teacher(kind, kind), data(), guidance=3.0)
    assert report["prediction"].severity == "ok", str(report["prediction"])
    assert report["guidance"].severity == "ok"
    assert report["sample_scale"].severity == ("ok" if data() else "skipped")


@pytest.mark.parametrize(
    ("kind", "declared", "real", "severity", "words"),
    [
        ("epsilon", "v_prediction", True, "error", "epsilon, by what it says"),
        ("v_prediction", "epsilon", True, "error", "v_prediction, by what it says"),
        ("sample", "v_prediction", True, "error", "sample, by"),
        ("flow_prediction", "epsilon", True, "error", "flow_prediction, by"),
        ("epsilon", "v_prediction", False, "error", "epsilon or flow_prediction"),
        ("v_prediction", "epsilon", False, "warning", "says nothing of pure noise"),
    ],
)
def test_a_teacher_declared_as_something_else(kind: str, declared: str, real: bool, severity: str, words: str) -> None:
    finding = examined(teacher(kind, declared), images() if real else None)["prediction"]
    assert finding.severity == severity, str(finding)
    assert words in str(finding)
    assert "prediction_type" in (finding.fix or "")


def test_a_teacher_without_training_is_told_from_a_wrong_one() -> None:
    net = Denoiser(seeded(0, lambda: TimeMLP(48, 16, classes=CLASSES)), Cosine(), "epsilon", null=CLASSES)
    finding = examined(net, images())["prediction"]
    assert finding.severity == "warning"
    assert "weights were loaded" in (finding.fix or "")


@pytest.mark.parametrize(("scale", "words"), [(5.5, "large beside"), (0.1, "small beside")])
def test_samples_of_another_scale(scale: float, words: str) -> None:
    report = examined(teacher("flow_prediction", "flow_prediction"), images(scale))
    assert report["sample_scale"].severity == "warning"
    assert words in str(report["sample_scale"])
    assert "scaling_factor" in (report["sample_scale"].fix or "")
    assert report["prediction"].severity == "ok"  # which such samples do not tell


def test_samples_have_the_scale_of_their_schedule() -> None:
    net = EDMDenoiser(lambda x, t, y: x, EDM(data=5.0), null=CLASSES)
    report = examined(net, images(5.0))
    assert report["sample_scale"].severity == "ok"
    assert report["prediction"].severity == "skipped"


def test_too_much_guidance() -> None:
    finding = examined(teacher("epsilon", "epsilon"), images(), guidance=(1.0, 60.0))["guidance"]
    assert finding.severity == "warning"
    assert "at 60, " in (finding.found or "")
    assert "lower the scale" in (finding.fix or "")
    assert examined(teacher("epsilon", "epsilon"), images())["guidance"].severity == "skipped"


def test_networks_that_can_be_judged() -> None:
    net = teacher("epsilon", "epsilon")
    assert network_of(Sampler(Experts([net, net], bounds=(0.5,)), (1.0,))) is net
    assert network_of(truth(Cosine())) is None
    assert network_of(EDMDenoiser(nn.Identity())) is None
    assert network_of(Denoiser(nn.Identity(), EDM(), "epsilon")) is None


def test_the_first_look_of_a_run_warns_of_a_network_that_returns_noise() -> None:
    batch = Batch(x=torch.zeros(2, *SHAPE), y=torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="declared to predict v_prediction, and of pure noise it returns 100%"):
        check_denoisers(Roles(teacher=teacher("epsilon", "v_prediction")), "teacher", batch=batch)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.filterwarnings("error")
def test_the_first_look_of_a_run_is_silent(kind: str) -> None:
    batch = Batch(x=torch.zeros(2, *SHAPE), y=torch.tensor([0, 1]))
    check_denoisers(Roles(teacher=teacher(kind, kind)), "teacher", batch=batch)
    check_denoisers(Roles(teacher=truth(Cosine())), "teacher", batch=batch)
    warn_if_misdeclared(
        teacher("epsilon", "sample"), torch.zeros(2, 5), batch.y
    )  # other checks tell that it does not fit
