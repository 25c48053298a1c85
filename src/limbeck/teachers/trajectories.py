"""Expert trajectories: the weights of many networks after every epoch of their training, trained together and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import vmap

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.files import aside, write_text
from limbeck.core.source import Source
from limbeck.data.augment import augment
from limbeck.data.ids import digest, mix
from limbeck.data.sources import Rows
from limbeck.evaluate.condensation import fresh
from limbeck.losses.trajectory import input_gradient_norm
from limbeck.optim.unroll import call_flat, flatten
from limbeck.teachers.fingerprint import structure

_NOTES, _BEGUN = "experts.json", "begun.json"


@dataclass(frozen=True)
class ExpertTraining:
    """How experts are trained: stochastic gradient descent on real data, each with its own weights, order and augmentation.

    Args:
        count: Experts.
        epochs: Passes over the data; the weights are kept at the start and after each.
        lr: Learning rate.
        momentum: Heavy ball.
        weight_decay: L2.
        batch_size: Samples of a step.
        operations: Augmentations, see `limbeck.data.augment`.
        radius: `rho`: gradients are taken where the loss is highest within it (flat trajectories, FTD); 0 for none.
        gsam_alpha: `a`: the descent is along `g_p - a g_perp`, g_perp the part of the plain gradient at right angles to the
            perturbed one (GSAM, Zhuang et al. 2022); 0 is SAM.
        adaptive: Whether the perturbation is in proportion to the squared weights, as in the code of FTD.
        ramp: Whether the loss is scaled by 0.5, 0.55, ..., 0.95 in the first ten epochs (the clipping loss of AST's code).
        penalty: `lambda` of `(||d sum(logits) / dx|| - 1)^2` at samples without augmentation (AST); 0 for none.
        norm: `pixel`, over channels, as in AST's code, or `sample`.
        drop: From the epoch after the middle on, `epochs // 2 + 1` counted from 0, the rate is multiplied by this, and the
            momentum starts anew.
        drop_after: So many epochs later; 1 in the code of AST, which drops it after that epoch and not before.
        seed: Of all.
    """

    count: int = 20
    epochs: int = 20
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256
    operations: tuple[str, ...] = ()
    radius: float = 0.0
    gsam_alpha: float = 0.0
    adaptive: bool = True
    ramp: bool = False
    penalty: float = 0.0
    norm: Literal["sample", "pixel"] = "pixel"
    drop: float = 1.0
    drop_after: int = 0
    seed: int = 0


class Trajectories:
    """Experts on disk, read where they are asked for; files are memory-mapped.

    Args:
        folder: What `train_experts` wrote; None stands for experts that there are not, as in a plan: all weights are those
            of the network.
        network: A network of the experts' kind.
        training: How they were trained.

    Raises:
        UsageError: The folder holds other experts, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, network: nn.Module, training: ExpertTraining) -> None:
        self.folder, self.network, self.training = folder, network, training
        self.kept: dict[int, Tensor] = {}
        if folder is None:
            return
        check_buffer(folder, network, training)

    def __call__(self, expert: int, epoch: int) -> Tensor:
        """The weights of an expert after an epoch, flat `[P]` fp32."""
        device = next(self.network.parameters()).device
        if self.folder is None:
            return flatten([p.detach() for p in self.network.parameters()])
        if epoch not in self.kept:
            self.kept[epoch] = _epoch(Path(self.folder) / f"epoch-{epoch:04d}.safetensors")
        weights = self.kept[epoch]
        if not 0 <= expert < len(weights):
            raise UsageError(
                "there is no such expert", where=self.folder, found=expert, expected=f"0 to {len(weights) - 1}"
            )
        return weights[expert].to(device)


