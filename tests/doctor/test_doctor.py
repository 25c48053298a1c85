"""Each check of the doctor has a job that it fails on, and a job that it passes."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Convert, Train
from limbeck.core.update import Update
from limbeck.data import TensorSource
from limbeck.doctor import CHECKS, Diagnosis, diagnose
from limbeck.engine.settings import Engine
from limbeck.methods.kd.method import KD


@dataclass
class Bench:
    """A job as `limbeck.api.build` makes it, built by hand."""

    method: Any
    roles: Roles
    data: Any
    engine: Engine = field(default_factory=lambda: Engine(batch_size=32, epochs=2))
    optim: Any = field(default_factory=lambda: {"student": Optim("sgd", lr=0.05)})
    evaluate: Any = None
    recipe: Any = None
    out: Path = Path("unused")
    taught: Any = None


def samples(n: int = 64, width: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=g)
    return x, (x @ torch.randn(width, classes, generator=g)).argmax(1)


def taught(classes: int = 4) -> nn.Linear:
    """A teacher that knows the labels of `samples`."""
    g = torch.Generator().manual_seed(0)
    torch.randn(64, 6, generator=g)
    teacher = nn.Linear(6, 4)
    with torch.no_grad():
        teacher.weight.copy_(torch.randn(6, 4, generator=g).T)
        teacher.bias.zero_()
    return teacher


def student(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))


def job(
    method: Any = None, *, teacher: Any = None, pupil: Any = None, x: Any = None, y: Any = None, **more: Any
) -> Bench:
    default_x, default_y = samples()
    x, y = default_x if x is None else x, default_y if y is None else y
    source = more.pop("source", None) or TensorSource(x, y, ids=torch.arange(len(y)))
    roles = more.pop("roles", None) or Roles(teacher=teacher or taught(), student=pupil or student())
    return Bench(method or KD(), roles, SimpleNamespace(train=source), **more)


def test_a_good_job_passes_every_check() -> None:
    report = diagnose(job())
    skipped = {f.check: f.what for f in report.findings if f.severity != "ok"}
    assert skipped == {
        "class_order": "no class names are known",
        "vocabulary": "the data are no texts",
        "normalisation": "the data are no images",
        "prediction": "the teacher is no diffusion model",
        "sample_scale": "the teacher is no diffusion model",
        "guidance": "the teacher is no diffusion model",
    }
    assert report.ok
    assert len(report) == 0
    assert {f.check for f in report.findings} == set(CHECKS)
    assert "19 checks: 0 errors, 0 warnings" in report.render()


# Failing examples: for each a job, the check, its severity, and words of the message.


class Dropping(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.5))


class Relearning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(6), taught()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.training = True
        return self.fc(self.norm(x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = taught()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.mean(0), 0.1)
        return self.fc(x - self.mean)


class Thawing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.requires_grad_(True)
        return super().forward(x)


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.never = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class TwoTerms(Method):
    feature_weight: float = 1.0
    log_terms: bool = True

    def step(self, m: Roles, batch: Any) -> Any:
        s = m.student(batch)
        label = F.cross_entropy(s, batch.y)
        feature = s.detach().square().mean() + 1e-9 * s.mean()
        logs = {"label": label, "feature": feature} if self.log_terms else {}
        yield Update("student", label + self.feature_weight * feature, logs=logs)


@dataclass(frozen=True)
class Leaky(Method):
    trains = ("student", "critic")
    frozen = ("teacher",)

    def step(self, m: Roles, batch: Any) -> Any:
        s = m.student(batch)
        yield Update("critic", m.critic(s).mean())
        yield Update("student", (m.student(batch) - m.teacher(batch).detach()).square().mean())


@dataclass(frozen=True)
class Unshielded(Method):
    def step(self, m: Roles, batch: Any) -> Any:
        return (m.student(batch) - m.teacher(batch)).square().mean()


@dataclass(frozen=True)
class Forgetful(Method):
    trains = ("student", "critic")

    def step(self, m: Roles, batch: Any) -> Any:
        yield Update("student", (m.student(batch) - m.teacher(batch)).square().mean())


@dataclass(frozen=True)
class Logarithm(Method):
    def step(self, m: Roles, batch: Any) -> Any:
        return m.student(batch).log().mean()


@dataclass(frozen=True)
class Constant(Method):
    def step(self, m: Roles, batch: Any) -> Any:
        return (m.student(batch) * 0).sum()


@dataclass(frozen=True)
class Mimic(Method):
    def step(self, m: Roles, batch: Any) -> Any:
        with torch.no_grad():
            t = m.teacher(batch)
        return (m.student(batch) - t).square().mean()


class Named(nn.Module):
    """A network with class names, as timm, transformers or one's own carry them."""

    def __init__(self, net: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.net = net
        self.__dict__.update(attributes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Tokenizer:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tokens)}


