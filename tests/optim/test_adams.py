"""AdamS against its equations, written out."""

import copy

import pytest
import torch
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.optim.adams import AdamS

RNG = torch.Generator().manual_seed(0)
START = torch.randn(4, 6, generator=RNG)
GRADIENTS = torch.randn(30, 4, 6, generator=RNG)
MASK = torch.rand(4, 6, generator=RNG) < 0.5


def trained(mask=None, decay=0.0, steps=30, gradients=GRADIENTS, start=START, **options):
    w = nn.Parameter(start.clone())
    optimizer = AdamS([w], {} if mask is None else {w: mask}, decay=decay, steps=steps, lr=0.01, **options)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach(), optimizer


def written_out(mask, decay, steps, lr=0.01, b1=0.9, b2=0.999, eps=1e-8):
    w, mu, v = START.double(), torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    for t, g in enumerate(GRADIENTS.double()):
        mu = b1 * mu + (1 - b1) * g
        a = t / steps
        mixed = torch.where(mask, mu, (1 - a) * mu + a * decay * w.sign())
        v = b2 * v + (1 - b2) * mixed**2
        w = w - lr * (mixed / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps)
    return w.float()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_follows_its_equations(decay):
    torch.testing.assert_close(trained(MASK, decay)[0], written_out(MASK, decay, 30), rtol=1e-5, atol=1e-5)


def test_without_decay_and_mask_the_second_moment_is_of_the_momentum():
    torch.testing.assert_close(trained()[0], written_out(torch.ones_like(MASK), 0.0, 30), rtol=1e-5, atol=1e-5)
    one, _ = trained(gradients=GRADIENTS[:1], eps=0.0)
    # v starts at (1 - b2) mu^2, so the first step is lr / (1 - b1) long, over the correction of b1
    torch.testing.assert_close(one, START - 0.01 * GRADIENTS[0].sign() / (1 - 0.9), rtol=1e-5, atol=1e-5)


def test_the_first_step_knows_neither_decay_nor_mask():
    first = GRADIENTS[:1]
    assert trained(MASK, 5.0, gradients=first)[0].equal(trained(gradients=first)[0])


def test_what_is_kept_does_not_feel_the_decay():
    kept = [trained(MASK, decay)[0][MASK] for decay in (0.0, 0.7)]
    assert kept[0].equal(kept[1])


def test_decay_alone_moves_masked_weights_towards_zero_and_no_further_than_it_says():
    still = torch.zeros(1, 4, 6)
    w = nn.Parameter(START.clone())
    optimizer = AdamS([w], {w: MASK}, decay=0.5, steps=1, lr=0.01, eps=1e-12)
    w.grad = torch.zeros(4, 6)
    optimizer.step()  # a = 0
    assert w.equal(START)
    w.grad = still[0]
    optimizer.step()  # a = 1: m = decay sign(w), v = (1 - b2) m^2
    c = (1 / (1 - 0.9**2)) / ((1 - 0.999) / (1 - 0.999**2)) ** 0.5
    torch.testing.assert_close(w[~MASK], (START - 0.01 * c * START.sign())[~MASK])
    assert w[MASK].equal(START[MASK])


def test_groups_and_states_come_back():
    w, other = nn.Parameter(START.clone()), nn.Parameter(START.clone())

    def make():
        groups = [{"params": [w], "lr": 0.02}, {"params": [other], "weight_decay": 0.1}]
        return AdamS(groups, {w: MASK}, decay=0.1, steps=30, lr=0.01)

    def go(optimizer, gradients):
        for g in gradients:
            w.grad, other.grad = g.clone(), g.clone()
            optimizer.step()

    first = make()
    go(first, GRADIENTS[:10])
    state, at = copy.deepcopy(first.state_dict()), (w.detach().clone(), other.detach().clone())
    go(first, GRADIENTS[10:])
    expected = w.detach().clone(), other.detach().clone()
    w.data.copy_(at[0])
    other.data.copy_(at[1])
    second = make()
    second.load_state_dict(state)
    go(second, GRADIENTS[10:])
    assert w.equal(expected[0])
    assert other.equal(expected[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"lr": 0.0}, "lr"), ({"decay": -1.0}, "decay"), ({"masks": torch.ones(2, 2).bool()}, "mask")],
)
def test_what_does_not_fit_is_refused(options, words):
    w = nn.Parameter(START.clone())
    masks = {w: options.pop("masks")} if "masks" in options else {}
    with pytest.raises(UsageError, match=words):
        AdamS([w], masks, **{"decay": 0.1, "steps": 1, **options})
