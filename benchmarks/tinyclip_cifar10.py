"""TinyCLIP on CIFAR-10 with prompts: a small CLIP from scratch, by inherited weights and by learnt masks, at equal steps.

    LIMBECK_DATA=path python benchmarks/tinyclip_cifar10.py --out benchmarks/results/tinyclip-cifar10.json

Every image goes with "a photo of a {class}."; a student is judged by prompts on images that nobody has seen. All ten classes are
in training, so this is no zero-shot task. Trials are kept in `runs/tinyclip-cifar10`: stopped and started again, it goes on.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from measuring import options, report
from shared_images import CLASSES, cifar10_images
from torch import nn

from limbeck import Method, Optim, Roles
from limbeck.data import Data, TensorSource
from limbeck.data.image_text import captioned
from limbeck.evaluate.tasks import ZeroShot
from limbeck.methods.tinyclip.method import Inherit, TinyCLIP
from limbeck.methods.tinyclip.proof import Contrast
from limbeck.prove import Arm, Comparison, Proof, Trial, fit, run_proof, seeded

FOLDER = Path("runs/tinyclip-cifar10")
PROMPT = "a photo of a {} ."
WORDS = ("[end]", "[pad]", "a", "photo", "of", ".", *CLASSES)
BATCH, STEPS, TAUGHT = 128, 200, 2000
RATES = (1e-3, 2e-3, 4e-3)
OPTIM = Optim("adamw", weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, schedule="cosine", warmup=0.05, clip=5.0)
HALF = {
    "vision_model.width": 0.75,
    "vision_model.*.heads": 3,
    "vision_model.*.ffn": 0.75,
    "text_model.encoder.layers": 1,
}
MASKS = TinyCLIP(mask_share=0.4, mask_lr=2.0)


def tokens(texts: Sequence[str]) -> dict[str, list[list[int]]]:
    return {"input_ids": [[*(WORDS.index(word) for word in text.split()), 0] for text in texts]}


def clip() -> nn.Module:
    """An image encoder of 4 layers of 64 on patches of 4 pixels, and a text encoder of 2 layers of 48."""
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": len(WORDS), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    ends = {
        "max_position_embeddings": 8,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "num_attention_heads": 3,
    }
    image = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            text_config=text | ends, vision_config=image | {"image_size": 16, "patch_size": 4}, projection_dim=32
        )
    )


@cache
def images() -> TensorSource:
    return cifar10_images(20_000)


@lru_cache(maxsize=1)
def task(seed: int) -> Data:
    """16,000 pairs to train on, 1,000 to tune on, 3,000 to test."""
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))
    parts = zip(("train", "validation", "test"), order.split([16_000, 1000, 3000]), strict=True)
    return Data(**{name: captioned(images().subset(rows), PROMPT, CLASSES, tokens) for name, rows in parts})


@lru_cache(maxsize=1)
def teacher(seed: int) -> nn.Module:
    """A CLIP trained on the pairs alone."""
    m = Roles(student=seeded(seed, clip))
    fit(Contrast(), m, task(seed), {"student": replace(OPTIM, lr=1e-3)}, steps=TAUGHT, batch_size=BATCH, seed=seed)
    return m.student.module


def copied(seed: int, keep: Any = None) -> nn.Module:
    """The teacher once more, or a part of it."""
    model = clip()
    model.load_state_dict(teacher(seed).state_dict())
    return Inherit(keep)(model)[0] if keep else model


def fresh(seed: int) -> nn.Module:
    """The student of half size, without what the teacher knows."""
    small: Any = copied(seed, HALF)
    return seeded(seed, lambda: small.apply(small._init_weights))


def judged(seed: int, m: Roles, split: str) -> float:
    """Accuracy (%) by prompts."""
    return 100 * ZeroShot(task(seed)[split])(Roles(student=m.student.module))["zero_shot_top1"]


def trained(seed: int, method: Method, lr: float, student: nn.Module) -> Trial:
    """One student, its budget and its score."""
    m = Roles(student=student) if isinstance(method, Contrast) else Roles(student=student, teacher=teacher(seed))
    passes = fit(method, m, task(seed), {"student": replace(OPTIM, lr=lr)}, steps=STEPS, batch_size=BATCH, seed=seed)
    size = sum(p.numel() for p in m.student.module.parameters())
    print(seed, type(method).__name__, lr, f"{size:,} parameters", flush=True)
    return Trial(judged(seed, m, "validation"), judged(seed, m, "test"), {"student": passes["student"]})


PROOF = Proof(
    claim="Inherited weights beat a fresh start at equal steps, and affinities are no worse than labels",
    task="CIFAR-10 at 16 px with prompts: 16,000 pairs to train on, 1,000 to tune on, 3,000 to test; a CLIP of 4 + 2 layers "
    f"taught for {TAUGHT} steps; students of half its prunable numbers, {STEPS} steps of {BATCH} pairs, masks included",
    metric="accuracy (%) by prompts",
    arms={
        "scratch": Arm(lambda seed, lr: trained(seed, Contrast(), lr, fresh(seed)), "lr", RATES),
        "scratch, affinity": Arm(lambda seed, lr: trained(seed, TinyCLIP(), lr, fresh(seed)), "lr", RATES),
        "rule": Arm(lambda seed, lr: trained(seed, TinyCLIP(keep=(HALF,)), lr, copied(seed)), "lr", RATES),
        "masks": Arm(lambda seed, lr: trained(seed, replace(MASKS, sparsity=(0.5,)), lr, copied(seed)), "lr", RATES),
    },
    comparisons=[
        Comparison("rule", "scratch, affinity"),
        Comparison("scratch, affinity", "scratch", margin=1.0),
        Comparison("masks", "rule", asserted=False),
        Comparison("rule", "scratch", asserted=False),
    ],
)


def main() -> None:
    """Run the comparison and write its result."""
    given = options(__doc__ or "", seeds=3)
    torch.set_num_threads(1)
    result = run_proof(PROOF, "tinyclip on CIFAR-10", given.seeds, FOLDER, Path(__file__).parent)
    taught = [round(judged(seed, Roles(student=teacher(seed)), "test"), 2) for seed in range(given.seeds)]
    report({**result, "teacher": taught}, given.out)


if __name__ == "__main__":
    main()
