"""Group normalisation in a training that is differentiated: the same numbers and derivatives, alone and stacked."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from limbeck.nn.convnet import ConvNet
from limbeck.nn.group_norm import QuickGroupNorm, _GroupNorm
from limbeck.optim.unroll import call_flat, flatten, unroll


def quick(x, weight, bias, groups):
    with QuickGroupNorm():
        return F.group_norm(x, groups, weight, bias)


def tensors(channels=4, count=()):
    g = torch.Generator().manual_seed(0)
    shapes = [(3, channels, 2, 3), (channels,), (channels,)]
    return [torch.randn(*count, *s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_both_derivatives_are_those_of_differences(groups):
    def f(*given):
        return quick(*given, groups)

    assert torch.autograd.gradcheck(f, tensors())
    assert torch.autograd.gradgradcheck(f, tensors())


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, 0), (0, None, None), (0, 0, None)])
def test_stacked_it_is_one_after_another(groups, dims):
    stacked = [v if d == 0 else v[0].detach().requires_grad_() for v, d in zip(tensors(count=(5,)), dims, strict=True)]
    each = [[v[k] if d == 0 else v for v, d in zip(stacked, dims, strict=True)] for k in range(5)]
    found = vmap(lambda *given: quick(*given, groups), in_dims=dims)(*stacked)
    expected = torch.stack([F.group_norm(x, groups, w, b) for x, w, b in each])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, torchs = (torch.autograd.grad(v.sin().sum(), stacked) for v in (found, expected))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_training_is_differentiated_as_torch_does_it():
    """One that calls the network by torch alone gives the same gradient."""
    torch.manual_seed(0)
    net = ConvNet(3, 1, 8, 4, 2).double()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64, requires_grad=True), torch.arange(6) % 3
    size, start = torch.tensor(0.1, dtype=torch.float64), flatten([p.detach() for p in net.parameters()])
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def plain(w, i, x):
        parts = zip(shapes.items(), w.split([s.numel() for s in shapes.values()]), strict=True)
        named = {name: part.view(shape) for (name, shape), part in parts}
        return F.cross_entropy(torch.func.functional_call(net, named, (x,)), y)

    def ours(w, i, x):
        return F.cross_entropy(call_flat(net, w, x), y)

    ends = [unroll(inner, start, x, size, 4)[0] for inner in (plain, ours)]
    a, b = (torch.autograd.grad(end.square().sum(), x)[0] for end in ends)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_other_calls_are_torchs(monkeypatch):
    """Without scale and shift, and in another precision than theirs."""
    monkeypatch.setattr(_GroupNorm, "apply", None)
    x = torch.randn(2, 4, 3)
    with QuickGroupNorm():
        assert nn.GroupNorm(2, 4, affine=False)(x).equal(F.group_norm(x, 2))
        with torch.autocast("cpu"):
            assert nn.GroupNorm(2, 4)(x).dtype == F.group_norm(x, 2).dtype
        with pytest.raises(RuntimeError, match="divisible"):
            F.group_norm(x, 3, torch.ones(4), torch.zeros(4))
        with pytest.raises(TypeError):  # the usual case is not torch's
            nn.GroupNorm(2, 4)(x)
