"""SNOOPI: one random scale for both networks, and attention that leads away from a negative text."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data
from limbeck.data.noise import Noise
from limbeck.diffusion import Denoiser, Draws, RectifiedFlow, guided, ring
from limbeck.diffusion.score_gap import drawn_scale, score_gap
from limbeck.diffusion.scores import predicted
from limbeck.engine.run import execute
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.snoopi.method import SNOOPI, states
from limbeck.nn.nasa import AwayProcessor, attention_away, away
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import seeded

FLOW = RectifiedFlow()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, hidden=8):
    return seeded(seed, lambda: Denoiser(TimeMLP(2, hidden, 2, classes=4), FLOW, "flow_prediction", null=4))


def teacher():
    return ring(8, 2.0, 0.2, FLOW, classes=4)


def batch(n=8):
    return Batch(x=torch.randn(n, 2, generator=rng(3)), y=torch.arange(n) % 4, id=torch.arange(n))


class Attending(nn.Module):
    """Points as one position each, and an embedding of a prompt of two tokens that they attend to, by a layer of diffusers."""

    def __init__(self):
        super().__init__()
        kind = pytest.importorskip("diffusers.models.attention_processor").Attention
        self.text, self.first = nn.Embedding(6, 8), nn.Linear(3, 8)
        self.attention, self.last = kind(8, cross_attention_dim=8, heads=2, dim_head=4), nn.Linear(8, 2)

    def states(self, condition):
        return self.text(condition)

    def forward(self, x, t, condition):
        h = self.first(torch.cat([x, t[:, None]], 1))[:, None]
        return self.last((h + self.attention(h, encoder_hidden_states=self.states(condition)))[:, 0])


def attending(seed=0):
    return seeded(seed, lambda: Denoiser(Attending(), FLOW, "flow_prediction", null=torch.tensor([5, 5])))


def prompts(n=8):
    y = torch.stack([torch.arange(n) % 3, torch.full((n,), 5)], 1)
    return Batch(x=torch.randn(n, 2, generator=rng(3)), y=y, negative=y.roll(1, 0), id=torch.arange(n))


# The range of scales.


def test_a_range_of_one_scale_is_that_scale():
    m = Roles(teacher=teacher(), student=network(), fake=network(2))
    b, draws = batch(), Draws(m, batch())
    x = SNOOPI().generate(m, b)
    fixed = score_gap(m, draws, x, b.y, scale=2.0, fake_scale=2.0, times=(0.02, 0.98))
    scale = drawn_scale((2.0, 2.0), draws)
    torch.testing.assert_close(score_gap(m, draws, x, b.y, scale=scale, fake_scale=scale, times=(0.02, 0.98)), fixed)


@pytest.mark.parametrize("guidance", [(0.5, 4.0), (0.5, 0.5), (4.5, 4.5)])
def test_it_rests_where_the_distributions_are_equal_and_both_have_one_scale(guidance):
    m = Roles(teacher=teacher(), student=network(), fake=teacher())
    assert float(next(iter(SNOOPI(guidance=guidance).step(m, batch()))).logs["gap"]) == 0
    b, draws = batch(), Draws(m, batch())
    x = SNOOPI().generate(m, b)
    other = score_gap(m, draws, x, b.y, scale=2.0, fake_scale=3.0, times=(0.02, 0.98))
    x_t, t = x.detach(), torch.full((8,), 0.5)
    differs = (predicted(m.teacher, x_t, t, b.y) - predicted(m.teacher, x_t, t, m.teacher.null_like(b.y))).abs() > 1e-3
    assert other.any(1).double().mean() >= differs.any(1).double().mean() > 0.5


def test_at_one_point_random_scales_have_the_gap_of_their_mean():
    m = Roles(teacher=teacher(), student=network(), fake=network(2))
    x, t, y = torch.randn(1, 2, generator=rng()), torch.full((1,), 0.5), torch.tensor([1])

    def gap(k):
        return predicted(m.fake, x, t, y, k) - predicted(m.teacher, x, t, y, k)

    scales = [0.5, 1.0, 2.0, 3.7]
    torch.testing.assert_close(torch.stack([gap(k) for k in scales]).mean(0), gap(sum(scales) / 4))


def test_scales_are_even_and_belong_to_samples():
    draws = Draws(Roles(), Batch(id=torch.arange(5000)))
    scales = drawn_scale((0.5, 4.0), draws)
    assert scales.min() >= 0.5
    assert scales.max() <= 4.0
    assert scales.mean().item() == pytest.approx(2.25, abs=0.05)
    assert drawn_scale((0.5, 4.0), Draws(Roles(), Batch(id=torch.arange(2500, 5000)))).equal(scales[2500:])


# Attention.


def heads(seed, *shape):
    return torch.randn(*shape, generator=rng(seed))


def test_attention_away_by_hand():
    q, k, v = heads(0, 2, 3, 4, 5), heads(1, 2, 3, 6, 5), heads(2, 2, 3, 6, 5)
    k_, v_ = heads(3, 2, 3, 2, 5), heads(4, 2, 3, 2, 5)

    def attend(k, v):
        return (q @ k.mT / 5**0.5).softmax(-1) @ v

    found = attention_away(q, k, v, k_, v_, torch.tensor([0.2, 0.7]))
    expected = attend(k, v) - torch.tensor([0.2, 0.7]).view(2, 1, 1, 1) * attend(k_, v_)
    torch.testing.assert_close(found, expected)
    stock = F.scaled_dot_product_attention(q, k, v)
    assert attention_away(q, k, v, k_, v_, 0.0).equal(stock)
    assert attention_away(q, k, v, k_, v_, torch.zeros(2)).equal(stock)
    assert attention_away(q, k, v, k_, torch.zeros_like(v_), 0.9).equal(stock)  # nothing to lead away from
    torch.testing.assert_close(attention_away(q, k, v, k, v, 0.3), 0.7 * stock)  # the text itself


def test_negative_tokens_have_no_order_and_padding_does_nothing():
    q, k, v = heads(0, 1, 2, 4, 8), heads(1, 1, 2, 6, 8), heads(2, 1, 2, 6, 8)
    k_, v_ = heads(3, 1, 2, 5, 8), heads(4, 1, 2, 5, 8)
    mask, order = torch.tensor([True, True, True, False, False]), torch.tensor([4, 2, 0, 3, 1])
    found = attention_away(q, k, v, k_, v_, 0.5, negative_mask=mask[None])
    turned = attention_away(q, k, v, k_[:, :, order], v_[:, :, order], 0.5, negative_mask=mask[None, order])
    torch.testing.assert_close(found, turned)
    torch.testing.assert_close(found, attention_away(q, k, v, k_[:, :, :3], v_[:, :, :3], 0.5))


def layer(**options):
    kind = pytest.importorskip("diffusers.models.attention_processor").Attention
    return seeded(0, lambda: kind(16, cross_attention_dim=12, heads=2, dim_head=8, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": "layer_norm"}, {"cross_attention_norm": "layer_norm"}, {"norm_num_groups": 4},
     {"residual_connection": True, "rescale_output_factor": 2.0}, {"bias": True}],
)  # fmt: skip
@pytest.mark.parametrize("scale", [0.0, torch.zeros(2)])
def test_a_layer_without_away_is_the_stock_layer_bit_by_bit(options, scale):
    attn = layer(**options)
    for x in (heads(1, 2, 16, 3, 3), heads(1, 2, 9, 16)):
        text, negative = heads(2, 2, 7, 12), heads(3, 2, 4, 12)
        for mask in (None, torch.zeros(2, 1, 7).masked_fill(torch.arange(7) > 4, -10000.0)):
            stock = attn(x, encoder_hidden_states=text, attention_mask=mask)
            with away(attn, negative, scale):
                assert attn(x, encoder_hidden_states=text, attention_mask=mask).equal(stock)


def test_the_text_itself_as_negative_scales_what_is_projected():
    attn, x, text = layer(), heads(1, 2, 9, 16), heads(2, 2, 7, 12)
    stock, bias = attn(x, encoder_hidden_states=text), attn.to_out[0].bias
    for scale in (0.25, 1.0):
        with away(attn, text, scale):
            found = attn(x, encoder_hidden_states=text)
        torch.testing.assert_close(found - bias, (1 - scale) * (stock - bias))


def test_gradients_of_the_projections_have_both_branches():
    attn = layer().double()
    x, text, negative = heads(1, 1, 3, 16).double(), heads(2, 1, 4, 12).double(), heads(3, 1, 2, 12).double()

    def value():
        with away(attn, negative, 0.6):
            return attn(x, encoder_hidden_states=text).square().sum()

    for weight in (attn.to_k.weight, attn.to_v.weight):
        (slope,) = torch.autograd.grad(value(), weight)
        way = heads(4, *weight.shape).double()
        with torch.no_grad():
            weight += 1e-6 * way
            high = value()
            weight -= 2e-6 * way
            low = value()
            weight += 1e-6 * way
        assert float((high - low) / 2e-6) == pytest.approx(float((slope * way).sum()), rel=1e-5)
        alone = torch.autograd.grad(attn(x, encoder_hidden_states=text).square().sum(), weight)[0]
        assert not torch.allclose(alone, slope)


def small(kind):
    diffusers = pytest.importorskip("diffusers")
    if kind == "unet":
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
        model = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=12, **blocks, **sizes)
        return model, lambda text, **more: model(heads(0, 2, 4, 8, 8), 500, text, **more).sample
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, cross_attention_dim=16,
        caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    times = torch.tensor([500, 500])
    return model, lambda text, **more: model(heads(0, 2, 4, 8, 8), text, times, **more).sample


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_whole_models_of_diffusers(kind):
    model, call = seeded(0, lambda: small(kind))
    text, negative = heads(1, 2, 5, 12), heads(2, 2, 3, 12)
    processors = [part.processor for part in model.modules() if hasattr(part, "processor")]
    with torch.no_grad():
        stock = call(text)
        with away(model, negative, 0.0):
            assert call(text).equal(stock)
        with away(model, negative, 0.5):
            moved = call(text)
            changed = [p.processor for p in model.modules() if isinstance(getattr(p, "processor", None), AwayProcessor)]
        with away(model, negative[:1].expand(2, -1, -1), 0.5):
            one = call(text)
        with away(model, negative[:1], 0.5):
            torch.testing.assert_close(call(text), one)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        with away(model, negative, 0.5, mask):
            masked = call(text)
        with away(model, negative.masked_fill(~mask[..., None], 9.0), 0.5, mask):
            torch.testing.assert_close(call(text), masked)
    assert not torch.allclose(moved, stock, atol=1e-5)
    crossing = [p for p in model.modules() if getattr(p, "is_cross_attention", False)]
    assert len(changed) == len(crossing) > 0  # self-attention is untouched
    assert [p.processor for p in model.modules() if hasattr(p, "processor")] == processors  # and all is put back


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_what_is_computed_again_for_the_gradient_is_led_away_too(kind):
    model, call = seeded(0, lambda: small(kind))
    model.train()
    text, found = heads(1, 2, 5, 12), []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        functions = [getattr(part, "_gradient_checkpointing_func", None) for part in model.modules()]
        negative = heads(2, 2, 3, 12).requires_grad_()
        with away(model, negative, 0.5):
            x = call(text)
        assert [getattr(part, "_gradient_checkpointing_func", None) for part in model.modules()] == functions
        leaves = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(
            x.square().sum(), [negative, *leaves], allow_unused=True
        )  # outside, as the engine does
        found.append([x, *(slope for slope in slopes if slope is not None)])
    assert found[0][1].any()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_processors_come_back_after_an_error():
    attn = layer()
    before = attn.processor
    with pytest.raises(UsageError, match="needs its negative text"), away(attn, heads(0, 3, 2, 12), 0.5):
        attn(heads(1, 2, 9, 16), encoder_hidden_states=heads(2, 2, 7, 12))
    assert attn.processor is before
    with pytest.raises(UsageError, match="does not attend"), away(nn.Linear(2, 2), heads(0, 1, 2, 12), 0.5):
        pass


# Training with negative prompts.


def test_the_student_draws_away_from_a_negative_prompt_the_teacher_too_and_fake_not():
    m = Roles(teacher=attending(), student=attending(1), fake=attending(2))
    b, method = prompts(), SNOOPI(nasa=True, guidance=(3.0, 3.0))
    draws, scale = Draws(m, b), Draws(m, b).once("nasa")
    with away(m.student.module, m.student.module.net.states(b.negative), scale):
        x = m.student(b.x, condition=b.y)
    torch.testing.assert_close(method.generate(m, b), x)
    assert not torch.allclose(x, m.student(b.x, condition=b.y))

    seen = {"teacher": [], "fake": []}
    for name, calls in seen.items():
        m[name].module.register_forward_pre_hook(
            lambda _, args, kw, calls=calls: calls.append((args[0], kw["condition"])), with_kwargs=True
        )
    list(method.step(m, b))
    assert [len(calls) for calls in seen.values()] == [1, 2]
    assert seen["teacher"][0][1].equal(torch.cat([b.y, b.negative]))
    assert seen["fake"][0][1].equal(torch.cat([b.y, m.fake.null_like(b.y)]))
    gap = score_gap(m, draws, x, b.y, scale=3.0, fake_scale=3.0, times=method.times, negative=b.negative)
    x_t, t = seen["teacher"][0][0][:8], FLOW.at(0.02 + 0.96 * draws.uniform("student time"))
    real = guided(m.teacher, x_t, t, b.y, b.negative, 3.0)
    own = guided(m.fake, x_t, t, b.y, m.fake.null_like(b.y), 3.0)
    alpha, sigma = FLOW.factors(t, x_t)
    torch.testing.assert_close(gap, alpha * sigma * (own - real))


def test_the_scale_of_attention_is_one_for_a_step():
    m = Roles(student=attending(1))
    whole, method = prompts(), SNOOPI(nasa=True)
    parts = torch.cat([method.generate(m, part) for part in whole.split(2)])
    torch.testing.assert_close(method.generate(m, whole), parts)
    m.step = 1
    assert not torch.allclose(method.generate(m, whole), parts)


def test_noise_brings_negative_prompts():
    source = Noise((2,), conditions=prompts(40).y, negatives=torch.tensor([[0, 5], [1, 5]]))
    rows = torch.arange(40)
    first, second = source.batch(rows, 0), source.batch(rows, 1)
    assert first.negative.shape == first.y.shape
    assert 5 < int((first.negative[:, 0] == 0).sum()) < 35
    assert not first.negative.equal(second.negative)
    assert source.batch(rows[7:9], 0).negative.equal(first.negative[7:9])
    assert source.fingerprint() != Noise((2,), conditions=prompts(40).y).fingerprint()


def test_a_whole_run_with_negative_prompts():
    m = Roles(teacher=attending(), student=attending())
    data = Data(train=Noise((2,), conditions=prompts(32).y, negatives=torch.tensor([[0, 5], [1, 5]])))
    optim = {"student": Optim("adam", lr=1e-2), "fake": Optim("adam", lr=1e-2)}
    before = [p.clone() for p in m.student.parameters()]
    execute(SNOOPI(nasa=True), m, data, Engine(steps=3, batch_size=8, device="cpu"), optim=optim)
    assert any(not torch.equal(a, b) for a, b in zip(before, m.student.parameters(), strict=True))
    assert "fake" in m


def test_a_student_far_off_comes_near():
    known = teacher()
    m = Roles(teacher=known, student=network(0, hidden=32), fake=network(0, hidden=32))
    m.student.module.net.last[1].bias.data += 1.5
    optim = {"student": Optim("adam", lr=2e-3), "fake": Optim("adam", lr=1e-2)}
    z, y = torch.randn(1000, 2, generator=rng(9)), torch.arange(1000) % 4
    true = known.sample(1000, rng(8), y)

    def distance():
        with torch.no_grad():
            return energy_distance(m.student(z, condition=y), true)

    first = distance()
    data = Data(train=Noise((2,), 4096, 4))
    engine = Engine(steps=300, batch_size=64, device="cpu")
    execute(SNOOPI(guidance=(0.5, 1.5), ema=0.9), m, data, engine, optim=optim)
    assert distance() < 0.4 * first
    assert "student_average" in m


# What cannot work.


def test_models_and_batches_that_do_not_fit():
    ready = Roles(teacher=network(), student=network(1))
    with pytest.raises(UsageError, match="cannot learn"):
        SNOOPI().check(Roles(teacher=teacher(), student=network()), batch())
    with pytest.raises(UsageError, match="needs conditions"):
        SNOOPI().check(ready, Batch(x=torch.zeros(2, 2), id=torch.arange(2)))
    with pytest.raises(UsageError, match="other samples"):
        SNOOPI().check(
            Roles(teacher=network(), student=Denoiser(lambda x, t, c: x[:, :1], FLOW, "sample", null=4)), batch()
        )
    with pytest.raises(UsageError, match="negative prompt for each"):
        SNOOPI(nasa=True).check(ready, batch())
    with pytest.raises(UsageError, match="what attention sees"):
        SNOOPI(nasa=True).check(ready, batch().replace(negative=batch().y))
    SNOOPI(nasa=True).check(Roles(teacher=attending(), student=attending(1)), prompts())
    floating = Roles(student=Denoiser(nn.Linear(2, 2), FLOW, "sample"))
    assert states(floating.student, torch.ones(2, 3, 4)).equal(torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "fields",
    [{"guidance": (4.0, 0.5)}, {"guidance": (-1.0, 2.0)}, {"nasa_scale": (0.5, 0.1)}, {"times": (0.5, 0.4)},
     {"fake_times": (0.0, 1.0)}, {"dropout": -0.1}, {"ema": 1.0}, {"elements": "x"}],
)  # fmt: skip
def test_fields_out_of_range(fields):
    with pytest.raises(UsageError, match="out of range"):
        SNOOPI(**fields)
