"""What batch normalisation remembers: read from a network's inputs, and set aside for the statistics of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from limbeck.core.adapt import main_output
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.losses.statistics import moments, statistics_distance


def batch_norms(module: nn.Module, where: str = "teacher") -> list[nn.Module]:
    """The layers that keep running statistics, in module order.

    Raises:
        UsageError: There are none.

    Example:
        >>> [type(part).__name__ for part in batch_norms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))]
        ['BatchNorm1d']
    """
    layers: list[nn.Module] = [
        part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
    if not layers:
        raise UsageError(
            "this network remembers no batch statistics", where=where, found=type(module).__name__,
            expected="layers of batch normalisation with running statistics",
            fix="take a ResNet, MobileNet, DenseNet, ...; for networks without, use a method that matches trajectories",
        )  # fmt: skip
    return layers


@contextmanager
def input_statistics(module: nn.Module, groups: int | None = None) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Mean and biased variance of what reaches each layer of batch normalisation, in the graph, while the block runs.

    Args:
        module: The network.
        groups: Equal parts of the batch that have statistics of their own, see `moments`.

    Yields:
        By the layer's number in module order, of the last call.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())
        >>> with input_statistics(net) as found:
        ...     _ = net(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> found[0]
        (tensor([1., 1.]), tensor([1., 0.]))
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = [(layer, partial(_keep, found, i, groups)) for i, layer in enumerate(batch_norms(module))]
    handles = [layer.register_forward_pre_hook(hook) for layer, hook in hooks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    found: dict[int, tuple[Tensor, Tensor]], i: int, groups: int | None, _module: nn.Module, args: tuple[Any, ...]
) -> None:
    found[i] = moments(args[0], groups)


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisation by the batch at hand while the block runs; nothing else is in training mode, and buffers come back.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Dropout()).eval()
        >>> with batch_statistics(net):
        ...     y = net(torch.tensor([[0.0], [2.0]]))
        >>> y.round().flatten().tolist(), net[0].running_mean.item(), net.training
        ([-1.0, 1.0], 0.0, False)
    """
    layers = batch_norms(module)
    modes = [(part, part.training) for part in module.modules() if isinstance(part, _BatchNorm | _DropoutNd)]
    kept = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    try:
        for part, _ in modes:
            part.training = isinstance(part, _BatchNorm)  # not train(), which frozen roles refuse
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        with torch.no_grad():
            for layer, buffers in zip(layers, kept, strict=True):
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])


@dataclass(frozen=True)
class Recovery:
    r"""What images are recovered by: a network's labels, and the statistics that it remembers.

    $\mathrm{CE}(f(x), y) + r_{bn} \sum_l c_l (\lVert \mu_l - m_l \rVert_2 + r_{var} \lVert s_l - v_l \rVert_2)$ (SRe2L,
    Yin et al. 2023).

    Args:
        bn_weight: `r_bn`.
        variance_weight: `r_var`, 1 in SRe2L.
        first: `c_1`.
        skipped: Numbers of layers, in module order, that do not count.
    """

    bn_weight: float = 0.01
    variance_weight: float = 1.0
    first: float = 10.0
    skipped: tuple[int, ...] = ()

    def parts(
        self,
        role: Role,
        x: Tensor,
        y: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        groups: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and distance of statistics of a batch.

        Args:
            role: A frozen network with batch normalisation.
            x: Images `[B, ...]`; gradients reach them.
            y: Labels `[B]`.
            weights: In the place of the network's own, by name.
            groups: Equal parts of the batch, one after another, each with statistics of its own.

        Returns:
            Two scalars, or two `[groups]`.
        """
        layers = batch_norms(role.module, role.name)
        with input_statistics(role.module, groups) as found:
            logits = called(role, x, weights)
        order = [i for i in sorted(found) if i not in self.skipped]
        remembered = [(layers[i].running_mean, layers[i].running_var) for i in order]
        distance = statistics_distance(
            [found[i] for i in order], remembered, variance_weight=self.variance_weight, first=self.first  # type: ignore[arg-type]
        )  # fmt: skip
        losses = F.cross_entropy(logits, y, reduction="none").view(*() if groups is None else (groups,), -1)
        return losses.mean(-1), distance

    def __call__(
        self,
        role: Role,
        x: Tensor,
        y: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        groups: int | None = None,
    ) -> Tensor:
        """The sum."""
        loss, distance = self.parts(role, x, y, weights, groups)
        return loss + self.bn_weight * distance


def called(role: Role, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits `[B, C]` of a role, with other weights where they are given; the role's own stay as they are."""
    if weights is None:
        return role(x)
    x = x if role.preprocess is None else role.preprocess(x)
    return main_output(functional_call(role.module, dict(weights), (x,)))


def ascended(
    role: Role, x: Tensor, y: Tensor, radius: float, steps: int, start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    r"""Weights from which a network knows a batch less: steps up its loss, each as long as the others.

    $\theta \leftarrow \theta + (\rho / K) g / \lVert g \rVert_2$, K times, $g = \nabla_\theta \mathrm{CE}(f_\theta(x), y)$,
    one norm over all parameters (DWA, Du et al. 2024).

    Args:
        role: The network; frozen, and it stays as it is.
        x: Images `[B, ...]`.
        y: Labels `[B]`.
        radius: `rho`, 0 or more: no parameter vector lies further from `start`.
        steps: `K`.
        start: The weights to go from, by name.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> there = ascended(Role("teacher", net), torch.ones(1, 2), torch.tensor([0]), 0.1, 1, dict(net.named_parameters()))
        >>> round(sum((there[n] - p).square().sum() for n, p in net.named_parameters()).sqrt().item(), 4)
        0.1
    """
    weights = {name: w.detach().clone() for name, w in start.items()}
    for _ in range(steps if radius else 0):
        with torch.enable_grad():
            learned = {name: w.requires_grad_(True) for name, w in weights.items()}
            loss = F.cross_entropy(called(role, x, learned), y)
            gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
        found = {
            n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), gradients, strict=True)
        }
        norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
        factor = radius / steps / (norm + 1e-12)
        weights = {n: w.detach() + factor * found[n] for n, w in weights.items()}
    return weights
