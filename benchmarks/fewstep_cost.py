"""What a training step of the few-step methods costs, over the passes that it is made of, written by hand.

    python benchmarks/fewstep_cost.py --out benchmarks/results/fewstep-cost.json

- CPU time and peak memory of the engine's step over those of a bare loop with the same networks, batch, updates and optimizers: a
  small UNet2DModel and a small DiT of diffusers, 8 images of 16 pixels (for MCM 2 clips of 4), 4 classes, a rectified flow, Adam.
  The bare steps are in `bare_steps.py`; there the parameters of a role need a gradient only while it learns.
- The same for `diversity_cfg`, on a GPT-2 of 3.4 million parameters: 4 prompts of 8 tokens, 4 samples of 16 tokens each.
- SwiftBrush's step with gradient checkpointing and in bf16, over the plain one.

Times are of the process's CPU, on one thread; what is compared takes turns. Memory is what a step holds at its peak beyond what
is held between steps, by the records of torch's allocator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bare_steps import CLASSES, Frames, Labelled, bare_step
from condense_speed import peak
from constructed import language_model, ratios, turns
from measuring import machine, options, report, spread
from torch import Tensor, nn

from limbeck import Batch, Engine, Method, Optim, Roles
from limbeck.core.source import Source
from limbeck.data import Data, TensorSource
from limbeck.data.language import Prompts
from limbeck.diffusion import Denoiser, Draws, RectifiedFlow
from limbeck.engine.runtime import Plain
from limbeck.engine.updater import Updater
from limbeck.methods.disback.method import DisBack
from limbeck.methods.diversity_cfg.method import DiversityCFG
from limbeck.methods.mcm.method import MCM
from limbeck.methods.mdt_dist.method import MDTDist
from limbeck.methods.msd.method import MSD
from limbeck.methods.phased_dmd.method import PhasedDMD
from limbeck.methods.sid.method import SiD
from limbeck.methods.snoopi.method import SNOOPI
from limbeck.methods.swiftbrush.method import SwiftBrush
from limbeck.methods.vsd.method import VSD
from limbeck.plan.program import prepare_roles, training_stages
from limbeck.prove import seeded

RATE, BATCH, CLIPS = 1e-5, (8, 3, 16, 16), (2, 3, 4, 16, 16)


def unet() -> nn.Module:
    """A UNet of 0.7 million parameters, with attention at 8 pixels."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, num_class_embeds=CLASSES + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def transformer() -> nn.Module:
    """A DiT of 1.4 million parameters, 64 tokens."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=3, out_channels=3, num_layers=4, sample_size=16,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"unet": unet, "transformer": transformer}
PART = {"unet": "net.net.mid_block", "transformer": "net.net.transformer_blocks.1"}


@dataclass(frozen=True)
class Case:
    """A method, and which bare step has its passes.

    Args:
        make: The method, from the path of a part that tells real samples from generated ones.
        bare: Name of the bare step.
        only: The network that it is measured with; None for both.
    """

    make: Callable[[str], Method]
    bare: str
    only: str | None = None


CASES = {
    "swiftbrush": Case(lambda _: SwiftBrush(), "swiftbrush"),
    "swiftbrush, adapters": Case(lambda _: SwiftBrush(fake_rank=8), "swiftbrush"),
    "vsd": Case(lambda _: VSD(), "vsd"),
    "snoopi": Case(lambda _: SNOOPI(), "swiftbrush"),
    "sid": Case(lambda _: SiD(), "sid"),
    "sid, guided": Case(lambda _: SiD(guidance=4.5), "sid, guided"),
    "sid, discriminator": Case(lambda part: SiD(gan_weight=0.1, discriminator=part), "sid, discriminator", "unet"),
    "disback": Case(lambda _: DisBack(nodes=()), "dmd"),
    "msd": Case(lambda _: MSD(2), "msd"),
    "msd, discriminator": Case(lambda part: MSD(2, gan_weight=3e-3, discriminator=part), "msd, discriminator", "unet"),
    "phased_dmd": Case(lambda _: PhasedDMD(), "phased_dmd"),
    "mdt_dist": Case(lambda _: MDTDist(), "mdt_dist"),
    "mcm": Case(lambda _: MCM(lora=0, mixed=0.0), "mcm"),
}


class Generator(nn.Module):
    """A denoiser that makes samples of a batch's noise, as `vsd` calls its students."""

    takes_batch = True

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, batch: Batch) -> Tensor:
        return self.denoiser(batch.x, condition=batch.y)


def denoiser(kind: str, clips: bool, checkpointed: bool = False) -> nn.Module:
    """A network as the methods see it."""
    net: Any = seeded(0, NETWORKS[kind])
    if checkpointed:
        net.enable_gradient_checkpointing()
    net = Labelled(net)
    net = Frames(net) if clips else net
    return Denoiser(net, RectifiedFlow(), "flow_prediction", time_scale=999, null=CLASSES)


def engine_step(
    method: Method, kind: str, checkpointed: bool = False, precision: str = "fp32"
) -> tuple[Callable[[], Any], Roles, Batch, Any]:
    """The engine's step at step 0 of a method's first training stage; with its roles, batch and stage."""
    clips = isinstance(method, MCM)
    shape = CLIPS if clips else BATCH
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    source = TensorSource(x, torch.arange(len(x)) % CLASSES, ids=torch.arange(len(x)), classes=tuple("abcd"))
    teacher, student = (denoiser(kind, clips, checkpointed) for _ in range(2))
    m = Roles(teacher=teacher, student=Generator(student) if isinstance(method, VSD) else student)
    return started(method, m, source, len(x), precision)


