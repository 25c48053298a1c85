"""Tables of bigrams under prompts, judged exactly: what share of texts a grammar allows, and how much they differ."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.convert.interpolate import interpolate
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.data.language import Prompts
from limbeck.evaluate.budget import Passes, total_passes
from limbeck.losses.tokens import guided_logits
from limbeck.methods.diversity_cfg.method import DiversityCFG
from limbeck.prove import Arm, Comparison, Proof, Trial, fit

VOCABULARY, COUNT, LENGTH, ALLOWED = 8, 12, 4, 3
STEPS, BETA, POINTS = 600, 10.0, 5
RATES = (0.03, 0.1, 0.3)
Front = list[tuple["Table", float]]  # students and the temperatures that they are sampled at


class Table(nn.Module):
    """Logits of the next token for each prompt and token before, `[prompts + 1, tokens + 1, tokens]`.

    The first token is the prompt, the last prompt the negative one. Grammatical tokens are likelier under a prompt, more or less.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        z = 0.5 * torch.randn(COUNT + 1, VOCABULARY + 1, VOCABULARY, generator=generator)
        z[:-1] += 1.2 * grammar(seed)
        self.logits = nn.Parameter(z)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, L, V]`."""
        before = F.pad(input_ids[:, 1:], (1, 0), value=VOCABULARY)
        return self.logits[input_ids[:, :1], before]


class Bag(nn.Module):
    """How often each token is in a text, an embedding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Counts `[B, V]`."""
        return (F.one_hot(input_ids, VOCABULARY) * attention_mask[..., None]).sum(1).float()


def grammar(seed: int) -> Tensor:
    """Which tokens may follow, `[prompts, tokens + 1, tokens]` bool; nothing is trained on it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.rand(COUNT, VOCABULARY + 1, VOCABULARY, generator=generator).argsort(-1)
    return order < ALLOWED


def prompts(count: int = COUNT) -> Prompts:
    """The prompts in turn, with the negative one."""
    return Prompts((torch.arange(count) % COUNT)[:, None], torch.tensor([COUNT]))


def exact(logits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Of logits `[prompts, tokens + 1, tokens]`: the share of grammatical texts and the diversity of each prompt.

    All texts are gone through; diversity is `1 - |E e(y)|^2`, e the bag of tokens in unit length.
    """
    texts = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)  # [V^L, L]
    before = F.pad(texts[:, :-1], (1, 0), value=VOCABULARY)
    p = logits.log_softmax(-1)[:, before, texts].sum(-1).exp()  # [C, V^L]
    good = grammar(seed)[:, before, texts].all(-1)
    vectors = F.normalize(F.one_hot(texts, VOCABULARY).sum(1).float(), dim=-1)
    return (p * good).sum(1), 1 - (p @ vectors).square().sum(1)


def point(logits: Tensor, seed: int, rows: slice) -> tuple[float, float]:
    """Quality and diversity, means over some of the prompts."""
    with torch.no_grad():
        quality, spread = exact(logits, seed)
    return quality[rows].mean().item(), spread[rows].mean().item()


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """The area below and left of points, from (0, 0)."""
    area, reached = 0.0, 0.0
    for quality, spread in sorted(points, reverse=True):
        area += quality * max(0.0, spread - reached)
        reached = max(reached, spread)
    return area


def train(seed: int, lr: float, steps: int, method: DiversityCFG) -> tuple[Table, dict[str, Passes]]:
    """A student from the teacher's table."""
    m = Roles(teacher=Table(seed), student=Table(seed), embedder=Bag())
    optim = {"student": Optim("adam", lr=lr, schedule="cosine", final=0.05)}
    passes = fit(method.step, m, prompts(), optim, steps=steps, batch_size=COUNT, seed=seed)
    student = m.student.module
    assert isinstance(student, Table)
    return student, passes


def students(seed: int, lr: float, methods: Sequence[DiversityCFG]) -> tuple[list[Table], dict[str, Passes]]:
    """One student for each setting, all together within the budget."""
    made = [train(seed, lr, STEPS // len(methods), method) for method in methods]
    return [table for table, _ in made], total_passes(passes for _, passes in made)


def method(beta: float = 0.0, guidance: float = 3.0) -> DiversityCFG:
    """The method in this world."""
    return DiversityCFG(beta=beta, guidance=guidance, length=LENGTH)


def arm(methods: Sequence[DiversityCFG], front: Callable[[list[Table]], Front]) -> Arm:
    """Students of several settings and the points that are made of them."""

    def run(seed: int, lr: float) -> Trial:
        made, passes = students(seed, lr, methods)
        ways = [z.logits[:-1] / temperature for z, temperature in front(made)]
        validation, test = (slice(0, COUNT // 2), slice(COUNT // 2, COUNT))
        areas = [100 * hypervolume([point(z, seed, rows) for z in ways]) for rows in (validation, test)]
        return Trial(areas[0], areas[1], passes, also=_also(seed, ways, test))

    return Arm(run, "lr", RATES)


def _also(seed: int, ways: list[Tensor], rows: slice) -> dict[str, float]:
    """Quality and diversity, in per cent, of start, guided teacher, and of the first, middle and last point."""
    z = Table(seed).logits.detach()
    named = {"start": z[:-1], "guided": guided_logits(z[:-1], z[-1:].expand_as(z[:-1]), 3.0)}
    named |= {"first": ways[0], "middle": ways[len(ways) // 2], "last": ways[-1]}
    found = {name: point(logits, seed, rows) for name, logits in named.items()}
    return {f"{k} {what}": 100 * v[i] for k, v in found.items() for i, what in enumerate(("quality", "diversity"))}


def merged(made: list[Table]) -> Front:
    """Models between two students."""
    ends = (made[0], made[1])
    family = [interpolate(*ends, i / (POINTS - 1)) for i in range(POINTS)]
    return [(table, 1.0) for table in family if isinstance(table, Table)]


def each(made: list[Table]) -> Front:
    """The students as they are."""
    return [(table, 1.0) for table in made]


PROOF = Proof(
    claim="Two students, of guidance distilled with and without a reward for diversity, and models between their weights give "
    "more quality and diversity than sampling hotter, guiding less or training a student for each trade-off "
    "(Cideron et al. 2024)",
    task=f"bigram tables of {VOCABULARY} tokens, {COUNT} prompts, texts of {LENGTH}; quality: the share of texts that a grammar "
    f"allows; diversity: 1 - cos of bags of tokens, both exact; {STEPS} steps in all for {POINTS} points; rates chosen on 6 "
    "prompts, reported on the other 6",
    metric="hypervolume of quality and diversity, times 100",
    arms={
        "temperature": arm([method()], lambda made: [(made[0], t) for t in (1.0, 1.25, 1.5, 2.0, 3.0)]),
        "guidance": arm([method(guidance=g) for g in (3.0, 2.5, 2.0, 1.5, 1.0)], each),
        "a student for each beta": arm([method(BETA * i / (POINTS - 1)) for i in range(POINTS)], each),
        "diversity_cfg": arm([method(), method(BETA)], merged),
    },
    comparisons=[
        Comparison("diversity_cfg", "temperature"),
        Comparison("diversity_cfg", "guidance"),
        Comparison("diversity_cfg", "a student for each beta", asserted=False),
    ],
)
