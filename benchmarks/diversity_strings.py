"""Diversity-rewarded guidance on texts of a small language, judged by its grammar and by sentence embeddings.

    python benchmarks/diversity_strings.py --out benchmarks/results/diversity-strings.json

A GPT-2 of two layers learns texts "the <adjective> <noun> <verb> the <noun> <place>" on six topics, whose words are drawn from
Zipf's law and are wrong, any word of the language, in a quarter of their places; the negative prompt's are always any word.
Arms, each of the same number of steps in all: one student of guidance alone, sampled at five temperatures; five students of less
and less guidance; five of more and more reward; and two students with what lies between their weights. Quality is the share of
texts without a wrong word, diversity the mean 1 - cos of MiniLM's embeddings under a topic; reported beside them: the share of
texts that are right and unlike all others. The rate of each arm is chosen on seed 100.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import lru_cache
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from measuring import machine, options, report
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from limbeck import Optim, Roles
from limbeck.convert.interpolate import interpolate
from limbeck.data.language import Prompts
from limbeck.losses.tokens import guided_logits
from limbeck.methods.diversity_cfg.method import DiversityCFG, diversity
from limbeck.methods.diversity_cfg.proof import hypervolume
from limbeck.models.sentence import load_encoder
from limbeck.nn.autoregressive import sample
from limbeck.prove import fit, seeded

TOPICS = {
    "animals": ("small old grey shy", "cat horse fox owl hare", "chases watches follows fears", "outside nearby underground"),
    "food": ("sweet fresh salty warm", "soup bread cheese plum cake", "covers fills softens spoils", "overnight slowly here"),
    "weather": ("heavy sudden cold mild", "storm fog wind cloud rain", "hides brings soaks cools", "everywhere today northwards"),
    "sport": ("fast tired young proud", "runner keeper coach boxer rider", "beats trains passes helps", "again narrowly today"),
    "music": ("loud soft sad modern", "drum violin choir tune song", "joins drowns echoes answers", "loudly tonight backstage"),
    "machines": ("rusty quick large broken", "crane engine robot pump drill", "lifts drives stops turns", "indoors back alone"),
}  # fmt: skip
SLOTS = (0, 1, 2, 1, 3)  # of the kinds of words in a text
LENGTH, SAMPLES = 6, 24  # a text's tokens; texts judged of a topic
NAMES = list(TOPICS)
KINDS = [[text.split() for text in kinds] for kinds in TOPICS.values()]
WORDS = ["the", *sorted({word for kinds in KINDS for kind in kinds for word in kind})]
PROMPT, NEGATIVE = len(WORDS), len(WORDS) + len(NAMES)  # the first topic's token, and the negative one
VOCABULARY = NEGATIVE + 1
WRONG, STEPS, POINTS, BETA, GUIDANCE = 0.25, 240, 5, 10.0, 3.0
RATES, SEEDS = (3e-4, 1e-3), 3


def texts(topic: int, count: int, generator: torch.Generator, wrong: float = WRONG) -> Tensor:
    """Tokens `[count, LENGTH]`: five words, with "the" before the second noun as the grammar has it."""
    columns = []
    for slot in SLOTS:
        words = KINDS[topic][slot]
        law = 1 / torch.arange(1.0, len(words) + 1)
        own = torch.tensor([WORDS.index(word) for word in words])[law.multinomial(count, True, generator=generator)]
        any_word = torch.randint(1, len(WORDS), (count,), generator=generator)
        columns.append(torch.where(torch.rand(count, generator=generator) < wrong, any_word, own))
    columns.insert(3, torch.zeros(count, dtype=torch.long))
    return torch.stack(columns, 1)


def right(tokens: Tensor, topic: int) -> Tensor:
    """Which texts have no wrong word `[N]`."""
    allowed = torch.zeros(LENGTH, VOCABULARY, dtype=torch.bool)
    for place, slot in zip((0, 1, 2, 4, 5), SLOTS, strict=True):
        allowed[place, [WORDS.index(word) for word in KINDS[topic][slot]]] = True
    allowed[3, 0] = True
    return allowed[torch.arange(LENGTH), tokens].all(1)


@lru_cache(maxsize=1)
def base(seed: int) -> nn.Module:
    """The model that all arms start from."""
    sizes = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
                       eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model: nn.Module = seeded(seed, lambda: GPT2LMHeadModel(sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(seed)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 600)
        rows = [F.pad(texts(c, 16, g), (1, 0), value=PROMPT + c) for c in range(len(NAMES))]
        rows += [F.pad(texts(c, 4, g, wrong=1.0), (1, 0), value=NEGATIVE) for c in range(len(NAMES))]
        x = torch.cat(rows)
        loss = F.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


class Sentences(nn.Module):
    """MiniLM's vectors of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = load_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, D]`."""
        said = ["the " + " ".join(WORDS[i] if i < len(WORDS) else "?" for i in row) for row in input_ids.tolist()]
        return self.encoder.encode(said)


