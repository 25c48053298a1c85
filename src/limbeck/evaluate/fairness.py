"""Whether a classifier treats groups alike, and what synthetic rows are worth to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.data.ids import mix, normals, uniforms
from limbeck.evaluate.cost import evaluating
from limbeck.evaluate.samples import density_and_coverage
from limbeck.nn.vae import TableVAE


def demographic_parity_ratio(predicted: Tensor, groups: Tensor) -> float:
    """The lowest share of positive predictions in a group over the highest; 1 is parity, also where nobody is positive.

    Args:
        predicted: 0 or 1 `[N]`.
        groups: Group numbers `[N]`.

    Example:
        >>> demographic_parity_ratio(torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
        0.5
    """
    return _ratio([predicted[groups == g].double().mean() for g in groups.unique()])


def equalized_odds_ratio(predicted: Tensor, true: Tensor, groups: Tensor) -> float:
    """The smaller of the ratios of true and of false positive rates; groups without such rows are left out.

    Args:
        predicted: 0 or 1 `[N]`.
        true: 0 or 1 `[N]`.
        groups: Group numbers `[N]`.

    Example:
        >>> equalized_odds_ratio(torch.tensor([1, 0, 1, 0]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    ratios = []
    for outcome in (1, 0):
        rates = [predicted[(groups == g) & (true == outcome)].double() for g in groups.unique()]
        ratios.append(_ratio([r.mean() for r in rates if len(r)]))
    return min(ratios)


def auroc(scores: Tensor, true: Tensor) -> float:
    """The area under the ROC curve: how often a positive one scores above a negative one; ties count a half.

    Args:
        scores: `[N]`.
        true: 0 or 1 `[N]`.

    Returns:
        0.5 where there is one class only.

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 0, 1, 1]))
        0.875
    """
    positives = int(true.sum())
    pairs = positives * (len(true) - positives)
    if not pairs:
        return 0.5
    _, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]  # ties share the mean of their ranks
    return float((ranks[true == 1].sum() - positives * (positives + 1) / 2) / pairs)


def judge_predictions(scores: Tensor, true: Tensor, groups: Tensor) -> dict[str, float]:
    """Ratios of fairness, and accuracy, F1 and area under the ROC curve beside them, of a classifier that decides at 0.

    One without the other says nothing: whoever gives everybody the same answer is fair.

    Args:
        scores: Logits `[N]`.
        true: 0 or 1 `[N]`.
        groups: Group numbers `[N]`.
    """
    predicted = (scores > 0).long()
    hits = int((predicted * true).sum())
    return {
        "demographic_parity_ratio": demographic_parity_ratio(predicted, groups),
        "equalized_odds_ratio": equalized_odds_ratio(predicted, true, groups),
        "accuracy": float((predicted == true).double().mean()),
        "f1": 2 * hits / max(1, int(predicted.sum() + true.sum())),
        "auroc": auroc(scores, true),
    }


@torch.no_grad()
def synthesise(
    model: TableVAE, x: Tensor, groups: Tensor, seed: int = 0, literal: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows drawn from a model's latent of real ones, with groups drawn on their own, by permutation.

    The target column is drawn from its probabilities averaged over groups, without which the decoder, which is told the group,
    puts back what the latent has lost (inferred; the paper does not say).

    Args:
        model: Encoder and decoder.
        x: Real rows, one-hot `[N, D]`.
        groups: Their groups `[N]`.
        seed: Of all draws.
        literal: Whether the target is drawn like the other columns.

    Returns:
        Category numbers `[N, F]`, and the group of each row `[N]`.
    """
    keys = mix(torch.arange(len(x)) + (seed << 32))
    mean, logvar = model.encode(x, groups)
    z = mean + (0.5 * logvar).exp() * normals(keys, model.latent).to(mean)
    drawn = groups[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(groups.device)]
    parts = [part.softmax(1) for part in model.columns(model.decode(z, drawn))]
    if not literal:
        shares = torch.bincount(groups, minlength=model.groups).double() / len(groups)
        each = [
            model.columns(model.decode(z, torch.full_like(groups, g)))[model.target].softmax(1)
            for g in range(model.groups)
        ]
        parts[model.target] = torch.stack([w * p for w, p in zip(shares.to(mean), each, strict=True)]).sum(0)
    u = uniforms(mix(keys), len(parts)).to(mean)
    codes = [(p.cumsum(1) < u[:, k : k + 1]).sum(1).clamp(max=p.shape[1] - 1) for k, p in enumerate(parts)]
    return torch.stack(codes, 1), drawn


def fit_rows(codes: Tensor, sizes: Sequence[int], target: int, steps: int = 300) -> Callable[[Tensor], Tensor]:
    """A logistic regression that predicts one column of rows from all others.

    Args:
        codes: Rows to train on, category numbers `[N, F]`.
        sizes: Categories of each column.
        target: The column, with two categories.
        steps: Of Adam, on all rows at once.

    Returns:
        A function from rows `[M, F]` to logits of the second category `[M]`.

    Raises:
        UsageError: The column has another number of categories.

    Example:
        >>> codes = torch.tensor([[0, 0], [1, 1]]).repeat(20, 1)
        >>> (fit_rows(codes, (2, 2), 1)(codes[:2]) > 0).tolist()
        [False, True]
    """
    if sizes[target] != 2:
        raise UsageError(
            "the target cannot be judged", where="data", found=f"{sizes[target]} classes", expected="two",
            fix="join classes, or train a classifier of your own on the table",
        )  # fmt: skip
    others = [k for k in range(len(sizes)) if k != target]

    def features(rows: Tensor) -> Tensor:
        return torch.cat([F.one_hot(rows[:, k], sizes[k]) for k in others], 1).float()

    return _logistic(features, codes, codes[:, target], steps)


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

    def features(x: Tensor) -> Tensor:
        return torch.cat([x, x[:, first] * x[:, second]], 1) if squares else x

    found = _logistic(features, z, groups, 300)(test) > 0
    return float(sum((found[test_groups == g] == g).double().mean() for g in (0, 1)) / 2)


class FairTable:
    """Judges models of tables by what a logistic regression makes of their synthetic rows, made from one half of held-out rows,
    on the other half: see `judge_predictions`; `density` and `coverage` tell how near the rows are to real ones.

    Args:
        source: Held-out rows, one-hot, with groups as labels.
        literal: As in `synthesise`.
    """

    task, primary = "fair synthetic tables", "demographic_parity_ratio"

    def __init__(self, source: Source, literal: bool = False) -> None:
        self.source, self.literal = source, literal

    def __call__(self, m: Roles) -> dict[str, float]:
        """The student's numbers."""
        return self.judge(m, "student")

    def judge(self, m: Roles, role: str) -> dict[str, float]:
        """The numbers of any role."""
        model: Any = m[role].module
        device = next(model.parameters()).device
        order = mix(self.source.ids).argsort()  # halves at random, the same for all models
        half = len(order) // 2
        given, kept = (self.source.batch(rows, 0).to(device) for rows in (order[:half], order[half:]))
        with evaluating(model):
            rows, _ = synthesise(model, given.x, given.y, literal=self.literal)
            real = model.codes(kept.x)
        scores = fit_rows(rows, model.sizes, model.target)(real)
        near = density_and_coverage(kept.x[:2000], model.one_hot(rows)[:2000])  # all are compared with all
        return judge_predictions(scores, real[:, model.target], kept.y) | near


def _ratio(rates: list[Tensor]) -> float:
    if not rates or float(max(rates)) == 0:
        return 1.0
    return float(min(rates) / max(rates))


def _logistic(
    features: Callable[[Tensor], Tensor], rows: Tensor, labels: Tensor, steps: int
) -> Callable[[Tensor], Tensor]:
    """Logits of a logistic regression on features of rows."""
    x, y = features(rows), labels.float()
    with torch.enable_grad():
        w = torch.zeros(x.shape[1] + 1, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.05)
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(x @ w[1:] + w[0], y) + 1e-4 * w.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    w = w.detach()
    return lambda other: features(other) @ w[1:] + w[0]
