"""What the suite runs: every registered method and the toys, each in a tiny world, with the exceptions that it needs."""

import itertools
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from toys import Alternating, Choosing, Staged, tower

from limbeck import Collect, Convert, Engine, Method, Optim, Roles, Search, Train
from limbeck.core import registry
from limbeck.core.method import updates
from limbeck.core.stages import Stage
from limbeck.data import Data, TensorSource
from limbeck.data.condensed import from_source
from limbeck.data.condensed_graphs import empty
from limbeck.data.graphs import motifs
from limbeck.data.noise import Noise
from limbeck.data.procedural import shapes
from limbeck.diffusion import Denoiser, RectifiedFlow
from limbeck.engine.run import Result, execute
from limbeck.methods.diversity_cfg.proof import Bag, Table, prompts
from limbeck.methods.tinyclip.proof import clip
from limbeck.nn.mlp import mlp
from limbeck.nn.time_mlp import TimeMLP
from limbeck.nn.vae import TableVAE
from limbeck.prove import seeded
from limbeck.teachers import Ensemble

INPUTS, CLASSES = 6, 5
ENGINE = Engine(steps=16, batch_size=16, device="cpu", checkpoint_every=3, log_every=1, evaluate_every=0)
SGD = Optim("sgd", lr=0.1, momentum=0.9)


def data() -> Data:
    """72 labelled points of 5 classes: an epoch is four batches of 16 and one of 8."""
    rng = torch.Generator().manual_seed(7)
    y = torch.arange(72) % CLASSES
    x = 2 * torch.randn(CLASSES, INPUTS, generator=rng)[y] + 0.5 * torch.randn(72, INPUTS, generator=rng)
    return Data(train=TensorSource(x, y))


@dataclass(frozen=True)
class Case:
    """A method in its tiny world.

    Args:
        method: Makes the method.
        roles: Makes the roles, always with the same weights.
        exceptions: Why a check does not apply, by the check's name.
        data: Makes the data.
        optim: How the roles learn.
    """

    method: Callable[[], Method]
    roles: Callable[[], Roles]
    exceptions: Mapping[str, str] = field(default_factory=dict)
    data: Callable[[], Data] = data
    optim: Optim = SGD


def classifiers() -> Roles:
    """A wide network and a narrow one with as many outputs; as good as embeddings as it is as logits."""
    wide, narrow = seeded(0, lambda: mlp(INPUTS, 32, CLASSES)), seeded(1, lambda: mlp(INPUTS, 8, CLASSES))
    return Roles(teacher=wide, student=narrow)


def copies() -> Roles:
    """A network, and a copy of it."""
    return Roles(teacher=seeded(0, lambda: mlp(8, 32, CLASSES)), student=seeded(0, lambda: mlp(8, 32, CLASSES)))


def eights() -> Data:
    """Those points with two more inputs."""
    train = data().train
    x = torch.cat([train.batch(torch.arange(72), 0).x, torch.ones(72, 2)], 1)
    return Data(train=TensorSource(x, torch.arange(72) % CLASSES))


def pooled() -> Data:
    """Those points, and 40 without labels."""
    rng = torch.Generator().manual_seed(8)
    x = 2 * torch.randn(40, INPUTS, generator=rng)
    return Data(train=data().train, unlabelled=TensorSource(x, ids=torch.arange(1000, 1040)))


def taught_by_two() -> Roles:
    """An ensemble of two wide networks, and a narrow one."""
    m = classifiers()
    m.teacher = Ensemble([m.teacher.module, seeded(5, lambda: mlp(INPUTS, 24, CLASSES))])
    return m


def held_out() -> Data:
    """Those points, the last 24 of them kept to estimate on."""
    whole = data().train
    return Data(train=whole.subset(range(48)), validation=whole.subset(range(48, 72)))