@lru_cache(maxsize=1)
def sentences() -> Sentences:
    return Sentences()


class Guided(nn.Module):
    """A model under guidance, and at a temperature, as a model."""

    def __init__(self, model: nn.Module, guidance: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.guidance, self.temperature = model, guidance, temperature

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, L, V]`."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        if self.guidance != 1.0:
            negative = F.pad(input_ids[:, 1:], (1, 0), value=NEGATIVE)
            other = self.model(input_ids=negative, attention_mask=attention_mask).logits
            logits = guided_logits(logits, other, self.guidance)
        return logits / self.temperature


@torch.no_grad()
def judge(model: nn.Module, seed: int) -> dict[str, float]:
    """Quality, diversity, and the share of right texts that are unlike all others, in per cent."""
    found: dict[str, list[float]] = {"quality": [], "diversity": [], "right and distinct": []}
    for c in range(len(NAMES)):
        u = torch.rand(SAMPLES, LENGTH, generator=torch.Generator().manual_seed(7 * seed + c))
        tokens, mask = sample(model, {"input_ids": torch.full((SAMPLES, 1), PROMPT + c)}, u)
        good = right(tokens, c)
        away = diversity(sentences()(tokens, mask)[None])[0]
        found["quality"].append(100 * good.float().mean().item())
        found["diversity"].append(100 * away.sum().item() / (SAMPLES * (SAMPLES - 1)))
        found["right and distinct"].append(100 * len(tokens[good].unique(dim=0)) / SAMPLES)
    return {name: mean(values) for name, values in found.items()}


def student(seed: int, lr: float, steps: int, beta: float = 0.0, guidance: float = GUIDANCE) -> nn.Module:
    """Trained from the model's own weights."""
    start = base(seed)
    m = Roles(teacher=copy.deepcopy(start), student=copy.deepcopy(start), embedder=sentences())
    method = DiversityCFG(beta=beta, guidance=guidance, length=LENGTH)
    prompts = Prompts((PROMPT + torch.arange(len(NAMES)))[:, None], torch.tensor([NEGATIVE]))
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05)}
    fit(method.step, m, prompts, optim, steps=steps, batch_size=len(NAMES), seed=seed)
    return m.student.module.eval()


def front(arm: str, seed: int, lr: float) -> list[nn.Module]:
    """The models of an arm, sampled as they are."""
    if arm == "temperature":
        one = student(seed, lr, STEPS)
        return [Guided(one, temperature=t) for t in (1.0, 1.25, 1.5, 2.0, 3.0)]
    if arm == "guidance":
        return [Guided(student(seed, lr, STEPS // POINTS, guidance=g)) for g in (3.0, 2.5, 2.0, 1.5, 1.0)]
    if arm == "a student for each beta":
        return [Guided(student(seed, lr, STEPS // POINTS, BETA * i / (POINTS - 1))) for i in range(POINTS)]
    ends = [student(seed, lr, STEPS // 2, beta) for beta in (0.0, BETA)]
    return [Guided(interpolate(ends[0], ends[1], i / (POINTS - 1))) for i in range(POINTS)]


def area(points: Sequence[dict[str, float]]) -> float:
    return hypervolume([(p["quality"], p["diversity"]) for p in points]) / 100


def main() -> None:
    """All arms."""
    o = options(__doc__ or "", seeds=SEEDS)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine("transformers"), "steps": STEPS, "arms": {}}
    result["start"] = {str(s): judge(Guided(base(s)), s) for s in range(o.seeds)}
    result["guided teacher"] = {str(s): judge(Guided(base(s), GUIDANCE), s) for s in range(o.seeds)}
    for arm in ("temperature", "guidance", "a student for each beta", "diversity_cfg"):
        began = time.process_time()
        chosen = {str(lr): round(area([judge(model, 100) for model in front(arm, 100, lr)]), 3) for lr in RATES}
        lr = max(RATES, key=lambda rate: chosen[str(rate)])
        points = [[judge(model, seed) for model in front(arm, seed, lr)] for seed in range(o.seeds)]
        areas = [area(found) for found in points]
        result["arms"][arm] = {
            "lr": lr, "areas of seed 100": chosen, "areas": [round(a, 2) for a in areas], "mean": round(mean(areas), 2),
            "deviation": round(stdev(areas), 2), "points": points, "cpu minutes": round((time.process_time() - began) / 60, 1),
        }  # fmt: skip
        report(result, o.out)


if __name__ == "__main__":
    main()
