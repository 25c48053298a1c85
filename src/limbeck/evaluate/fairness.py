"""Whether a classifier treats groups alike, and what synthetic samples are worth to one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from limbeck.core.errors import UsageError, require
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.data.ids import mix, normals, uniforms
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.samples import density_and_coverage
from limbeck.nn.vae import ImageVAE, TableVAE

_AT_ONCE = 1024  # samples that are encoded or decoded together
_COMPARED = 2000  # samples of which all pairs are compared
_JUDGED = 10_000  # held-out samples that are looked at


def demographic_parity_ratio(predicted: Tensor, groups: Tensor) -> float:
    """The lowest share of positive predictions in a group over the highest, by fairlearn; 1 also where nobody is positive.

    Args:
        predicted: 0 or 1 `[N]`.
        groups: Group numbers `[N]`.

    Example:
        >>> demographic_parity_ratio(torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
        0.5
    """
    return _ratio("selection_rate_ratio", predicted, predicted, groups)


def equalized_odds_ratio(predicted: Tensor, true: Tensor, groups: Tensor) -> float:
    """The smaller of the ratios of true and of false positive rates, by fairlearn, for which the rate of no samples is 0.

    Args:
        predicted: 0 or 1 `[N]`.
        true: 0 or 1 `[N]`.
        groups: Group numbers `[N]`.

    Returns:
        A ratio within [0, 1]; two rates of 0 are equal.

    Example:
        >>> equalized_odds_ratio(torch.tensor([1, 0, 1, 0]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    return min(_ratio(f"{rate}_positive_rate_ratio", predicted, true, groups) for rate in ("true", "false"))


def judge_predictions(scores: Tensor, true: Tensor, groups: Tensor) -> dict[str, float]:
    """Ratios of fairness, and accuracy, F1 and area under the ROC curve beside them, of a classifier that decides at 0.

    One without the other says nothing: whoever gives everybody the same answer is fair.

    Args:
        scores: Logits `[N]`.
        true: 0 or 1 `[N]`.
        groups: Group numbers `[N]`.

    Returns:
        By name; the area is 0.5 where all samples are of one class.
    """
    metrics = require("sklearn.metrics", extra="fair")
    scores, true, predicted = scores.detach().cpu(), true.cpu(), (scores > 0).long().cpu()
    both = len(true.unique()) > 1
    return {
        "demographic_parity_ratio": demographic_parity_ratio(predicted, groups),
        "equalized_odds_ratio": equalized_odds_ratio(predicted, true, groups),
        "accuracy": float(metrics.accuracy_score(true, predicted)),
        "f1": float(metrics.f1_score(true, predicted, zero_division=0.0)),
        "auroc": float(metrics.roc_auc_score(true, scores)) if both else 0.5,
    }


@torch.no_grad()
def synthesise(
    model: TableVAE | ImageVAE, source: Source, rows: Tensor | None = None, seed: int = 0, literal: bool = False
) -> tuple[Any, Tensor]:
    """Samples drawn from a model's latent of real ones, with groups drawn on their own, by permutation.

    The target is drawn from its probabilities averaged over groups, without which the decoder, which is told the group, puts
    back what the latent has lost (inferred; the paper does not say).

    Args:
        model: Encoder and decoder.
        source: Real samples, as the model reads them, with groups as labels.
        rows: Positions of those to begin with `[N]`. Default: all.
        seed: Of all draws.
        literal: Whether the target is drawn like everything else.

    Returns:
        N samples of the same form as the real ones, and the group of each `[N]`, on the CPU.
    """
    rows = torch.arange(len(source)) if rows is None else rows
    device = next(model.parameters()).device
    batches = (source.batch(part, 0).to(device) for part in rows.split(_AT_ONCE))
    mean, logvar, groups = map(torch.cat, zip(*((*model.encode(b.x, b.y), b.y) for b in batches), strict=True))
    keys = mix(torch.arange(len(rows)) + (seed << 32))
    z = mean + (0.5 * logvar).exp() * normals(keys, model.latent).to(mean)
    drawn = groups[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(device)]
    shares = None if literal else torch.bincount(groups.long(), minlength=model.groups).to(mean) / len(rows)
    parts = zip(z.split(_AT_ONCE), drawn.split(_AT_ONCE), uniforms(mix(keys), model.draws).split(_AT_ONCE), strict=True)
    made = [tree_map(Tensor.cpu, _decoded(model, latent, group, u.to(mean), shares)) for latent, group, u in parts]
    return tree_map(lambda *t: torch.cat(t), *made), drawn.cpu()


def logistic_regression(x: Tensor, labels: Tensor, steps: int = 300) -> Callable[[Tensor], Tensor]:
    """Trained by Adam, on all samples at once.

    Args:
        x: Features `[N, D]`.
        labels: 0 or 1 `[N]`.
        steps: Updates.

    Returns:
        A function from features `[M, D]` to logits `[M]`.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> (logistic_regression(x, torch.tensor([0, 1]))(x) > 0).tolist()
        [False, True]
    """
    y = labels.float()
    with torch.enable_grad():
        w = torch.zeros(x.shape[1] + 1, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.05)
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(x @ w[1:] + w[0], y) + 1e-4 * w.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    w = w.detach()
    return lambda other: other @ w[1:] + w[0]


def group_probe(z: Tensor, groups: Tensor, test: Tensor, test_groups: Tensor, squares: bool = False) -> float:
    """How well two groups are told apart in a latent: the balanced accuracy of a logistic regression, 0.5 for not at all.

    Args:
        z: Latents to train on `[N, Z]`.
        groups: 0 or 1 `[N]`.
        test: Latents to judge on `[M, Z]`.
        test_groups: 0 or 1 `[M]`.
        squares: Whether squares and products are features, too.

    Example:
        >>> z = torch.tensor([[-1.0], [0.0], [1.0]]).repeat(20, 1)
        >>> [group_probe(z, (z[:, 0] == 0).long(), z, (z[:, 0] == 0).long(), squares=s) > 0.9 for s in (False, True)]
        [False, True]
    """
    first, second = torch.triu_indices(z.shape[1], z.shape[1])
    if squares:
        z, test = (torch.cat([x, x[:, first] * x[:, second]], 1) for x in (z, test))
    found = logistic_regression(z, groups)(test) > 0
    return float(sum((found[test_groups == g] == g).double().mean() for g in (0, 1)) / 2)


class Fairness:
    """Judges models of tables or images by what a logistic regression makes of their synthetic samples, drawn from one half of
    held-out ones, on the other half: see `judge_predictions`; `density` and `coverage` tell how near they are to real ones.

    Args:
        source: Held-out samples, with groups as labels.
        literal: As in `synthesise`.

    Raises:
        UsageError: They are of one group, or fairlearn is not installed.
    """

    task, primary = "fair synthetic samples", "demographic_parity_ratio"

    def __init__(self, source: Source, literal: bool = False) -> None:
        self.source, self.literal = source, literal
        require("fairlearn.metrics", extra="fair")
        labels = getattr(source, "labels", None)
        if labels is not None and len(found := labels.unique()) < 2:
            raise UsageError(
                "held-out samples of one group tell nothing of fairness", where="data", found=found.tolist(),
                expected="two groups or more", fix="another division of the samples",
            )  # fmt: skip

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        model: Any = m[role].module
        order = mix(self.source.ids).argsort()[:_JUDGED]  # halves at random, the same for all models
        half = len(order) // 2
        kept = self.source.batch(order[half:], 0)
        with evaluating(model):
            made, _ = synthesise(model, self.source, order[:half], literal=self.literal)
        (x, y), (real, true) = model.divided(made), model.divided(kept.x)
        near = density_and_coverage(real[:_COMPARED], x[:_COMPARED])
        return judge_predictions(logistic_regression(x, y)(real), true, kept.y) | near


def _ratio(name: str, predicted: Tensor, true: Tensor, groups: Tensor) -> float:
    arrays = {"y_true": true, "y_pred": predicted, "sensitive_features": groups}
    metric = getattr(require("fairlearn.metrics", extra="fair"), name)
    found = float(metric(**{k: t.cpu().numpy() for k, t in arrays.items()}))
    return 1.0 if math.isnan(found) else found  # 0 / 0


def _decoded(model: Any, z: Tensor, groups: Tensor, u: Tensor, shares: Tensor | None) -> Any:
    decoded = model.decode(z, groups)
    target = model.target_logits(decoded).softmax(1)
    if shares is not None:
        each = [model.target_logits(model.decode(z, torch.full_like(groups, g))) for g in range(model.groups)]
        target = torch.stack([w * logits.softmax(1) for w, logits in zip(shares, each, strict=True)]).sum(0)
    return model.draw(decoded, target, u)