def sources() -> Roles:
    """Two networks with classes of their own, and a narrow one with those of the data."""
    given = {f"teacher_{i}": seeded(i, lambda i=i: mlp(INPUTS, 24, 3 + i)) for i in range(2)}
    return Roles(**given, student=seeded(1, lambda: mlp(INPUTS, 8, CLASSES)))


def images() -> Data:
    """48 unlabelled images of 8 x 8 pixels with a bright spot in one of four places, and as many labelled ones."""

    def draw(seed: int) -> torch.Tensor:
        x, k = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(48) % 4
        x[torch.arange(48), :, 3 * (k // 2) + 2, 3 * (k % 2) + 2] += 3.0
        return x

    return Data(train=TensorSource(draw(0), torch.arange(48) % 4), unlabelled=TensorSource(draw(1)))


def convolutions() -> Roles:
    """A wide and a narrow network for those images."""

    def network(width: int) -> nn.Module:
        body = [nn.Conv2d(1, width, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))

    return Roles(teacher=seeded(5, lambda: network(8)), student=seeded(6, lambda: network(4)))


def players() -> Roles:
    return Roles(
        critic=seeded(2, lambda: mlp(INPUTS, 8, 1)), generator=seeded(3, lambda: mlp(Alternating.noise, 8, INPUTS))
    )


def layered() -> Roles:
    return Roles(teacher=seeded(4, lambda: tower(INPUTS, 8, 4, CLASSES)))


def pairs() -> Data:
    """Drawn shapes with captions."""
    return shapes(count=72, held_out=18)


def noise() -> Data:
    """Noise of 72 samples in 5 classes."""
    return Data(train=Noise((INPUTS,), 72, CLASSES))


def denoisers() -> Roles:
    """Two denoisers of such samples."""

    def network() -> nn.Module:
        return Denoiser(TimeMLP(INPUTS, 8, 2, CLASSES), RectifiedFlow(), "flow_prediction", null=CLASSES)

    return Roles(teacher=seeded(0, network), student=seeded(1, network))


def condensed() -> Roles:
    """A network, and three samples of each class for it."""
    return Roles(teacher=seeded(0, lambda: mlp(INPUTS, 8, CLASSES)), student=from_source(data().train, 3))


def tables() -> Roles:
    """A model of rows of three columns, and a smaller one."""

    def model(hidden: int) -> nn.Module:
        return TableVAE((2, 3, 2), 2, latent=3, hidden=hidden, decoder_hidden=8)

    return Roles(teacher=seeded(0, lambda: model(16)), student=seeded(1, lambda: model(4)))


def rows_of_tables() -> Data:
    """72 such rows of two groups."""
    x = tables().teacher.module.one_hot(torch.stack([torch.arange(72) % n for n in (2, 3, 2)], 1))
    return Data(train=TensorSource(x, (torch.arange(72) // 3) % 2, torch.arange(72)))


def remembering(teachers: int = 1) -> Roles:
    """Networks with batch normalisation, and four samples of each class for them."""

    def network(width: int) -> nn.Module:
        body = [nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES)]
        return nn.Sequential(nn.BatchNorm1d(INPUTS), *body)

    names = ["teacher"] if teachers == 1 else [f"teacher_{i}" for i in range(teachers)]
    networks = {name: seeded(i, lambda i=i: network(8 + i)) for i, name in enumerate(names)}
    return Roles(**networks, student=from_source(data().train, 4))


def encoders() -> Roles:
    """A small CLIP, and a copy of it."""
    return Roles(teacher=seeded(0, clip), student=seeded(0, clip))


def clips() -> Data:
    """72 clips of four frames of three numbers, in 5 classes, and 40 images like frames."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(72, 1, 3, generator=g) + 0.5 * torch.randn(72, 4, 3, generator=g).cumsum(1)
    images = 2 + torch.randn(40, 3, generator=g)
    return Data(train=TensorSource(x, torch.arange(72) % CLASSES), unlabelled=TensorSource(images))


def clip_denoisers() -> Roles:
    """Two denoisers of such clips."""

    def network() -> nn.Module:
        return Denoiser(TimeMLP(12, 8, 2, CLASSES), RectifiedFlow(), "flow_prediction", null=CLASSES)

    return Roles(teacher=seeded(0, network), student=seeded(1, network))


BATCH_WIDE = "it compares the samples of a batch with each other, so parts of a batch are another loss"
TWO_PLAYERS = "neither player's loss need fall"
UNTRAINED = "nothing is trained"
SURROGATE = "its loss stands for a gradient, and has a minimum of its own at every step"
CHAIN = "its stages need the engine"
MADE = "its program makes a role"

# Where a registered method lives, if not among classifiers.
WORLDS: Mapping[str, Mapping[str, Any]] = {
    "meal_v2": {
        "method": lambda: registry.find("meal_v2")(variant="paper"),
        "roles": taught_by_two,
        "exceptions": {"own_loop": MADE, "no_wait": MADE},
    },
    "distill_nearest": {"roles": sources, "data": pooled, "exceptions": {"own_loop": MADE, "no_wait": MADE}},
    "distill_weighted": {"roles": sources, "data": pooled, "exceptions": {"own_loop": MADE, "no_wait": MADE}},
    "wad": {
        "method": lambda: registry.find("wad")(promotions=2),
        "data": pooled,
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "falls": "each round goes on where the one before ended"},
    },
    "ssld": {
        "method": lambda: registry.find("ssld")(images_per_class=8, finetune_epochs=3.0),
        "data": pooled,
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "falls": "its second stage starts where the first ended"},
    },
    "cast": {
        "roles": copies,
        "data": eights,
        "optim": Optim("adam", lr=0.01, warmup=0.2, schedule="cosine"),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "falls": "the student starts where the teacher is"},
    },
    "vsd": {"roles": denoisers, "data": noise, "exceptions": {"own_loop": MADE, "no_wait": MADE, "falls": SURROGATE}},
    "swiftbrush": {
        "method": lambda: registry.find("swiftbrush")(guidance=2.0, ema=0.5, fake_rank=2, fake_alpha=2.0),
        "roles": denoisers,
        "data": noise,
        "exceptions": {"own_loop": MADE, "no_wait": MADE, "falls": SURROGATE},
    },
    "diversity_cfg": {
        "method": lambda: registry.find("diversity_cfg")(beta=2.0, length=3, end=7),
        "roles": lambda: Roles(teacher=Table(0), student=Table(1), embedder=Bag()),
        "data": lambda: Data(train=prompts(72)),
        "exceptions": {"no_wait": "its batches are prompts with negatives, not rows of numbers", "falls": SURROGATE},
    },
    "sid": {
        "method": lambda: registry.find("sid")(steps=3, guidance=2.0, fake_guidance=1.0, ema=0.5),
        "roles": denoisers,
        "data": noise,
        "exceptions": {"own_loop": MADE, "no_wait": MADE, "falls": SURROGATE},
    },
    "mcm": {
        "method": lambda: registry.find("mcm")(frames=1, lora=2, penalty=0.1),
        "roles": clip_denoisers,
        "data": clips,
        "optim": Optim("sgd", lr=0.01),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "falls": TWO_PLAYERS},
    },
    "snoopi": {
        "method": lambda: registry.find("snoopi")(ema=0.5),
        "roles": denoisers,
        "data": noise,
        "exceptions": {"own_loop": MADE, "no_wait": MADE, "falls": SURROGATE},
    },
    "phased_dmd": {
        "method": lambda: registry.find("phased_dmd")(steps=4, phases=2, guidance=2.0, fake_steps=2),
        "roles": denoisers,
        "data": noise,
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "falls": SURROGATE},
    },
    "disback": {
        "method": lambda: registry.find("disback")(nodes=(2, 6), switch=1, guidance=2.0, fake_steps=2, ema=0.5),
        "roles": denoisers,
        "data": noise,
        "exceptions": {"own_loop": MADE, "no_wait": MADE, "falls": SURROGATE},
    },
    "mdt_dist": {
        "method": lambda: registry.find("mdt_dist")(steps=2, guidance=2.0, vd_weight=0.5, vd_start=0.25, ema=0.5),
        "roles": denoisers,
        "optim": Optim("sgd", lr=0.02),
        "exceptions": {"own_loop": "its program makes the student a sampler", "falls": SURROGATE},
    },
    "msd": {
        "method": lambda: registry.find("msd")(
            2, guidance=2.0, fake_steps=2, match_steps=6, gan_weight=0.1, gan_start=0.3, discriminator="net.body"
        ),
        "roles": denoisers,
        "data": noise,
        "exceptions": {"own_loop": MADE, "no_wait": MADE, "falls": SURROGATE},
    },
    "tinyclip": {
        "method": lambda: registry.find("tinyclip")(sparsity=(0.3,), mask_lr=0.5, mask_share=0.5),
        "roles": encoders,
        "data": pairs,
        "optim": Optim("sgd", lr=0.01),
        "exceptions": {
            "own_loop": CHAIN,
            "no_wait": CHAIN,
            "micro_batches": BATCH_WIDE,
            "falls": "the student starts where the teacher is",
        },
    },
    "deps": {
        "method": lambda: registry.find("deps")(divisor=2, ramp=0.2),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "falls": "the loss shown is that of a random sub-network"},
    },
    "ftd": {
        "method": lambda: registry.find("ftd")(
            experts=4, epochs=5, expert_lr=0.2, student_steps=4, starts=4, step_size=0.1
        ),
        "roles": condensed,
        "optim": Optim("sgd", lr=5.0, momentum=0.5),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN},
    },
    "ast": {
        "method": lambda: registry.find("ast")(
            experts=4, epochs=5, expert_lr=0.02, penalty=0.05, student_steps=4, starts=4, step_size=0.02
        ),
        "roles": condensed,
        "optim": Optim("sgd", lr=1.0, momentum=0.5),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN},
    },
    "mirage": {
        "roles": lambda: Roles(student=empty()),
        "data": lambda: Data(train=motifs(40)),
        "exceptions": dict.fromkeys(("falls", "own_loop", "no_wait", "other_seed"), UNTRAINED),
    },
    "fair_latent": {
        "method": lambda: registry.find("fair_latent")(teach_steps=16),
        "roles": tables,
        "data": rows_of_tables,
        "optim": Optim("sgd", lr=0.05),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "micro_batches": BATCH_WIDE, "processes": BATCH_WIDE},
    },
    "dwa": {
        "method": lambda: registry.find("dwa")(
            rho=0.1,
            adjustment_steps=2,
            operations=(),
            clip=None,
            classes_at_once=3,
            label_epochs=2,
            label_operations=(),
        ),
        "roles": remembering,
        "optim": Optim("adam", lr=0.1),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN},
    },
    "cv_dd": {
        "method": lambda: registry.find("cv_dd")(
            init="real", priors=(60.0, 65.0, 50.0), operations=(), clip=None, label_epochs=2, label_operations=()
        ),
        "roles": partial(remembering, 3),
        "optim": Optim(
            "adam", lr=0.1, eps=1e-4
        ),  # a smaller one makes the rounding of tiny gradients as large as a step
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN},
    },
    "infer": {
        "method": lambda: registry.find("infer")(operations=(), clip=None, label_epochs=2, label_operations=()),
        "roles": partial(remembering, 2),
        "optim": Optim("adam", lr=0.1),
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN},
    },
    "embedding": {"exceptions": {"micro_batches": BATCH_WIDE, "processes": BATCH_WIDE}},
    "kd3": {
        "roles": convolutions,
        "data": images,
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN, "micro_batches": BATCH_WIDE, "processes": BATCH_WIDE},
    },
    "wa": {
        "method": lambda: registry.find("wa")(increments=2, memory=20),
        "exceptions": {"own_loop": CHAIN},
    },
    "lelp": {"exceptions": {"own_loop": CHAIN, "no_wait": CHAIN}},
    "self_distillation": {
        "method": lambda: registry.find("self_distillation")(generations=2),
        "data": held_out,
        "exceptions": {"own_loop": CHAIN, "no_wait": CHAIN},
    },
}
METHODS = {
    name: Case(**{"method": lambda name=name: registry.find(name)(), "roles": classifiers, **WORLDS.get(name, {})})
    for name in registry.METHODS
}
TOYS = {
    "alternating": Case(Alternating, players, {"falls": TWO_PLAYERS}),
    "staged": Case(Staged, layered, {"own_loop": CHAIN, "no_wait": CHAIN}),
    "search": Case(Choosing, layered, dict.fromkeys(("falls", "own_loop", "no_wait", "other_seed"), UNTRAINED)),
}
CASES = METHODS | TOYS


def run(case: Case, out: Path | None = None, **engine: Any) -> Result:
    optim = dict.fromkeys(("student", "critic", "generator", "fake", "discriminator", "head"), case.optim)
    return execute(case.method(), case.roles(), case.data(), replace(ENGINE, **engine), optim=optim, out=out)


def bits(m: Roles) -> dict[str, torch.Tensor]:
    return {f"{name}.{k}": v.clone() for name, role in m.items() for k, v in role.module.state_dict().items()}


def rows(result: Result) -> list[dict[str, Any]]:
    """The history without what the clock says."""
    return [{k: v for k, v in row.items() if k != "time"} for row in result.history]


def stages_of(case: Case) -> list[Stage]:
    """The stages of a program, by running it."""
    seen: list[Stage] = []
    with watched(type(case.method()), lambda index, stage: seen.append(stage) or stage):
        run(case)
    return seen


class watched:
    """Let each stage of a method's programs pass through a function on its way to the engine."""

    def __init__(
        self, kind: type[Method], change: Callable[[int, Stage], Stage], after: Callable[[int], Any] = id
    ) -> None:
        self.kind, self.change, self.after, self.original = kind, change, after, kind.stages

    def __enter__(self) -> None:
        original, change, after = self.original, self.change, self.after

        def stages(method, m, data):
            program, answer = original(method, m, data), None
            for index in itertools.count():
                try:
                    stage = program.send(answer)
                except StopIteration:
                    return
                answer = yield change(index, stage)
                after(index)

        self.kind.stages = stages

    def __exit__(self, *_: object) -> None:
        self.kind.stages = self.original


def run_killed(name: str, out: Path, index: int, call: int | None) -> None:
    """Run a case and die by SIGKILL: inside the `call`-th piece of work of stage `index`, or, with None, after that stage."""
    torch.set_num_threads(1)
    case = CASES[name]

    def change(i: int, stage: Stage) -> Stage:
        return _deadly(stage, call) if i == index and call is not None else stage

    def after(i: int) -> None:
        if i == index and call is None:
            die()

    with watched(type(case.method()), change, after):
        run(case, out)


def _deadly(stage: Stage, call: int) -> Stage:
    calls = itertools.count(1)

    def work(function, *args):
        result = function(*args)
        if next(calls) == call:
            die()
        return result

    def step(m, batch):
        fatal = next(calls) == call
        for update in updates(stage.step, m, batch, next(iter(stage.roles))):
            yield update
            if fatal:  # the first update of the step is done, the others are not
                die()

    if isinstance(stage, Train):
        return replace(stage, step=step)
    field = {Collect: "make", Convert: "how", Search: "score"}[type(stage)]
    return replace(stage, **{field: partial(work, getattr(stage, field))})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
