"""Self-distillation of kernel ridge regression in closed form, in NumPy.

One model, refitted step by step on a mix of the targets and of what the step before fitted:
`y_1 = A y`, `y_t = A (w y + (1 - w) y_{t-1})` with `A = K (K + alpha I)^-1` (Borup and Andersen 2021). Step 1 is the ordinary
fit. In the eigenbasis of K all of it is diagonal, so one decomposition serves all steps, and nothing is inverted.

Names: `alpha > 0` is the penalty, as in scikit-learn; `label_weight` is `w`, the share of the ground truth, which the paper
calls alpha.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from limbeck.core.errors import UsageError

Array = npt.NDArray[np.float64]


def distill_steps(
    kernel: npt.ArrayLike, y: npt.ArrayLike, *, alpha: float, label_weight: float | Sequence[float], steps: int
) -> Array:
    """What each step fits on the training points: `y_t = A (w_t y + (1 - w_t) y_{t-1})`.

    Args:
        kernel: Gram matrix `[n, n]`, symmetric and positive semi-definite.
        y: Targets `[n]` or `[n, k]`.
        alpha: Penalty, above 0.
        label_weight: `w`, in [0, 1] for a mix; a sequence gives one for each step after the first.
        steps: Number of fits, 1 or more; the first is the ordinary one.

    Returns:
        Fitted values `[steps, n]` or `[steps, n, k]`.

    Raises:
        UsageError: Shapes or ranges do not fit.

    Example:
        >>> distill_steps(np.eye(2), [1.0, 2.0], alpha=1.0, label_weight=0.5, steps=3).tolist()
        [[0.5, 1.0], [0.375, 0.75], [0.34375, 0.6875]]
    """
    values, vectors, y = eigenbasis(kernel, y, alpha)
    return _spread(shrinkage(values, alpha, weights_of(label_weight, steps)), vectors, y)


def distill_duals(
    kernel: npt.ArrayLike, y: npt.ArrayLike, *, alpha: float, label_weight: float | Sequence[float], steps: int
) -> Array:
    """The coefficients `c_t` of each step's function `f_t(x) = k(x) c_t`: `(K + alpha I) c_t = w_t y + (1 - w_t) y_{t-1}`.

    Args:
        kernel: Gram matrix `[n, n]`.
        y: Targets `[n]` or `[n, k]`.
        alpha: Penalty, above 0.
        label_weight: `w`, or one for each step after the first.
        steps: Number of fits, 1 or more.

    Returns:
        Coefficients `[steps, n]` or `[steps, n, k]`.

    Example:
        >>> distill_duals(np.eye(2), [1.0, 2.0], alpha=1.0, label_weight=0.0, steps=2)
        array([[0.5 , 1.  ],
               [0.25, 0.5 ]])
    """
    return duals_in(eigenbasis(kernel, y, alpha), alpha, weights_of(label_weight, steps))


def duals_in(basis: tuple[Array, Array, Array], alpha: float, weights: Array) -> Array:
    """As `distill_duals`, from a decomposition that is at hand.

    Args:
        basis: What `eigenbasis` returns.
        alpha: Penalty, above 0.
        weights: `w_t` of each step after the first `[steps - 1]`.

    Example:
        >>> duals_in(eigenbasis(np.eye(2), [1.0, 2.0], 1.0), 1.0, np.array([0.0]))
        array([[0.5 , 1.  ],
               [0.25, 0.5 ]])
    """
    values, vectors, y = basis
    before = shrinkage(values, alpha, weights)[:-1]  # [steps - 1, n]
    mixed = np.concatenate([np.ones((1, len(values))), weights[:, None] + (1 - weights[:, None]) * before])
    return _spread(mixed / (values + alpha), vectors, y)


def shrinkage(values: Array, alpha: float, weights: Array) -> Array:
    """By what each step shrinks the targets along each eigenvector: `b_1 = a`, `b_t = a (w_t + (1 - w_t) b_{t-1})`.

    `a = d / (d + alpha)` for eigenvalues `d`. For `w < 1` the ratio of a larger to a smaller one is larger than in the first
    step, and at `w = 0` it grows with every step: small directions vanish first.

    Args:
        values: Eigenvalues of the kernel `[n]`, 0 or more.
        alpha: Penalty, above 0.
        weights: `w_t` of each step after the first `[steps - 1]`.

    Returns:
        Factors `[steps, n]`.

    Example:
        >>> shrinkage(np.array([1.0, 3.0]), 1.0, np.array([0.0]))
        array([[0.5   , 0.75  ],
               [0.25  , 0.5625]])
    """
    a = values / (values + alpha)
    found = [a]
    for weight in weights:
        found.append(a * (weight + (1 - weight) * found[-1]))
    return np.stack(found)


def distilled(kernel: npt.ArrayLike, y: npt.ArrayLike, *, alpha: float, label_weight: float, step: int) -> Array:
    """What one step fits, without the steps before it.

    `y_t = [w sum_{i=0}^{t-2} (1 - w)^i A^{i+1} + (1 - w)^{t-1} A^t] y`, the sum being geometric in the eigenbasis.

    Args:
        kernel: Gram matrix `[n, n]`.
        y: Targets `[n]` or `[n, k]`.
        alpha: Penalty, above 0.
        label_weight: `w`, the same for all steps.
        step: 1 or more; 1 is the ordinary fit.

    Returns:
        Fitted values `[n]` or `[n, k]`.

    Example:
        >>> distilled(np.eye(2), [1.0, 2.0], alpha=1.0, label_weight=0.5, step=3).tolist()
        [0.34375, 0.6875]
    """
    weights_of(label_weight, step)
    values, vectors, y = eigenbasis(kernel, y, alpha)
    a = values / (values + alpha)
    ratio, terms = (1 - label_weight) * a, step - 1
    close = ratio == 1  # only where rounding makes a 1, and there is no label in the mix
    geometric = np.where(close, terms, (1 - ratio**terms) / np.where(close, 1, 1 - ratio))
    return _spread((label_weight * a * geometric + ratio**terms * a)[None], vectors, y)[0]


def limit(kernel: npt.ArrayLike, y: npt.ArrayLike, *, alpha: float, label_weight: float) -> Array:
    """What infinitely many steps fit: `K (K + alpha / w I)^-1 y`, plain ridge regression with a larger penalty.

    Without labels, `w = 0`, it is 0: the model collapses. Each step comes closer by `(1 - w) max a` or more.

    Args:
        kernel: Gram matrix `[n, n]`.
        y: Targets `[n]` or `[n, k]`.
        alpha: Penalty, above 0.
        label_weight: `w` in [0, 1].

    Returns:
        Fitted values `[n]` or `[n, k]`.

    Example:
        >>> limit(np.eye(2), [1.0, 2.0], alpha=1.0, label_weight=0.5).round(4).tolist()
        [0.3333, 0.6667]
    """
    if not 0 <= label_weight <= 1:
        raise UsageError("label_weight is out of range", where="label_weight", found=label_weight, expected="in [0, 1]")
    values, vectors, y = eigenbasis(kernel, y, alpha)
    return _spread((label_weight * values / (label_weight * values + alpha))[None], vectors, y)[0]


def optimal_label_weight(y: npt.ArrayLike, labels: npt.ArrayLike, previous: npt.ArrayLike, clip: bool = True) -> float:
    """The share of the ground truth whose prediction is closest to targets that were not fitted.

    `w* = <y - g_0, g_1 - g_0> / ||g_1 - g_0||^2` minimises `||y - (w g_1 + (1 - w) g_0)||^2`, as predictions are affine in
    the targets of a fit (Borup and Andersen 2021). Where both predictions are the same it is 1: there is nothing to mix.

    Args:
        y: Targets of held-out points, of any shape. On points that were fitted the answer leans towards 1.
        labels: `g_1`, what the fit to the ground truth alone predicts for them.
        previous: `g_0`, what the fit to the previous model's outputs alone predicts.
        clip: Whether it is kept in [0, 1]. Below 0 it asks for more regularisation than one step gives.

    Returns:
        `w*`.

    Raises:
        UsageError: Shapes differ, or a value is not finite.

    Example:
        >>> optimal_label_weight([1.0, 0.0], [2.0, 0.0], [0.0, 0.0])
        0.5
    """
    y, g_1, g_0 = (np.asarray(part, dtype=np.float64) for part in (y, labels, previous))
    if not y.shape == g_1.shape == g_0.shape:
        found = f"{list(y.shape)}, {list(g_1.shape)}, {list(g_0.shape)}"
        raise UsageError("targets and predictions differ in shape", where="optimal_label_weight", found=found)
    apart = g_1 - g_0
    square = float(np.vdot(apart, apart))
    best = float(np.vdot(y - g_0, apart)) / square if square else 1.0
    if not np.isfinite(best):
        raise UsageError("a target or a prediction is not finite", where="optimal_label_weight", found=best)
    return min(1.0, max(0.0, best)) if clip else best


def weights_of(label_weight: float | Sequence[float], steps: int) -> Array:
    """One label weight for each step after the first `[steps - 1]`.

    Raises:
        UsageError: One is outside [0, 1], there are too many or too few, or no step.

    Example:
        >>> weights_of(0.25, steps=3)
        array([0.25, 0.25])
    """
    if steps < 1:
        raise UsageError("there is no step", where="steps", found=steps, expected="1 or more")
    weights = np.asarray(label_weight, dtype=np.float64)
    weights = np.full(steps - 1, weights) if weights.ndim == 0 else weights
    if weights.shape != (steps - 1,):
        expected = f"a number, or {steps - 1}: one for each step after the first"
        raise UsageError(
            "label weights and steps do not fit", where="label_weight", found=len(weights), expected=expected
        )
    if not ((weights >= 0) & (weights <= 1)).all():
        raise UsageError("label_weight is out of range", where="label_weight", found=label_weight, expected="in [0, 1]")
    return weights


def eigenbasis(kernel: npt.ArrayLike, y: npt.ArrayLike, alpha: float) -> tuple[Array, Array, Array]:
    """Eigenvalues and eigenvectors of a kernel matrix, and the targets, once they are seen to fit.

    Args:
        kernel: Gram matrix `[n, n]`, symmetric and positive semi-definite.
        y: Targets `[n]` or `[n, k]`.
        alpha: Penalty, above 0.

    Returns:
        Values `[n]`, 0 or more, vectors `[n, n]` in columns, and targets in float64.

    Raises:
        UsageError: Shapes or ranges do not fit.

    Example:
        >>> eigenbasis([[2.0]], [3.0], alpha=1.0)[0]
        array([2.])
    """
    kernel, y = np.asarray(kernel, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not alpha > 0:
        raise UsageError("alpha is out of range", where="alpha", found=alpha, expected="a penalty above 0")
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or y.ndim not in (1, 2) or len(y) != len(kernel):
        found = f"kernel {list(kernel.shape)}, y {list(y.shape)}"
        raise UsageError("kernel and targets do not fit", where="kernel", found=found, expected="[n, n] and [n, ...]")
    values, vectors = np.linalg.eigh(kernel)
    return np.maximum(values, 0), vectors, y  # below 0 by rounding only


def _spread(factors: Array, vectors: Array, y: Array) -> Array:
    """`U diag(factors) U^T y` for each row of factors `[s, n]`."""
    inner = vectors.T @ y  # [n] or [n, k]
    spread: Array = vectors @ (factors[..., None] * inner if y.ndim == 2 else (factors * inner)[..., None])
    return spread if y.ndim == 2 else spread[..., 0]
