"""NASA on digits: a class that is named as negative, in a prompt that allows it and another one, or any.

    python benchmarks/nasa_digits.py --out benchmarks/results/nasa-digits.json

The teacher is a flow of scikit-learn's digits whose `UNet2DConditionModel` attends to two tokens of classes, `a or b`, or to two
that say nothing. Its student of one step is distilled by distribution matching, with the same prompts. Then the prompt allows two
classes, or all, and the negative one names a class: how many samples are still of it, by a classifier that is trained on the
images; how many are of the class that is left; and the Frechet distance in the classifier's features to test images, of the
classes that the prompts leave. Beside it the output is guided away with the same scales, at two calls instead of one. Two more
students of SNOOPI, one of them trained with negative prompts (NASA-T), equally long, show what that training adds.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from fewstep_models import CLASSES, FLOW, Judge, digits, whole
from measuring import machine, options, report
from torch import Tensor, nn

from limbeck import Batch, Optim, Roles, Update
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Draws
from limbeck.diffusion.scores import denoising_loss
from limbeck.evaluate.baselines import supervised
from limbeck.evaluate.samples import frechet_distance
from limbeck.methods.disback.method import DisBack
from limbeck.methods.snoopi.method import SNOOPI
from limbeck.nn.nasa import away
from limbeck.prove import accuracy, fit, seeded

ANY, BATCH, LR = CLASSES, 64, 1e-4
SCALES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


class Painter(nn.Module):
    """A U-Net that attends to tokens `[B, 2]`."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.text = nn.Embedding(CLASSES + 1, 32)
        self.unet = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32, attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), mid_block_type="UNetMidBlock2DCrossAttn",
        )  # fmt: skip

    def states(self, tokens: Tensor) -> Tensor:
        """What attention sees of tokens."""
        return self.text(tokens)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.states(tokens)).sample


def network() -> nn.Module:
    return Denoiser(Painter(), FLOW, "flow_prediction", time_scale=999, null=ANY, keyword="tokens")


def prompts(y: Tensor, other: Tensor, u: Tensor) -> Tensor:
    """Of images of classes `[B]`: half `a or b`, three tenths `a` twice, the rest nothing."""
    pair = torch.stack([torch.where(u < 0.25, y, other), torch.where(u < 0.25, other, y)], 1)
    told = torch.where((u < 0.5)[:, None], pair, torch.stack([y, y], 1))
    return told.masked_fill((u >= 0.8)[:, None], ANY)


def denoise(m: Roles, batch: Batch) -> Update:
    draws = Draws(m, batch)
    tokens = prompts(batch.y, (CLASSES * draws.uniform("other")).long(), draws.uniform("prompt"))
    loss = denoising_loss(m, "student", draws, batch.x, tokens, times=(0.001, 1.0), weight=_velocity)
    return Update("student", loss)


def _velocity(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (1 / sigma**2).clamp(max=400.0)


@cache
def judge() -> Any:
    module = seeded(0, Judge)
    optim = Optim("adamw", lr=3e-3, weight_decay=0.05, schedule="cosine")
    fit(supervised, Roles(student=module), digits()[0], {"student": optim}, steps=600, batch_size=64)
    return module.eval()


METHODS = {"": DisBack(nodes=()), "snoopi ": SNOOPI(), "nasa_t ": SNOOPI(nasa=True)}


def distilled(method: Any, teacher: nn.Module, seed: int, steps: int) -> Denoiser:
    """A student of one step."""
    g = torch.Generator().manual_seed(seed)
    y, other = torch.randint(CLASSES, (2, 100 * BATCH), generator=g)
    tokens = prompts(y, other, torch.rand(len(y), generator=g))
    m = Roles(teacher=teacher, student=network(), fake=network())
    for name in ("student", "fake"):
        m[name].module.load_state_dict(teacher.state_dict())
    rates = {
        "student": Optim("adam", lr=LR, schedule="cosine", final=0.05, warmup=10),
        "fake": Optim("adam", lr=1e-3),
    }
    source = Noise((1, 8, 8), conditions=tokens, negatives=torch.stack([other, other], 1), seed=seed)
    fit(method.step, m, source, rates, steps=steps, batch_size=BATCH, seed=seed)
    student: Any = m.student.module
    return student.eval()


@torch.no_grad()
def judged(student: Denoiser, seed: int, kind: str, how: str, scale: float, count: int = 1800) -> dict[str, float]:
    """Samples of prompts that allow two classes (`pair`) or all (`any`), away from one of them."""
    i = torch.arange(count)
    y, other = i % CLASSES, (i + 1 + (i // CLASSES) % (CLASSES - 1)) % CLASSES  # all pairs equally often
    z = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1000 + seed))
    text = torch.stack([y, other], 1) if kind == "pair" else torch.full((count, 2), ANY)
    negative = torch.stack([other, other], 1)
    net: Any = student.net
    if how == "attention":
        with away(net, net.states(negative), scale):
            x = student(z, condition=text)
    else:
        x = student(z, condition=text)
        x = x + scale * (x - student(z, condition=negative))
    x = x.clamp(-1, 1)
    features = judge().body(x)
    found = judge().fc(features.relu()).argmax(1)
    test = judge().body(whole(digits()[2]).x)
    numbers = {"named": found == other, "left": found == y}
    shares = {name: 100 * float(v.double().mean()) for name, v in numbers.items()}
    return {**shares, "frechet": float(frechet_distance(features, test))}


def main() -> None:
    args = options(__doc__ or "", seeds=3, steps=300)
    judge()
    teacher = seeded(0, network)
    optim = {"student": Optim("adam", lr=2e-3, schedule="cosine", warmup=100)}
    fit(denoise, Roles(student=teacher), digits()[0], optim, steps=2500, batch_size=BATCH)
    teacher.eval()
    rows: dict[str, Any] = {}
    for seed in range(args.seeds):
        for by, method in METHODS.items():
            student = distilled(method, teacher, seed, args.steps)
            for kind, how, scale in product(("pair", "any"), ("attention",) if by else ("attention", "output"), SCALES):
                place = rows.setdefault(kind, {}).setdefault(by + how, {}).setdefault(str(scale), {})
                for name, value in judged(student, seed, kind, how, scale).items():
                    place.setdefault(name, []).append(round(value, 2))
        print(rows["pair"]["attention"], flush=True)
    means = {
        kind: {
            how: {s: {n: round(sum(v) / len(v), 1) for n, v in found.items()} for s, found in by.items()}
            for how, by in ways.items()
        }
        for kind, ways in rows.items()
    }
    right = accuracy(Roles(student=judge()), digits()[2])
    about = {"machine": machine("diffusers"), "updates": args.steps, "classifier": round(right, 1)}
    report({**about, "mean": means, "per_seed": rows}, args.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
