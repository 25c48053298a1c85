"""Schedules, mixtures and samplers that cannot be, told when they are made."""

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.diffusion import EDM, Cosine, Denoiser, GaussianMixture, RectifiedFlow, Sampler, Table, flow, guided, ring


def epsilon(schedule):
    return Denoiser(lambda x, t: torch.zeros_like(x), schedule, "epsilon")


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()])
def test_a_network_of_the_noise_does_not_begin_where_there_is_noise_alone(schedule):
    net, z = epsilon(schedule), torch.randn(3, 2)
    for begin in (lambda: net(z), lambda: flow(net, z, schedule, 4), lambda: Sampler(net, times=(1.0, 0.5))):
        with pytest.raises(UsageError, match="knows nothing of the sample"):
            begin()
    assert Sampler(net, times=(0.99, 0.5))(z).isfinite().all()


def test_where_a_little_of_the_sample_is_left_it_begins():
    z = torch.randn(3, 2)
    for schedule in (Table.scaled_linear(), EDM()):
        assert epsilon(schedule)(z).isfinite().all()
        assert flow(epsilon(schedule), z, schedule, 4).isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RectifiedFlow(shift=-1.0), "shift"),
        (lambda: EDM(smallest=1.0, largest=0.5), "noise levels"),
        (lambda: GaussianMixture(torch.zeros(2, 1), -1.0), "no mixture"),
        (lambda: GaussianMixture(torch.zeros(2, 1), 1.0, weights=[-1.0, 2.0]), "no mixture"),
        (lambda: ring(0), "no mixture"),
        (lambda: flow(ring(4), torch.zeros(1, 2), Cosine(), 0), "a step or more"),
        (lambda: Sampler(ring(4), times=(1.5, 0.5)), "beyond the schedule"),
        (lambda: ring(4, classes=2).sample(2, condition=torch.tensor([0, 9])), "no component has such a class"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_guidance_has_one_scale_or_one_for_each_sample():
    teacher, c = ring(4, classes=2), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="one scale for each sample"):
        guided(teacher, torch.zeros(2, 2), torch.full((2,), 0.5), c, teacher.null_like(c), torch.ones(3))


def test_the_score_of_a_mixture_is_known_at_time_0():
    x, teacher = torch.randn(5, 2), ring(4, std=0.5)
    x.requires_grad_()
    for t in (torch.zeros(5), torch.full((5,), 0.3)):
        (gradient,) = torch.autograd.grad(teacher.log_prob(x, t).sum(), x)
        torch.testing.assert_close(teacher.score(x, t), gradient)