def started(
    method: Method, m: Roles, source: Source, size: int, precision: str = "fp32"
) -> tuple[Callable[[], Any], Roles, Batch, Any]:
    """The engine's step at step 0 of the first training stage, for given roles and data."""
    data, engine = Data(train=source), Engine(batch_size=size, precision=precision)  # type: ignore[arg-type]
    stage = next(training_stages(method, m, data, []))
    m.total = 1000
    prepare_roles(stage, m)
    optim = dict.fromkeys(stage.roles, Optim("adam", lr=RATE))
    updater = Updater(m, stage, optim, method, engine, Plain(torch.device("cpu")))
    batch = stage.data.batch(torch.arange(size), 0)
    return lambda: updater.step([batch], len(batch)), m, batch, stage


def pair(case: Case, kind: str) -> dict[str, Callable[[], Any]]:
    """The engine's step and the bare one, with networks of their own."""
    method = case.make(PART[kind])
    return against(case.bare, method, *engine_step(method, kind))


def against(bare: str, method: Method, step: Callable[[], Any], m: Roles, batch: Batch, stage: Any) -> dict[str, Any]:
    """The engine's step, and the bare one with copies of the roles, which share weights where these do."""
    names = (*stage.roles, *stage.ema, "teacher")
    nets = copy.deepcopy({name: m[name].module for name in names})
    for name in stage.roles:
        nets[name].train().requires_grad_(True)
    drawn = steps_drawn(method, m, batch)
    return {"engine": step, "bare": bare_step(bare, nets, tuple(stage.roles), batch, drawn, RATE)}


def steps_drawn(method: Method, m: Roles, batch: Batch) -> tuple[int, int]:
    """How many of its steps the student takes for itself and for `fake`, as the method draws them at step 0."""
    draws = Draws(m, batch)
    if isinstance(method, SiD):
        k = 1 + int(method.steps * draws.once("steps"))
        return k, k
    if isinstance(method, PhasedDMD):
        each = method.steps // method.phases
        own, fake = (1 + int(each * draws.once(f"{name} steps")) for name in ("student", "fake"))
        return own, fake
    if isinstance(method, DiversityCFG):
        return method.samples, method.length
    return 1, 1


def over_passes(case: Case, kind: str, rounds: int) -> dict[str, Any]:
    """Time and peak memory of a step over its passes."""
    return compared(pair(case, kind), rounds)


def language(rounds: int) -> dict[str, Any]:
    """The same of a step of `diversity_cfg`."""
    g = torch.Generator().manual_seed(0)
    source = Prompts(torch.randint(1000, (4, 8), generator=g), torch.randint(1000, (8,), generator=g))
    method, m = DiversityCFG(length=16), Roles(teacher=language_model(), student=language_model())
    return compared(against("diversity_cfg", method, *started(method, m, source, 4)), rounds)


def compared(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Time and peak memory of two steps."""
    times = turns(steps, rounds)
    held = {name: peak(step) for name, step in steps.items()}
    return {
        "time": ratios(times, "engine", "bare"),
        "memory": round(held["engine"] / held["bare"], 3),
        "bare ms": spread(times["bare"], 1),
        "bare MB": round(held["bare"] / 1e6, 1),
    }


def variants(kind: str, rounds: int) -> dict[str, Any]:
    """SwiftBrush's step with less memory, over the plain one."""
    forms = {
        "plain": {}, "checkpointing": {"checkpointed": True}, "bf16": {"precision": "bf16"},
        "both": {"checkpointed": True, "precision": "bf16"},
    }  # fmt: skip
    steps = {name: engine_step(SwiftBrush(), kind, **form)[0] for name, form in forms.items()}  # type: ignore[arg-type]
    times, held = turns(steps, rounds), {name: peak(step) for name, step in steps.items()}
    return {
        name: {"time": ratios(times, name, "plain"), "memory": round(held[name] / held["plain"], 3)}
        for name in forms
        if name != "plain"
    }


def forward_ms(kind: str) -> float:
    """Of one pass without gradient."""
    net: Any = denoiser(kind, clips=False).eval()
    x, t, y = torch.randn(BATCH), torch.rand(8), torch.arange(8) % CLASSES

    @torch.no_grad()
    def call() -> Tensor:
        return net(x, t, y)

    return spread(turns({"forward": call}, 10)["forward"], 1)["median"]


def main() -> None:
    """Measure and report."""
    given = options(__doc__ or "", rounds=9)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"forward ms": {kind: forward_ms(kind) for kind in NETWORKS}}
    for kind in NETWORKS:
        cases = {name: case for name, case in CASES.items() if case.only in (None, kind)}
        found[kind] = {name: over_passes(case, kind, given.rounds) for name, case in cases.items()}
    found["language model"] = {"diversity_cfg": language(given.rounds)}
    found["swiftbrush over plain"] = {kind: variants(kind, given.rounds) for kind in NETWORKS}
    report({**found, "machine": machine("diffusers")}, given.out)


if __name__ == "__main__":
    main()