def check_buffer(folder: str | os.PathLike[str], network: nn.Module, training: ExpertTraining) -> None:
    """Experts on disk are whole, of this architecture, and trained in this way; their seed may differ, and they may be more.

    Args:
        folder: What `train_experts` wrote.
        network: The architecture.
        training: How they are to have been trained.

    Raises:
        UsageError: They are not.
    """
    try:
        notes = json.loads((Path(folder) / _NOTES).read_text(encoding="utf-8"))
        before = ExpertTraining(**{**notes["training"], "operations": tuple(notes["training"]["operations"])})
        structures, shapes = notes.get("structure"), notes["shapes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("there are no whole expert trajectories", where=folder, found=error) from None
    if shapes != _shapes(network) or structures not in (None, structure(network)):
        raise UsageError(
            "these experts are of another architecture", where=folder,
            found=shapes if shapes != _shapes(network) else f"the same shapes, another structure: {structures}",
            expected=_shapes(network) if shapes != _shapes(network) else structure(network),
            fix="give the network that they were trained with, or another folder",
        )  # fmt: skip
    had, wanted = ({k: v for k, v in asdict(t).items() if k not in ("seed", "count")} for t in (before, training))
    if other := [name for name in wanted if had[name] != wanted[name]]:
        raise UsageError(
            "these experts were trained in another way", where=folder, found={n: had[n] for n in other},
            expected={n: wanted[n] for n in other}, fix="set the method's fields to theirs, or give another folder",
        )  # fmt: skip
    if before.count < training.count:
        raise UsageError(
            "there are too few experts", where=folder, found=before.count, expected=f"{training.count} or more",
            fix=f"method.experts={before.count}, or another folder",
        )  # fmt: skip


def check_buffer_data(folder: str | os.PathLike[str], source: Source) -> None:
    """Experts on disk, where there are some, were trained on these samples.

    Raises:
        UsageError: They were trained on others.
    """
    if not is_buffer(folder):
        return
    found, expected = json.loads((Path(folder) / _NOTES).read_text(encoding="utf-8")).get("data"), source.fingerprint()
    if found != expected:
        raise UsageError("these experts were trained on other data", where=folder, found=found, expected=expected)


def is_buffer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds experts that are trained to the end."""
    return (Path(folder) / _NOTES).is_file()


def _epoch(path: Path) -> Tensor:
    """The weights of all experts after an epoch `[K, P]`, mapped, not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("weights")
    except (OSError, SafetensorError) as error:
        raise UsageError("an expert's weights cannot be read", where=path, found=error) from None


class Segments(Rows):
    """Pieces of trajectories as data: sample (k, s) is expert k from epoch s on. A batch has `expert` and `start` `[B]`.

    Args:
        experts: Their number.
        starts: Epochs to start from: 0 to `starts - 1`.
    """

    views = 1

    def __init__(self, experts: int, starts: int) -> None:
        self.ids = torch.arange(experts * starts)
        self.starts = starts

    def batch(self, rows: Tensor, view: int) -> Batch:
        """The segments at positions `rows` `[B]`."""
        ids = self.ids[rows]
        return Batch(x=ids, id=ids, view=torch.full_like(ids, view), expert=ids // self.starts, start=ids % self.starts)

    def fingerprint(self) -> str:
        """Of their number."""
        return digest("segments", len(self.ids), self.starts)


def train_experts(
    network: nn.Module, source: Source, folder: str | os.PathLike[str], training: ExpertTraining
) -> dict[str, Any]:
    """Train experts side by side, by `vmap` over their stacked weights, and write the weights after each epoch.

    Killed half-way and called again with the same folder, it goes on after the last whole epoch, to the same bits. Experts that
    are there and fit are taken as they are, see `check_buffer`.

    Args:
        network: The architecture; without batch normalisation's running statistics.
        source: Labelled real samples.
        folder: Where `epoch-0000.safetensors`, ... are written, each `weights` `[K, P]`.
        training: How.

    Returns:
        Plain data: number of experts, of epochs, of parameters, and the last epoch's mean loss, or that they were there.

    Raises:
        UsageError: The network keeps running statistics, the data have no labels, or the folder has experts that were
            trained in another way or on other data.
    """
    check_network(network)
    folder, parameters = Path(folder), sum(p.numel() for p in network.parameters())
    if is_buffer(folder):
        check_buffer(folder, network, training)
        check_buffer_data(folder, source)
        return {"experts": training.count, "epochs": training.epochs, "parameters": parameters, "reused": True}
    notes = {"shapes": _shapes(network), "structure": structure(network), "training": asdict(training)}
    notes["data"] = source.fingerprint()
    _begin(folder, notes)
    done = sorted(folder.glob("epoch-*.safetensors"))
    last = load_file(done[-1]) if done else {"weights": _first(network, training)}
    weights, speeds = last["weights"], last.get("momentum")
    step = _step(network, training)
    loss = torch.zeros(training.count)
    with torch.enable_grad():
        if not done:
            _write(folder, 0, weights, None)
        for epoch in range(max(0, len(done) - 1), training.epochs):
            late = training.epochs // 2 + 1 + training.drop_after
            if epoch == late and training.drop != 1:
                speeds = None
            rate = training.lr * (training.drop if epoch >= late else 1.0)
            loss = torch.zeros(training.count)
            for x, seen, y in _batches(source, training, epoch):
                g, losses = step(weights, x, seen, y, epoch)
                speeds = training.momentum * speeds + g if training.momentum and speeds is not None else g
                weights = weights - rate * speeds
                loss += losses
            _write(folder, epoch + 1, weights, speeds if training.momentum else None)
    write_text(folder / _NOTES, json.dumps(notes, indent=1) + "\n")
    return {"experts": training.count, "epochs": training.epochs, "parameters": parameters, "loss": float(loss.mean())}


def _begin(folder: Path, notes: Mapping[str, Any]) -> None:
    """Write what is about to be trained; experts of another kind are not gone on with."""
    notes, path = json.loads(json.dumps(notes)), folder / _BEGUN
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else notes
    if before != notes:
        other = [name for name in notes if before.get(name) != notes[name]]
        raise UsageError(
            "this folder has other experts", where=folder, found={n: before.get(n) for n in other},
            expected={n: notes[n] for n in other}, fix="give another folder, or delete this one",
        )  # fmt: skip
    write_text(path, json.dumps(notes, indent=1) + "\n")


def check_network(network: nn.Module) -> None:
    """Trajectories are of weights alone.

    Raises:
        UsageError: The network keeps running statistics, or drops units.
    """
    for name, part in network.named_modules():
        running = getattr(part, "running_mean", None) is not None
        if running or (isinstance(part, nn.Dropout) and part.p > 0):
            raise UsageError(
                "trajectories are of weights alone, and this network has more", where=f"teacher.{name}",
                found=type(part).__name__, expected="no running statistics and no dropout",
                fix="limbeck.nn.convnet.ConvNet with norm='instance' is the usual network",
            )  # fmt: skip


def _step(network: nn.Module, training: ExpertTraining) -> Callable[..., tuple[Tensor, Tensor]]:
    """Gradients of all experts for their batches `[K, P]`, and losses `[K]`."""
    each = vmap(partial(call_flat, network))

    def gradient(weights: Tensor, x: Tensor, seen: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        weights = weights.detach().requires_grad_()
        logits = each(weights, seen).flatten(0, 1)
        losses = scale * F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape).mean(1)
        if training.penalty:
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(each(weights, x).sum(), x, create_graph=True)
            norms = input_gradient_norm(slope.flatten(0, 1), training.norm)
            losses = losses + training.penalty * (norms - 1).square().view(len(y), -1).mean(1)
        return torch.autograd.grad(losses.sum(), weights)[0], losses.detach()

    def step(weights: Tensor, x: Tensor, seen: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        scale = min(1.0, 0.5 + 0.05 * epoch) if training.ramp else 1.0
        g, losses = gradient(weights, x, seen, y, scale)
        if training.radius:
            g = _sharpness_aware(lambda w: gradient(w, x, seen, y, scale)[0], weights, g, training)
        return g + training.weight_decay * weights if training.weight_decay else g, losses

    return step


def _sharpness_aware(again: Callable[[Tensor], Tensor], weights: Tensor, g: Tensor, training: ExpertTraining) -> Tensor:
    """GSAM's direction `[K, P]`: the gradient where the loss is high, less what the plain one has at right angles to it."""
    size = training.radius / ((weights * g if training.adaptive else g).norm(dim=-1, keepdim=True) + 1e-12)
    perturbed = again(weights + size * (weights.square() * g if training.adaptive else g))
    if not training.gsam_alpha:
        return perturbed
    along = (g * perturbed).sum(-1, keepdim=True) / (perturbed.square().sum(-1, keepdim=True) + 1e-24)
    return perturbed - training.gsam_alpha * (g - along * perturbed)


def _batches(source: Source, training: ExpertTraining, epoch: int) -> Any:
    """Batches `[K, B, ...]` of an epoch, each expert in its own order: samples, their views, labels."""
    size = min(training.batch_size, len(source))
    orders = [np.random.default_rng([training.seed, k, epoch]).permutation(len(source)) for k in range(training.count)]
    order = torch.from_numpy(np.stack(orders))
    for rows in order.split(size, dim=1):
        batch = source.batch(rows.reshape(-1), epoch)
        if batch.get("y") is None:
            raise UsageError("experts need labels", where="data.train", expected="a class for each sample")
        x: Tensor = batch.x
        seen = x
        if training.operations:
            expert = torch.arange(training.count).repeat_interleave(rows.shape[1])
            keys = mix(mix(batch.id + (training.seed << 32)) + (expert << 16) + epoch)
            seen = augment(x, keys, training.operations)
        shape = (training.count, rows.shape[1], *x.shape[1:])
        yield x.view(shape), seen.reshape(shape), batch.y.view(shape[:2])


def _first(network: nn.Module, training: ExpertTraining) -> Tensor:
    """New weights for each expert `[K, P]`."""
    nets = [fresh(network, training.seed * 1_000_003 + k) for k in range(training.count)]
    return torch.stack([flatten([p.detach() for p in net.parameters()]) for net in nets])


def _write(folder: Path, epoch: int, weights: Tensor, speeds: Tensor | None) -> None:
    """An epoch's weights `[K, P]`; the momentum is kept with the last epoch alone."""
    tensors = {"weights": weights} if speeds is None else {"weights": weights, "momentum": speeds}
    with aside(folder / f"epoch-{epoch:04d}.safetensors") as scratch:
        save_file(tensors, scratch)
    earlier = folder / f"epoch-{epoch - 1:04d}.safetensors"
    if speeds is not None and earlier.is_file() and "momentum" in (old := load_file(earlier)):
        with aside(earlier) as scratch:
            save_file({"weights": old["weights"]}, scratch)


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in network.named_parameters()}


def smoothed(training: ExpertTraining, penalty: float = 2.0) -> ExpertTraining:
    """AST's way: strong experts (momentum 0.9, decay 1e-3) with the ramp, the penalty and the drop of the rate.

    Example:
        >>> smoothed(ExpertTraining()).momentum
        0.9
    """
    return replace(training, momentum=0.9, weight_decay=1e-3, ramp=True, penalty=penalty, drop=0.6)
