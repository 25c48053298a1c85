"""Group normalisation for trainings that are differentiated: its second derivative in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode


class QuickGroupNorm(TorchFunctionMode):
    """Within, `F.group_norm` gives what it always gives, and takes less time and memory to differentiate twice.

    torch writes the derivative as a dozen operations where it has to be differentiated again, and keeps what each of them needs;
    here it is torch's one kernel, and the second derivative is written out (`_Derivative.backward`).

    Example:
        >>> norm, x = torch.nn.GroupNorm(2, 4), torch.randn(3, 4, 5)
        >>> with QuickGroupNorm():
        ...     quick = norm(x)
        >>> torch.equal(quick, norm(x))
        True
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.group_norm`, by the function below where it is the usual case: scale and shift, one precision, no `torch.func`."""
    usual = (
        weight is not None and bias is not None and input.dtype == weight.dtype == bias.dtype
        and input.shape[1] % num_groups == 0 and input.numel() > 0 and not torch.is_autocast_enabled(input.device.type)
        and not torch._C._are_functorch_transforms_active()
    )  # fmt: skip
    if not usual:
        return F.group_norm(input, num_groups, weight, bias, eps)
    out: Tensor = _GroupNorm.apply(input, weight, bias, num_groups, eps)
    return out


class _GroupNorm(Function):
    """`weight (x - mean) rstd + bias`, mean and deviation over a group's channels and positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        (n, c, *rest), x = x.shape, x.contiguous()
        out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, n, c, prod(rest), groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return *_Derivative.apply(gradient, *ctx.saved_tensors, ctx.groups, ctx.eps), None, None


class _Derivative(Function):
    """The derivative by input, scale and shift."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, c, *rest), x, y = x.shape, x.contiguous(), y.contiguous()
        ctx.save_for_backward(y, x, weight, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return torch.ops.aten.native_group_norm_backward(
            y, x, mean, rstd, weight, n, c, prod(rest), groups, [True, True, True]
        )

    @staticmethod
    def backward(ctx: Any, a: Tensor, a_weight: Tensor, a_bias: Tensor) -> tuple[Any, ...]:
        """The derivative of `<a, to_x> + <a_weight, to_weight> + <a_bias, to_bias>` by y, x and scale.

        With z = (x - mean) rstd, and E the mean over a group, `to_x = rstd (w y - E[w y] - z E[w y z])`, `to_weight` and
        `to_bias` are the sums of y z and of y. So the derivatives are sums of a, y and x, each times a number of its sample and
        channel that follows from their sums and products, and of a constant.
        """
        y, x, weight, mean, rstd = ctx.saved_tensors
        n, c = x.shape[:2]
        g: int = ctx.groups
        a, y, x = a.reshape(n * c, -1), y.view(n * c, -1), x.view(n * c, -1)
        size = x.shape[1] * c // g

        def channels(v: Tensor) -> Tensor:
            return v.view(n, g, c // g)

        def average(v: Tensor) -> Tensor:
            return v.sum(2, keepdim=True) / size

        def dot(u: Tensor, v: Tensor) -> Tensor:
            return channels(torch.bmm(u.unsqueeze(1), v.unsqueeze(2)))

        def each(v: Tensor) -> Tensor:
            return v.expand(n, g, c // g).reshape(n * c, 1)

        w, to_w, to_b = (v.view(1, g, c // g) for v in (weight, a_weight, a_bias))
        if torch.is_grad_enabled():  # a third derivative is wanted, to which these are functions of x
            rows = x.view(n, g, -1)
            mean, rstd = rows.mean(2), (rows.var(2, correction=0) + ctx.eps).rsqrt()
        mean, rstd = mean.view(n, g, 1), rstd.view(n, g, 1)
        sum_a, sum_y, ay = channels(a.sum(1)), channels(y.sum(1)), dot(a, y)
        az, yz = rstd * (dot(a, x) - mean * sum_a), rstd * (dot(y, x) - mean * sum_y)
        e_a, e_az, e_y, e_yz = average(sum_a), average(az), average(w * sum_y), average(w * yz)
        by_y = rstd * (to_w - rstd * w * e_az)  # the number of x in the derivative by y, and of y in that by x
        by_a = -rstd.square() * e_yz
        through_z = average(by_y * yz) + by_a * e_az
        through_rstd = rstd.square() * (average(w * ay) - e_y * e_a - e_yz * e_az)
        by_x = -rstd * (through_z + through_rstd)
        constant = -(average(by_y * sum_y) + by_a * e_a) - mean * by_x
        for_y = torch.addcmul(each(to_b - rstd * w * e_a - mean * by_y), x, each(by_y)).addcmul_(a, each(rstd * w))
        for_x = torch.addcmul(each(constant), x, each(by_x)).addcmul_(y, each(by_y)).addcmul_(a, each(by_a))
        for_w = (rstd * (ay - sum_y * e_a - yz * e_az)).sum(0).view(c)
        y, x = ctx.saved_tensors[:2]
        return for_y.view(y.shape), for_x.view(x.shape), for_w, None, None, None, None
