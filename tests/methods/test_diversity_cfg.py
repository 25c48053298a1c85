"""Diversity-rewarded guidance distillation: the guided teacher, both gradients, and models between two."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.convert.interpolate import interpolate
from limbeck.core.errors import UsageError
from limbeck.data import Data
from limbeck.data.language import Prompts
from limbeck.engine.run import execute
from limbeck.losses.tokens import guided_logits, sequence_kl
from limbeck.methods.diversity_cfg.method import DiversityCFG, advantages, diversity, embed
from limbeck.methods.diversity_cfg.proof import COUNT, Bag, Table, exact, grammar, hypervolume, prompts
from limbeck.nn.autoregressive import alive, along, inputs, sample


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(student=0):
    return Roles(teacher=Table(0), student=Table(student), embedder=Bag())


def batch(n=6):
    return prompts().batch(torch.arange(n), 0)


def gradient(method, m, b=None):
    return torch.autograd.grad(method.step(m, b or batch()).loss, m.student.logits)[0]


def test_unguided_a_copy_of_the_teacher_rests():
    m, method = world(), DiversityCFG(guidance=1.0, beta=0.0, length=4)
    assert method.step(m, batch()).loss.abs() < 1e-7
    assert gradient(method, m).abs().max() < 1e-7
    assert gradient(DiversityCFG(guidance=2.0, beta=0.0, length=4), m).abs().max() > 1e-3


def test_the_gradient_of_the_divergence_in_closed_form():
    z, target = drawn(2, 3, 5).requires_grad_(), drawn(2, 3, 5, seed=1)
    loss = sequence_kl(z, target, torch.ones(2, 3, dtype=torch.bool), reduction="sum")
    log_q, log_p = z.detach().log_softmax(-1), target.log_softmax(-1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], log_q.exp() * (log_q - log_p - each))
    torch.testing.assert_close(loss.detach(), each.sum())


def test_divergences_add_up_over_positions_that_count_or_are_averaged():
    z, target, mask = drawn(2, 3, 5), drawn(2, 3, 5, seed=1), torch.tensor([[True] * 3, [True, False, False]])
    each = (z.softmax(-1) * (z.log_softmax(-1) - target.log_softmax(-1))).sum(-1)
    sums = torch.stack([each[0].sum(), each[1, 0]])
    torch.testing.assert_close(sequence_kl(z, target, mask, reduction="none"), sums)
    found = sequence_kl(z, target, mask, per_token=True)
    torch.testing.assert_close(found, (sums / torch.tensor([3, 1])).mean())


def test_guidance_is_a_product_of_powers_whatever_is_added_to_the_logits():
    z, negative = drawn(4, 6), drawn(4, 6, seed=1)
    power = z.softmax(-1) ** 3 * negative.softmax(-1) ** -2
    expected = power / power.sum(-1, keepdim=True)
    torch.testing.assert_close(guided_logits(z, negative, 3.0).exp(), expected)
    torch.testing.assert_close(guided_logits(z + 5, negative - 7, 3.0).exp(), expected)
    for scale in (0.0, 1.0, 4.5):
        torch.testing.assert_close(guided_logits(z, z, scale), z.log_softmax(-1))


def test_banned_tokens_stay_banned():
    z, negative = drawn(1, 4), drawn(1, 4, seed=1)
    z[0, 0] = negative[0, 0] = z[0, 1] = negative[0, 2] = -math.inf
    found = guided_logits(z, negative, 3.0)
    assert found.exp().tolist() == [[0, 0, 0, 1]]


def test_the_reward():
    e = drawn(3, 4, 5)
    e[:, 1] = 2 * e[:, 0]
    r = diversity(e)
    assert r.min() >= 0
    assert r.max() <= 2
    assert torch.equal(r, r.mT)
    assert r[:, 0, 1].abs().max() < 1e-6
    torch.testing.assert_close(diversity(3 * e), r)
    torch.testing.assert_close(diversity(torch.stack([e[:, 0], -e[:, 0]], 1))[:, 0, 1], torch.full((3,), 2.0))


def test_without_a_reward_nothing_embeds():
    m = Roles(teacher=Table(0), student=Table(1))
    method = DiversityCFG(beta=0.0, length=4)
    update = method.step(m, batch())
    assert set(update.logs) == {"kl"}
    torch.testing.assert_close(gradient(method, m), gradient(method, world(1)))


@pytest.mark.parametrize("n", [2, 3])
def test_the_gradient_of_diversity_is_unbiased(n):
    """All texts of 2 tokens of 3, all tuples of n of them, against the exact derivative."""
    z = drawn(4, 3, seed=3).requires_grad_()
    texts = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # [9, 2]
    before = F.pad(texts[:, :1], (1, 0), value=3)
    log_p = z.log_softmax(-1)[before, texts].sum(-1)
    vectors = drawn(9, 4, seed=4)
    p, r = log_p.exp(), diversity(vectors[None])[0].double()
    expected = torch.autograd.grad((p[:, None] * p * r).sum(), z, retain_graph=True)[0]
    tuples = torch.tensor(list(itertools.product(range(9), repeat=n)))
    weights = 2 / n * advantages(diversity(vectors[tuples])).double()
    gain = (p.detach()[tuples].prod(1, keepdim=True) * weights * log_p[tuples]).sum()
    torch.testing.assert_close(torch.autograd.grad(gain, z)[0], expected, atol=1e-7, rtol=1e-5)


def test_the_step_is_divergence_less_beta_times_gain():
    m, b = world(1), batch()
    gradients = [gradient(DiversityCFG(beta=beta, length=4), m, b) for beta in (0.0, 1.0, 4.0)]
    torch.testing.assert_close(gradients[2] - gradients[0], 4 * (gradients[1] - gradients[0]), atol=1e-6, rtol=1e-4)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-4


def test_the_mean_gradient_of_many_steps_is_that_of_exact_diversity():
    m, method = world(1), DiversityCFG(beta=1.0, length=4)
    still = DiversityCFG(beta=0.0, length=4)
    b = Prompts(torch.zeros(8000, 1, dtype=torch.long), torch.tensor([COUNT])).batch(torch.arange(8000), 0)
    total = gradient(still, m, b) - gradient(method, m, b)
    spread = exact(m.student.logits[:-1], 0)[1][0]
    expected = torch.autograd.grad(spread, m.student.logits)[0]
    cosine = F.cosine_similarity(total.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.97
    assert total.norm() / expected.norm() == pytest.approx(1, abs=0.1)


def test_samples_are_of_the_students_distribution_and_belong_to_the_sample():
    table = Table(1)
    u = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample(table, {"input_ids": torch.zeros(20_000, 1, dtype=torch.long)}, u)
    found = torch.bincount(tokens[:, 0], minlength=8) / 20_000
    torch.testing.assert_close(found, table.logits[0, 8].detach().softmax(-1), atol=0.015, rtol=0)
    m, seen = world(1), []
    m.embedder.module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    method = DiversityCFG(length=4)
    for part in (batch()[0:6], batch()[2:4]):
        method.step(m, part)
    assert seen[0].view(6, 4, 4)[2:4].equal(seen[1].view(2, 4, 4))
    assert not seen[0].view(6, 4, 4)[:, 0].equal(seen[0].view(6, 4, 4)[:, 1])


def test_texts_end():
    assert alive(torch.tensor([[1, 2, 1, 2], [2, 1, 1, 1], [1, 1, 1, 1]]), 2).sum(1).tolist() == [2, 1, 4]
    m = world(1)
    table = m.student.module
    with torch.no_grad():
        table.logits[:, :, 5] = 50.0  # all end at once
    method = DiversityCFG(beta=0.0, length=4, end=5)
    log_q = table.logits[0, 8].log_softmax(-1)
    z = m.teacher.logits
    expected = (log_q.exp() * (log_q - guided_logits(z[0, 8], z[COUNT, 8], 3.0))).sum()
    torch.testing.assert_close(method.step(m, batch(1)).loss, expected)


def gpt2(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.5)).eval()


def test_of_transformers_what_is_kept_and_padding_change_nothing():
    model = gpt2()
    u = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(20, (3, 4), generator=torch.Generator().manual_seed(2))
    tokens, _ = sample(model, {"input_ids": ids}, u)
    whole = ids
    for n in range(5):  # without keeping anything
        z = model(input_ids=whole).logits[:, -1].double().softmax(-1).cumsum(-1)
        whole = torch.cat([whole, torch.searchsorted(z, u[:, n : n + 1].double(), right=True)], 1)
    assert tokens.equal(whole[:, 4:])
    padded = {"input_ids": F.pad(ids, (2, 0), value=7), "attention_mask": F.pad(torch.ones_like(ids), (2, 0))}
    assert sample(model, padded, u)[0].equal(tokens)
    logits = along(model(**inputs(model, padded, tokens)).logits, 5)
    torch.testing.assert_close(logits, along(model(input_ids=whole).logits, 5), atol=1e-4, rtol=1e-4)


class Older(nn.Module):
    """As models of transformers were before `cache`: logits of the number of tokens so far."""

    def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=False):
        so_far = (past_key_values or 0) + input_ids.shape[1]
        logits = 100.0 * F.one_hot(torch.tensor(so_far), 20).expand(*input_ids.shape, 20)
        return SimpleNamespace(logits=logits, past_key_values=so_far if use_cache else None)


@pytest.mark.parametrize("make", [gpt2, Older])
def test_what_a_model_keeps_is_not_computed_again(make):
    model, lengths = make(), []
    model.register_forward_pre_hook(lambda _, args, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    tokens, _ = sample(model, {"input_ids": torch.ones(2, 4, dtype=torch.int64)}, torch.full((2, 3), 0.5))
    assert lengths == [4, 1, 1]
    if isinstance(model, Older):
        assert tokens.tolist() == [[4, 5, 6]] * 2


def test_without_an_embedder_the_teachers_embeddings_are_averaged():
    m = Roles(teacher=gpt2(), student=gpt2())
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(embed(m, tokens, mask)[0], m.teacher.transformer.wte.weight[1:3].mean(0))
    source = Prompts(torch.tensor([[3, 4], [0, 5]]), torch.tensor([7]), torch.tensor([[1, 1], [0, 1]]))
    method = DiversityCFG(length=3, samples=2)
    method.check(m, source.batch(torch.arange(2), 0))
    update = method.step(m, source.batch(torch.arange(2), 0))
    update.backward()
    assert m.teacher.transformer.wte.weight.grad is None
    assert m.student.transformer.wte.weight.grad.abs().sum() > 0


def test_models_between_two():
    a, b = Table(0), Table(1)
    for share, end in ((0.0, a), (1.0, b)):
        assert interpolate(a, b, share).logits.equal(end.logits)
    middle = interpolate(a, b, 0.25)
    p = (a.logits.log_softmax(-1) * 0.75 + b.logits.log_softmax(-1) * 0.25).softmax(-1)  # a geometric mixture
    torch.testing.assert_close(middle.logits.softmax(-1), p)
    c, d = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(interpolate(c, d, 0.25)(x), 0.75 * c(x) + 0.25 * d(x))
    half = interpolate(c.half(), d.half(), 0.5).weight
    assert half.equal(((c.weight.float() + d.weight.float()) / 2).half())
    norms = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    norms[1].num_batches_tracked += 7
    norms[1].running_mean += 4
    mixed = interpolate(*norms, 0.5)
    assert mixed.num_batches_tracked == 0
    assert mixed.running_mean.tolist() == [2, 2]


def test_models_with_nothing_between_them():
    with pytest.raises(UsageError, match="share is out of range"):
        interpolate(Table(), Table(), 1.5)
    with pytest.raises(UsageError, match="different tensors"):
        interpolate(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)
    with pytest.raises(UsageError, match="differs in form"):
        interpolate(nn.Linear(2, 2), nn.Linear(2, 3), 0.5)


def test_the_judges_of_the_proof():
    uniform = torch.zeros(COUNT, 9, 8)
    quality, spread = exact(uniform, 0)
    torch.testing.assert_close(quality, torch.full((COUNT,), (3 / 8) ** 4))
    certain = 200.0 * F.one_hot(grammar(0).float().argmax(-1), 8)
    quality, spread = exact(certain, 0)
    torch.testing.assert_close(quality, torch.ones(COUNT))
    assert spread.abs().max() < 1e-5
    assert hypervolume([(0.5, 0.5), (1.0, 0.25), (0.4, 0.4)]) == pytest.approx(0.375)


def test_it_comes_near_the_guided_teacher_and_a_reward_makes_it_more_diverse():
    found = []
    for beta in (0.0, 10.0):
        m = world()
        engine = Engine(steps=150, batch_size=COUNT, device="cpu", evaluate_every=0)
        start = copy.deepcopy(m.teacher.logits.detach())
        optim = {"student": Optim("adam", lr=0.1)}
        execute(DiversityCFG(beta=beta, length=4), m, Data(train=prompts()), engine, optim=optim)
        assert m.teacher.logits.equal(start)
        found.append([v.mean().item() for v in exact(m.student.logits[:-1].detach(), 0)])
    z = start
    first, guided = exact(z[:-1], 0), exact(guided_logits(z[:-1], z[-1:].expand_as(z[:-1]), 3.0), 0)
    assert found[0][0] > 0.85 * guided[0].mean() > first[0].mean()
    assert found[1][1] > found[0][1] + 0.02


def test_what_does_not_fit():
    with pytest.raises(UsageError, match="negative prompts"):
        DiversityCFG().check(world(), Batch(x=torch.zeros(2, 3), id=torch.arange(2)))
    with pytest.raises(UsageError, match="nothing embeds"):
        DiversityCFG().check(Roles(teacher=Table(), student=Table()), batch())
    small = Table()
    small.logits = nn.Parameter(small.logits[..., :5].detach().clone())
    with pytest.raises(UsageError, match="vocabularies"):
        DiversityCFG().check(Roles(teacher=Table(), student=small, embedder=Bag()), batch())
    fields = (
        {"guidance": 0.5}, {"beta": -1.0}, {"length": 0}, {"samples": 1}, {"samples": 0, "beta": 0.0},
        {"length_reduction": "max"},
    )  # fmt: skip
    for field in fields:
        with pytest.raises(UsageError, match="out of range"):
            DiversityCFG(**field)
    with pytest.raises(UsageError, match="ends in padding"):
        Prompts(torch.tensor([[1, 0]]), torch.tensor([1]), torch.tensor([[1, 0]]))
    with pytest.raises(UsageError, match="do not fit"):
        Prompts(torch.zeros(2, 0, dtype=torch.long), torch.tensor([1]))
