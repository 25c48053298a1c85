"""Whether a classifier treats groups alike, and what synthetic rows are worth to one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.data.ids import mix, normals, uniforms
from limbeck.evaluate.cost import evaluating
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


def _ratio(rates: list[Tensor]) -> float:
    if not rates or float(max(rates)) == 0:
        return 1.0
    return float(min(rates) / max(rates))


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
    drawn = groups[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
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


def downstream(codes: Tensor, test: Tensor, sizes: tuple[int, ...], target: int, steps: int = 300) -> Tensor:
    """What a logistic regression trained on rows predicts of the target of other rows, from all other columns.

    Args:
        codes: Rows to train on `[N, F]`.
        test: Rows to predict `[M, F]`.
        sizes: Categories of each column.
        target: The column, with two categories.
        steps: Of Adam, on all rows at once.

    Returns:
        0 or 1 `[M]`.
    """
    others = [k for k in range(len(sizes)) if k != target]

    def features(rows: Tensor) -> Tensor:
        return torch.cat([F.one_hot(rows[:, k], sizes[k]) for k in others], 1).float()

    x, y = features(codes), codes[:, target].float()
    with torch.enable_grad():
        w = torch.zeros(x.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.05)
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(x @ w[1:] + w[0], y) + 1e-4 * w.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    w = w.detach()
    return (features(test) @ w[1:] + w[0] > 0).long()


class FairTable:
    """Judges models of tables by what a logistic regression makes of their synthetic rows: `accuracy` on real held-out rows, and
    the ratios of demographic parity and equalised odds between groups; labels of the source are groups.

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
        batch = self.source.batch(torch.arange(len(self.source)), 0)
        with evaluating(model):
            rows, _ = synthesise(model, batch.x, batch.y, literal=self.literal)
            real = model.codes(batch.x)
        return ratios(downstream(rows, real, model.sizes, model.target), real[:, model.target], batch.y)


def ratios(predicted: Tensor, true: Tensor, groups: Tensor) -> dict[str, float]:
    """Accuracy and both ratios of fairness of predictions `[N]`."""
    return {
        "demographic_parity_ratio": demographic_parity_ratio(predicted, groups),
        "accuracy": float((predicted == true).double().mean()),
        "equalized_odds_ratio": equalized_odds_ratio(predicted, true, groups),
    }
