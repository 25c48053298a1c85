"""Group normalisation in a training that is differentiated: the same numbers and derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.nn.convnet import ConvNet
from limbeck.nn.group_norm import QuickGroupNorm, _GroupNorm
from limbeck.optim.unroll import call_flat, flatten, unroll


def quick(x, weight, bias, groups):
    with QuickGroupNorm():
        return F.group_norm(x, groups, weight, bias)


def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 2, 3), (4,), (4,))]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_derivatives_are_those_of_differences(groups):
    def f(*given):
        return quick(*given, groups)

    def slope(*given):
        return torch.autograd.grad(f(*given).pow(2).sin().sum(), given, create_graph=True)

    assert torch.autograd.gradcheck(f, tensors())
    assert torch.autograd.gradgradcheck(f, tensors())
    assert torch.autograd.gradgradcheck(slope, tensors())  # of third order


def test_a_training_is_differentiated_as_torch_does_it():
    """One that calls the network by torch alone gives the same gradient."""
    torch.manual_seed(0)
    net = ConvNet(3, 1, 8, 4, 2).double()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64, requires_grad=True), torch.arange(6) % 3
    size, start = torch.tensor(0.1, dtype=torch.float64), flatten([p.detach() for p in net.parameters()])
    w = start.clone().requires_grad_()

    def inner(w, i, x):
        return F.cross_entropy(call_flat(net, w, x), y)

    for i in range(4):
        (g,) = torch.autograd.grad(inner(w, i, x), w, create_graph=True)
        w = w - size * g
    (expected,) = torch.autograd.grad(w.square().sum(), x)
    for form in ("full", "constant"):
        (end,) = unroll(inner, start, x, size, 4, form=form)
        (found,) = torch.autograd.grad(end.square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_other_calls_are_torchs(monkeypatch):
    """Without scale and shift, in another precision than theirs, and under `vmap`."""
    monkeypatch.setattr(_GroupNorm, "apply", None)
    x = torch.randn(2, 4, 3)
    with QuickGroupNorm():
        assert nn.GroupNorm(2, 4, affine=False)(x).equal(F.group_norm(x, 2))
        with torch.autocast("cpu"):
            assert nn.GroupNorm(2, 4)(x).dtype == F.group_norm(x, 2).dtype
        scales, shifts = torch.randn(3, 4), torch.randn(3, 4)
        found = torch.func.vmap(lambda weight, bias: F.group_norm(x, 2, weight, bias))(scales, shifts)
        each = [F.group_norm(x, 2) * w.view(4, 1) + b.view(4, 1) for w, b in zip(scales, shifts, strict=True)]
        torch.testing.assert_close(found, torch.stack(each))
        with pytest.raises(RuntimeError, match="divisible"):
            F.group_norm(x, 3, torch.ones(4), torch.zeros(4))
        with pytest.raises(TypeError):  # the usual case is not torch's
            nn.GroupNorm(2, 4)(x)