class Reader(nn.Module):
    def __init__(self, size: int, *tokens: str) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(size, 6), nn.Linear(6, 4)
        self.tokenizer = Tokenizer(*tokens)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.table(input_ids).mean(1))


def tied() -> Roles:
    teacher = taught()
    pupil = nn.Sequential(nn.Linear(6, 6), teacher)
    return Roles(teacher=teacher, student=pupil)


def images(x: torch.Tensor, **more: Any) -> Bench:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    config = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    torch.manual_seed(0)
    teacher, pupil = Named(net(), pretrained_cfg=config), net()
    roles = Roles(teacher=Role("teacher", teacher, more.pop("preprocess", None)), student=pupil)
    return job(Mimic(), roles=roles, x=x, y=torch.arange(len(x)) % 4)


def pixels() -> torch.Tensor:
    return torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def standardise(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def wrong(teacher: nn.Linear) -> nn.Linear:
    """The same teacher with its classes in another order."""
    with torch.no_grad():
        teacher.weight.copy_(teacher.weight.roll(1, 0))
    return teacher


def with_critic(method: Method) -> Bench:
    roles = Roles(teacher=taught(), student=student(), critic=nn.Linear(4, 1))
    return job(method, roles=roles, optim={"student": Optim("sgd", lr=0.01), "critic": Optim("sgd", lr=0.01)})


def nan_inputs() -> Bench:
    bad = job()
    bad.data.train.x[::4, 2] = float("nan")  # since a source refuses NaN when it is made
    return bad


def sorted_labels() -> torch.Tensor:
    return (torch.arange(64) >= 62).long()


X, Y = samples()
IDS = torch.randint(0, 8, (64, 5), generator=torch.Generator().manual_seed(0))
BAD: dict[str, tuple[Any, str, str, str]] = {
    "bytes": (
        lambda: job(Mimic(), teacher=Bytes(), pupil=Bytes(), x=(pixels() * 255).byte()[:, :, :2, :2], y=Y),
        "inputs", "error", "the model gets bytes",
    ),
    "pixels to 255": (lambda: job(x=(X.abs() * 60).round()), "inputs", "warning", "large numbers"),
    "NaN in the data": (nan_inputs, "inputs", "error", "NaN or infinite"),
    "constant input": (lambda: job(x=torch.ones(64, 6)), "inputs", "error", "same number everywhere"),
    "one label": (lambda: job(y=torch.full((64,), 2)), "labels", "error", "all labels are the same"),
    "rare label": (lambda: job(y=sorted_labels()), "labels", "warning", "nearly all labels"),
    "student of other width": (lambda: job(pupil=nn.Linear(7, 4)), "shapes", "error", "'student' cannot take"),
    "loss of other shapes": (lambda: job(Mimic(), pupil=student(3)), "shapes", "error", "cannot combine"),
    "classes differ": (lambda: job(Mimic(), pupil=student(3), y=Y % 3), "classes", "error", "different numbers"),
    "label out of range": (lambda: job(y=Y + 3), "classes", "error", "no class"),
    "the method's own check": (lambda: job(pupil=student(3)), "method", "error", "do not have the same classes"),
    "class order": (
        lambda: job(
            source=TensorSource(X, Y, ids=torch.arange(64), classes=("cat", "dog", "fox", "owl")),
            teacher=Named(taught(), config=SimpleNamespace(id2label={0: "dog", 1: "cat", 2: "fox", 3: "owl"})),
        ),
        "class_order", "error", "not in the same order",
    ),
    "class names of teacher and student": (
        lambda: job(teacher=Named(taught(), classes=list("abcd")), pupil=Named(student(), classes=list("abce"))),
        "class_order", "error", "different classes",
    ),
    "token out of range": (
        lambda: job(Mimic(), teacher=Reader(8), pupil=Reader(5), x={"input_ids": IDS}, y=Y),
        "vocabulary", "error", "tokens that the role 'student' does not know",
    ),
    "other vocabulary": (
        lambda: job(Mimic(), teacher=Reader(8, *"abcdefgh"), pupil=Reader(8, *"abcdefhg"), x={"input_ids": IDS}, y=Y),
        "vocabulary", "error", "different vocabularies",
    ),
    "teacher not normalised": (lambda: images(pixels()), "normalisation", "error", "not normalised"),
    "teacher normalised twice": (
        lambda: images(pixels(), preprocess=lambda x: standardise(standardise(x))),
        "normalisation", "error", "not normalised",
    ),
    "teacher without skill": (
        lambda: job(teacher=wrong(taught())), "teacher_skill", "warning", "does not know these labels",
    ),
    "teacher with dropout": (lambda: job(teacher=Dropping(6, 4)), "modes", "error", "answers differently"),
    "teacher in train mode": (lambda: job(teacher=Relearning()), "modes", "error", "in train mode"),
    "teacher with moving buffers": (lambda: job(teacher=Counting()), "modes", "error", "changes its own buffers"),
    "NaN loss": (lambda: job(Logarithm()), "first_loss", "error", "not finite"),
    "role without detach": (lambda: with_critic(Leaky()), "gradient_leaks", "warning", "sends a gradient to 'student'"),
    "teacher that thaws": (lambda: job(Unshielded(), teacher=Thawing(6, 4)), "gradient_leaks", "error", "to 'teacher'"),
    "shared parameters": (lambda: job(roles=tied()), "gradient_leaks", "error", "share a parameter"),
    "unused layer": (lambda: job(pupil=Bypassed()), "unused_parameters", "warning", "receive no gradient"),
    "role without update": (lambda: with_critic(Forgetful()), "unused_parameters", "error", "no update names"),
    "dead term in the log": (lambda: job(TwoTerms()), "dead_terms", "warning", "the term 'feature'"),
    "dead term by its weight": (
        lambda: job(TwoTerms(log_terms=False)), "dead_terms", "warning", "weighted by 'feature_weight'",
    ),
    "tiny weight": (lambda: job(KD(label_weight=1e-9)), "dead_terms", "warning", "label_weight"),
    "constant loss": (lambda: job(Constant()), "no_op", "error", "does not change 'student'"),
    "rate too small": (lambda: job(optim={"student": Optim("sgd", lr=1e-30)}), "no_op", "error", "raise the learning"),
    "rate too large": (lambda: job(optim={"student": Optim("sgd", lr=1e4)}), "learning_rate", "error", "explodes"),
    "large rate after a warm-up": (
        lambda: job(optim={"student": Optim("sgd", lr=1e4, warmup=0.1)}), "learning_rate", "warning", "at the peak",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_job_is_found_with_its_fix(name: str) -> None:
    make, check, severity, words = BAD[name]
    finding = diagnose(make())[check]
    assert finding.severity == severity, str(finding)
    assert words in str(finding)
    assert finding.fix


def test_every_check_has_a_failing_example() -> None:
    of_diffusion = {"prediction", "sample_scale", "guidance"}  # theirs are in test_doctor_diffusion.py
    assert {check for _, check, _, _ in BAD.values()} | of_diffusion == set(CHECKS)


def test_class_names_and_vocabularies_that_agree_pass() -> None:
    source = TensorSource(X, Y, ids=torch.arange(64), classes=("cat", "dog", "fox", "owl"))
    named = SimpleNamespace(id2label=dict(enumerate(("Cat", "dog", "FOX", "owl"))))
    assert diagnose(job(source=source, teacher=Named(taught(), config=named)))["class_order"].severity == "ok"
    pair = {"teacher": Reader(8, *"abcdefgh"), "pupil": Reader(8, *"abcdefgh")}
    assert diagnose(job(Mimic(), x={"input_ids": IDS}, y=Y, **pair))["vocabulary"].severity == "ok"


def test_a_teacher_with_a_tokenizer_of_its_own_is_heard_in_it() -> None:
    teacher, pupil = Reader(16, *"hgfedcba"), Reader(8, *"abcdefgh")
    bench = job(Mimic(), x={"input_ids": IDS}, y=Y, teacher=teacher, pupil=pupil)
    bench.taught = TensorSource({"input_ids": 15 - IDS}, Y, ids=torch.arange(64))
    report = diagnose(bench)
    assert report["vocabulary"].severity == "ok"
    assert report["shapes"].severity == "ok"
    assert bench.roles.teacher.module is teacher


@pytest.mark.parametrize("preprocess", [standardise, None])
def test_images_normalised_by_the_model_or_by_the_data_pass(preprocess: Any) -> None:
    x = pixels() if preprocess else standardise(pixels())
    assert diagnose(images(x, preprocess=preprocess))["normalisation"].severity == "ok"


def test_what_needs_a_step_is_skipped_when_the_step_fails() -> None:
    report = diagnose(job(pupil=nn.Linear(7, 4)))
    assert report["learning_rate"].severity == "skipped"
    assert report["inputs"].severity == "ok"
    assert not report.ok
    assert "roles.student" not in str(report["learning_rate"])
    assert "float32[32, 6]" in (report["shapes"].found or "")


def test_the_stage_after_a_conversion_is_examined() -> None:
    class Staged(Method):
        def stages(self, m: Roles, data: Any) -> Any:
            yield Convert("student", lambda module: (nn.Sequential(copy.deepcopy(module), nn.Linear(4, 4)), {}))
            yield Train(Mimic().step, {"student": Optim(lr=1e4)}, ["teacher"], data.train)

    bench = job(Staged())
    assert diagnose(bench)["learning_rate"].severity == "error"
    assert len(bench.roles.student.module) == 3


def fingerprint(bench: Bench) -> list[Any]:
    state: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002
    for name, role in bench.roles.items():
        state.append([(name, k, v.tolist()) for k, v in role.module.state_dict().items()])
        state.append([(p.requires_grad, p.grad is None) for p in role.module.parameters()])
        state.append([(part.training, sorted(vars(part))) for part in role.module.modules()])
        state.append((role.frozen, len(role.module._forward_hooks)))
    return [*state, bench.roles.step, bench.data.train.x.tolist()]


@pytest.mark.parametrize("name", ["teacher with moving buffers", "rate too large", "student of other width"])
def test_nothing_is_changed(name: str) -> None:
    bench = BAD[name][0]()
    before = fingerprint(bench)
    diagnose(bench)
    assert fingerprint(bench) == before


def test_the_same_job_gets_the_same_diagnosis() -> None:
    bench = job(teacher=Dropping(6, 4), optim={"student": Optim(lr=10)})
    first, second = diagnose(bench), diagnose(bench)
    assert first == second


def test_a_diagnosis_is_plain_data_and_text() -> None:
    report: Diagnosis = diagnose(job(y=Y + 3))
    plain = report.to_dict()
    assert plain["ok"] is False
    assert {f["check"] for f in plain["findings"]} == set(CHECKS)
    assert next(iter(report)).check in report.render()
    assert len(report) == sum(f["severity"] in ("error", "warning") for f in plain["findings"])
