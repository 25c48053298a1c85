"""A training inside a training: steps of gradient descent whose end is differentiated by the data they were made on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.errors import UsageError
from limbeck.nn.group_norm import QuickGroupNorm

Form = Literal["full", "constant", "tesla"]
FORMS = ("full", "constant", "tesla")
Variant = Literal["paper", "code"]
Inner = Callable[[Tensor, int, Tensor], Tensor]  # of flat parameters, the step and the data: a loss


def flatten(parameters: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
    """Parameters as one vector `[P]`."""
    tensors = parameters.values() if isinstance(parameters, Mapping) else parameters
    return torch.cat([p.reshape(-1) for p in tensors])


def call_flat(network: nn.Module, flat: Tensor, x: Any) -> Tensor:
    """A network's output under flat parameters `[P]`, in the order of `network.parameters()`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> call_flat(net, torch.tensor([1.0, 2.0, 3.0]), torch.ones(1, 2))
        tensor([[6.]])
    """
    shapes = {name: p.shape for name, p in network.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    if sum(sizes) != len(flat):
        raise UsageError(
            "these parameters are not of this network", where="trajectory", found=len(flat), expected=sum(sizes)
        )
    parts = zip(shapes.items(), flat.split(sizes), strict=True)
    named = {name: part.view(shape) for (name, shape), part in parts}
    return functional_call(network, named, (x,))


def unroll(
    inner: Inner,
    start: Tensor,
    data: Tensor,
    step_size: Tensor,
    steps: int,
    momentum: float = 0.0,
    form: Form = "full",
    keep: Sequence[int] = (),
    variant: Variant = "paper",
) -> list[Tensor]:
    """Where `steps` steps of gradient descent lead, differentiable by `data` and `step_size`.

    `m <- momentum m + grad inner(w, i, data)`, `w <- w - step_size m`, i from 0.

    Args:
        inner: The loss of step i; differentiable twice.
        start: Flat parameters `[P]`.
        data: Whatever the loss is computed from, one tensor.
        step_size: Scalar.
        steps: Their number.
        momentum: Of heavy ball, in [0, 1).
        form: `full` keeps the graph of all steps. `constant` keeps the parameters alone and goes back step by step: the same
            gradient, with the memory of one step's graph. `tesla` leaves out, as the formula of TESLA does, what later
            parameters owe to earlier data (Cui et al. 2023): the same for one step, else another gradient.
        keep: Further steps after which the parameters are wanted.
        variant: Of `tesla`: `paper` is the derivative that the formula says; `code` gives the data half of it, as the published
            program doubles a tuple in the place of what is in it, and the step size the whole.

    Returns:
        Parameters after each of `keep` and, last, after all steps.

    Raises:
        UsageError: There is no such form, or momentum in `tesla`.

    Example:
        >>> data = torch.tensor([2.0], requires_grad=True)
        >>> quadratic = lambda w, i, x: 0.5 * (w - x).square().sum()
        >>> (end,) = unroll(quadratic, torch.zeros(1), data, torch.tensor(0.5), 2)
        >>> end.item(), torch.autograd.grad(end.sum(), data)[0].item()
        (1.5, 0.75)
    """
    if form not in FORMS or (form == "tesla" and momentum):
        raise UsageError(
            "there is no such way to differentiate a training", where="form", found=f"{form}, momentum {momentum}",
            expected="full, constant, or tesla without momentum",
        )  # fmt: skip
    marks = [*keep, steps]
    if form != "full":
        share = 0.5 if form == "tesla" and variant == "code" else 1.0
        ends = _Unrolled.apply(inner, start, data, step_size, steps, momentum, form == "tesla", tuple(marks), share)
        return list(ends)
    w, m, found = start.detach().requires_grad_(), torch.zeros_like(start), {}
    graph = torch.is_grad_enabled()
    for i in range(steps):
        g = _slope(inner, w, i, data, graph)
        m = momentum * m + g if momentum else g
        w = w - step_size * m
        if not graph:
            w = w.detach().requires_grad_()
        if i + 1 in marks:
            found[i + 1] = w
    return [found[k] if k else start for k in marks]


def _slope(inner: Inner, w: Tensor, i: int, data: Tensor, graph: bool) -> Tensor:
    """The gradient of a step's loss by the parameters, with a graph or without one."""
    with torch.enable_grad(), QuickGroupNorm() if graph else nullcontext():
        return torch.autograd.grad(inner(w, i, data), w, create_graph=graph)[0]


class _Unrolled(torch.autograd.Function):
    """Forward without a graph; backward by the adjoint of each step, which makes that step's graph again."""

    @staticmethod
    def forward(
        ctx: Any, inner: Inner, start: Tensor, data: Tensor, step_size: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        steps, momentum, _, marks, _ = rest
        w, m = start.detach(), torch.zeros_like(start)
        path, speeds, found = [], [], {}
        for i in range(steps):
            path.append(w)
            g = _slope(inner, w.detach().requires_grad_(), i, data.detach(), graph=False)
            m = momentum * m + g if momentum else g
            if momentum:
                speeds.append(m)
            w = w - step_size.detach() * m
            if i + 1 in marks:
                found[i + 1] = w
        ctx.inner, ctx.path, ctx.speeds, ctx.rest = inner, path, speeds, rest
        ctx.save_for_backward(data, step_size)
        return tuple(found[k] for k in marks)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        steps, momentum, tesla, marks, share = ctx.rest
        data, step_size = ctx.saved_tensors
        arriving = dict(zip(marks, gradients, strict=True))
        pull_w, pull_m = torch.zeros_like(ctx.path[0]), torch.zeros_like(ctx.path[0])
        to_data, to_size = torch.zeros_like(data), torch.zeros_like(step_size)
        for i in reversed(range(steps)):
            if arriving.get(i + 1) is not None:
                pull_w = pull_w + arriving[i + 1]
            pull_m = momentum * pull_m - step_size * pull_w
            w, x = ctx.path[i].detach().requires_grad_(), data.detach().requires_grad_()
            g = _slope(ctx.inner, w, i, x, graph=True)
            wanted = (x, w) if i and not tesla else (x,)  # nobody asks for the gradient of the start
            back = torch.autograd.grad(g, wanted, pull_m, allow_unused=True)
            to_size = to_size - (pull_w * (ctx.speeds[i] if momentum else g.detach())).sum()
            to_data = to_data + (0 if back[0] is None else back[0])
            if len(back) > 1 and back[1] is not None:
                pull_w = pull_w + back[1]
        return None, None, share * to_data, to_size, *(None,) * len(ctx.rest)
