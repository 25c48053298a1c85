"""Schedules, predictions, guidance, draws and steps: the identities that hold exactly."""

from itertools import pairwise, permutations

import pytest
import torch

from limbeck import Batch, Roles
from limbeck.core.errors import UsageError
from limbeck.diffusion import (
    EDM,
    Cosine,
    Denoiser,
    Draws,
    EDMDenoiser,
    RectifiedFlow,
    Table,
    few_step,
    flow,
    guided,
    ring,
)
from limbeck.diffusion.schedule import PREDICTIONS

G = torch.Generator().manual_seed(0)
X, EPS = (torch.randn(6, 3, 2, generator=G, dtype=torch.float64) for _ in range(2))
SCHEDULES = {"cosine": Cosine(), "table": Table.scaled_linear(), "flow": RectifiedFlow(), "edm": EDM()}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def times(schedule):
    return torch.linspace(0.05, 0.95, 6, dtype=torch.float64) * min(schedule.last, 10.0)


@every
def test_every_prediction_becomes_every_other_and_comes_back(schedule):
    t = times(schedule)
    x_t = schedule.add_noise(X, EPS, t)
    alpha, sigma = schedule.factors(t, X)
    true = {"sample": X, "epsilon": EPS, "v_prediction": alpha * EPS - sigma * X, "flow_prediction": EPS - X}
    for of, to in permutations(PREDICTIONS, 2):
        torch.testing.assert_close(schedule.convert(true[of], x_t, t, of, to), true[to], rtol=1e-9, atol=1e-9)
    wrong = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # of no sample
    for of, to in permutations(PREDICTIONS, 2):
        back = schedule.convert(schedule.convert(wrong, x_t, t, of, to), x_t, t, to, of)
        torch.testing.assert_close(back, wrong, rtol=1e-8, atol=1e-8)


@every
def test_a_transition_of_two_is_one(schedule):
    r, s, t = (f * min(schedule.last, 10.0) * torch.ones(1, dtype=torch.float64) for f in (0.2, 0.5, 0.8))
    (ts, sig_ts), (sr, sig_sr), (tr, sig_tr) = (schedule.transition(a, b) for a, b in ((s, t), (r, s), (r, t)))
    torch.testing.assert_close(ts * sr, tr)
    torch.testing.assert_close(sig_tr**2, ts**2 * sig_sr**2 + sig_ts**2)


@every
def test_a_step_with_the_truth_leads_to_the_truth(schedule):
    t = times(schedule)
    torch.testing.assert_close(
        schedule.step(X, schedule.add_noise(X, EPS, t), t, t / 2),
        schedule.add_noise(X, EPS, t / 2),
        rtol=1e-9,
        atol=1e-9,
    )


def test_variance_is_preserved_and_ends_are_ends():
    for schedule in (Cosine(), Table.scaled_linear()):
        t = torch.linspace(0, 1, 7, dtype=torch.float64)
        torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    table = torch.tensor(Table.scaled_linear().alphas_cumprod, dtype=torch.float64)
    rows = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(Table.scaled_linear().alpha(rows) ** 2, table)
    assert Table.scaled_linear().alpha(torch.ones(1)).item() ** 2 == pytest.approx(0.0047, abs=1e-4)
    sigmas = EDM().grid(18)
    assert (len(sigmas), sigmas[0].item(), sigmas[-1].item()) == (19, pytest.approx(80.0), 0.0)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert all(a > b for a, b in pairwise(sigmas))


def test_a_table_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = torch.tensor(Table.scaled_linear().alphas_cumprod)
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-6)


def test_a_denoiser_gives_the_sample_whatever_its_network_predicts():
    schedule, t = Cosine(), times(Cosine()).float()
    x_t = schedule.add_noise(X.float(), EPS.float(), t)
    for prediction in PREDICTIONS:
        value = schedule.convert(X.float(), x_t, t, "sample", prediction)
        seen = []
        net = lambda x, time, value=value, seen=seen: seen.append(time) or value  # noqa: E731
        found = Denoiser(net, schedule, prediction, time_scale=999)(x_t, t)
        torch.testing.assert_close(found, X.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen[0], 999 * t)
    with pytest.raises(UsageError, match="no such prediction"):
        Denoiser(None, schedule, "noise")


def test_preconditioning_is_that_of_edm():
    t = torch.tensor([0.3, 2.0])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    net = lambda x, time: x * time[:, None]  # noqa: E731
    found = EDMDenoiser(net)(x, t)
    s = t[:, None]
    skip, out, c_in = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
    torch.testing.assert_close(found, skip * x + out * (c_in * x * (s.log() / 4)))


def test_models_of_diffusers_are_networks():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
        **blocks,
    )
    teacher = Denoiser(net, Table.scaled_linear(), "epsilon", time_scale=999, null=3, keyword="class_labels")
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    raw = net(x, 999 * t, class_labels=c).sample
    torch.testing.assert_close(teacher(x, t, c), teacher.schedule.convert(raw, x, t, "epsilon", "sample"))
    assert teacher.null_like(c).tolist() == [3, 3]
    assert guided(teacher, x, t, c, teacher.null_like(c), 2.0).shape == x.shape


