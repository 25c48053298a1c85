"""Trainings inside a training: closed forms, two ways to the same gradient, and where the published one differs."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import UsageError
from limbeck.losses.trajectory import input_gradient_norm, trajectory_matching
from limbeck.nn.mlp import mlp
from limbeck.optim.unroll import call_flat, flatten, unroll


def quadratic(w, i, x):
    return 0.5 * (w - x).square().sum()


def problem(steps=5, momentum=0.0, form="full", keep=()):
    """Gradients of a matching loss of a small network in double precision."""
    torch.manual_seed(0)
    net = mlp(4, 6, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.arange(6) % 3
    size = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    start = flatten([p.detach() for p in net.parameters()])
    target = start + 0.1 * torch.randn_like(start)

    def inner(w, i, x):
        rows = torch.tensor([i % 6, (i + 2) % 6, (i + 3) % 6])
        return F.cross_entropy(call_flat(net, w, x[rows]), y[rows])

    ends = unroll(inner, start, x, size, steps, momentum, form, keep)
    loss = sum(trajectory_matching(end, start, target) * (k + 1) for k, end in enumerate(ends))
    return loss, *torch.autograd.grad(loss, (x, size))


def test_flat_parameters_are_the_networks():
    net = mlp(4, 6, 3)
    x = torch.randn(5, 4)
    torch.testing.assert_close(call_flat(net, flatten(dict(net.named_parameters())), x), net(x))
    with pytest.raises(UsageError, match="not of this network"):
        call_flat(net, torch.zeros(3), x)


@pytest.mark.parametrize("form", ["full", "constant"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_quadratic_has_a_closed_form(form, momentum):
    """With w_0 = 0 the error e = w - x follows (e, m) <- [[1 - a, -a mu], [1, mu]] (e, m)."""
    a, steps = 0.3, 4
    x = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([[1 - a, -a * momentum], [1.0, momentum]], dtype=torch.float64)
    factor = torch.linalg.matrix_power(matrix, steps)[0, 0]
    (end,) = unroll(quadratic, torch.zeros(2, dtype=torch.float64), x, torch.tensor(a).double(), steps, momentum, form)
    torch.testing.assert_close(end, x * (1 - factor))
    torch.testing.assert_close(torch.autograd.grad(end.sum(), x)[0], (1 - factor) * torch.ones(2).double())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("keep", [(), (2, 4)])
def test_constant_memory_is_the_same_gradient(momentum, keep):
    full, constant = (problem(6, momentum, form, keep) for form in ("full", "constant"))
    for a, b in zip(full, constant, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_published_form_is_exact_for_one_step_alone():
    for a, b in zip(problem(1), problem(1, form="tesla"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    _, exact, _ = problem(5)
    _, published, _ = problem(5, form="tesla")
    gap = (exact - published).norm() / exact.norm()
    cosine = F.cosine_similarity(exact.flatten(), published.flatten(), dim=0)
    assert 0.01 < gap < 1
    assert cosine > 0.8


def test_the_published_form_takes_later_weights_as_given():
    """It is the gradient of the loss whose gradients are taken at detached weights."""
    torch.manual_seed(0)
    net = mlp(4, 6, 3).double()
    x, y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.arange(3)
    start = flatten([p.detach() for p in net.parameters()])
    target, size, w = start + 0.1, torch.tensor(0.3, dtype=torch.float64), start

    def inner(w, i, x):
        return F.cross_entropy(call_flat(net, w, x), y)

    for i in range(4):
        at = w.detach().requires_grad_()
        (g,) = torch.autograd.grad(inner(at, i, x), at, create_graph=True)
        w = w - size * g
    (expected,) = torch.autograd.grad(trajectory_matching(w, start, target), x)
    (end,) = unroll(inner, start, x, size, 4, form="tesla")
    (found,) = torch.autograd.grad(trajectory_matching(end, start, target), x)
    torch.testing.assert_close(found, expected)


def test_marks_are_the_weights_on_the_way():
    for form in ("full", "constant"):
        data, size = torch.tensor([1.0]), torch.tensor(0.5)
        ends = unroll(quadratic, torch.zeros(1), data, size, 3, form=form, keep=(1, 2))
        assert [e.item() for e in ends] == [0.5, 0.75, 0.875]


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        (end,) = unroll(quadratic, torch.zeros(1), torch.tensor([1.0]), torch.tensor(0.5), 3)
    assert end.item() == 0.875
    assert end.grad_fn is None


def test_nothing_done_is_a_loss_of_one_and_scales_and_orders_do_not_matter():
    torch.manual_seed(0)
    end, start, target = (torch.randn(7) for _ in range(3))
    assert trajectory_matching(start, start, target) == 1
    assert trajectory_matching(target, start, target) == 0
    loss, order = trajectory_matching(end, start, target), torch.randperm(7)
    torch.testing.assert_close(trajectory_matching(3 * end, 3 * start, 3 * target), loss)
    torch.testing.assert_close(trajectory_matching(end[order], start[order], target[order]), loss)


def test_norms_of_input_gradients():
    g = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(input_gradient_norm(g), g.flatten(1).norm(dim=1))
    torch.testing.assert_close(input_gradient_norm(g, "pixel"), g.norm(dim=1))
    zero = torch.zeros(1, 2, requires_grad=True)
    input_gradient_norm(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"), [({"form": "half"}, "no such way"), ({"form": "tesla", "momentum": 0.9}, "no such way")]
)
def test_what_there_is_not(options, words):
    with pytest.raises(UsageError, match=words):
        unroll(quadratic, torch.zeros(1), torch.zeros(1), torch.tensor(0.1), 2, **options)
    with pytest.raises(UsageError, match="not of one network"):
        trajectory_matching(torch.zeros(2), torch.zeros(3), torch.zeros(3))