def test_guidance_is_affine_and_its_ends_are_plain_calls():
    teacher = ring(6, classes=3)
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.4)
    c = torch.tensor([0, 1, 2, 0, 1])
    null = teacher.null_like(c)
    assert guided(teacher, x, t, c, null, 1.0).equal(teacher(x, t, c))
    assert guided(teacher, x, t, c, null, 0.0).equal(teacher(x, t, null))
    torch.testing.assert_close(teacher(x, t, null), teacher(x, t))
    a, b = (guided(teacher, x, t, c, null, k) for k in (2.0, 4.0))
    torch.testing.assert_close((a + b) / 2, guided(teacher, x, t, c, null, 3.0))
    each = guided(teacher, x, t, c, null, torch.tensor([2.0, 4.0, 2.0, 4.0, 2.0]))
    torch.testing.assert_close(each, torch.stack([a[0], b[1], a[2], b[3], a[4]]))
    below = guided(teacher, x, t, c, null, 0.5)  # not skipped
    torch.testing.assert_close(below, (teacher(x, t, c) + teacher(x, t)) / 2)


def test_draws_belong_to_samples():
    m = Roles()
    batch = Batch(x=torch.zeros(4000, 3), id=torch.arange(4000))
    draws = Draws(m, batch)
    u, n = draws.uniform("t"), draws.normal("noise", batch.x)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.02)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert n.mean(0).abs().max() < 0.06
    torch.testing.assert_close(n.T.cov(), torch.eye(3), atol=0.08, rtol=0)
    torch.testing.assert_close(n.pow(4).mean().item(), 3.0, atol=0.25, rtol=0)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    moved = Draws(m, Batch(x=batch.x, id=batch.id[order]))
    assert moved.normal("noise", batch.x).equal(n[order])
    assert not draws.uniform("other").equal(u)
    assert draws.uniform("t").equal(u)
    m.step = 1
    assert not Draws(m, batch).uniform("t").equal(u)
    m.step, m.seed = 0, 1
    assert not Draws(m, batch).uniform("t").equal(u)
    odd = Draws(m, batch).normal("noise", torch.zeros(4000, 2, 1))
    assert odd.shape == (4000, 2, 1)


def test_one_step_is_one_call_and_the_gradient_is_that_of_the_last_step():
    teacher, z = ring(5), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([0.9, 0.6, 0.3])
    sigma = teacher.schedule.sigma(grid[:1])
    one = few_step(teacher, z, teacher.schedule, grid[:1])
    assert one.equal(teacher(sigma * z, grid[:1].expand(3)))
    for noise in ("fresh", "fixed", "ddim"):
        assert few_step(teacher, z, teacher.schedule, grid, noise=noise, upto=1).equal(one)
    inputs = []

    def generator(x, t, condition=None):
        inputs.append((x, t))
        return teacher(x, t) * weight

    weight = torch.ones((), requires_grad=True)
    out = few_step(generator, z, teacher.schedule, grid, fresh=lambda i: torch.full_like(z, float(i)))
    assert [x.requires_grad for x, _ in inputs] == [False] * 3
    assert out.requires_grad
    (found,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(found, teacher(*inputs[-1]).sum())
    inputs.clear()
    few_step(generator, z, teacher.schedule, grid, noise="ddim")
    (x0, t0), (x1, t1) = inputs[:2]
    first = teacher(x0, t0)
    noise = teacher.schedule.convert(first, x0, t0, "sample", "epsilon")
    torch.testing.assert_close(x1, teacher.schedule.add_noise(first, noise, t1))
    torch.testing.assert_close(x1, teacher.schedule.step(first, x0, t0, t1))
    with pytest.raises(UsageError, match="no such steps"):
        few_step(teacher, z, teacher.schedule, grid, upto=4)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), EDM(largest=20.0)], ids=["cosine", "flow", "edm"])
def test_the_flow_of_one_gaussian_ends_in_it(schedule):
    from limbeck.diffusion import GaussianMixture

    one = GaussianMixture(torch.tensor([[1.0, -2.0]]), 0.5, schedule)
    x = flow(one, torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), schedule, 100)
    torch.testing.assert_close(x.mean(0), one.means[0], atol=0.06, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((2,), 0.5), atol=0.05, rtol=0)


def test_samplers_begin_with_the_noise_itself_where_a_table_ends_with_a_little_of_the_sample():
    z, one = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    for schedule in (Table.scaled_linear(), Table.linear(), Cosine(), RectifiedFlow(3.0)):
        torch.testing.assert_close(schedule.begin(z, one), z, rtol=0, atol=1e-6)
        torch.testing.assert_close(schedule.from_noise(z, None)[0], z, rtol=0, atol=1e-6)
    table, early = Table.scaled_linear(), torch.full((3,), 0.625)
    torch.testing.assert_close(table.begin(z, early), table.sigma(early)[:, None] * z)
    assert EDM().from_noise(z, None)[0].equal(80 * z)
    seen = []

    def noted(x, t, condition=None):
        seen.append(x)
        return x

    few_step(noted, z, table, torch.ones(1))
    flow(noted, z, table, 1)
    torch.testing.assert_close(torch.stack(seen), torch.stack([z, z]), rtol=0, atol=1e-6)


def test_a_published_scheduler_is_compared_with_the_denoiser():
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    one = Denoiser(torch.nn.Identity(), Table.scaled_linear(), "epsilon")
    one.check_scheduler(diffusers.PNDMScheduler(**betas))
    with pytest.raises(UsageError, match="predicts something else"):
        one.check_scheduler(diffusers.DDIMScheduler(**betas, prediction_type="v_prediction"))
    with pytest.raises(UsageError, match="another table of noise"):
        one.check_scheduler(diffusers.DDIMScheduler())
    flow = Denoiser(torch.nn.Identity(), RectifiedFlow(), "flow_prediction")
    flow.check_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(UsageError, match="predicts something else"):
        flow.check_scheduler(diffusers.DDIMScheduler(**betas))
