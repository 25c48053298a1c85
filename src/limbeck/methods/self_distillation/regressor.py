"""Self-distilled kernel ridge regression as an estimator of scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from limbeck.core.errors import UsageError, require
from limbeck.methods.self_distillation.kernel import Array, duals_in, eigenbasis, optimal_label_weight, weights_of

require("sklearn", extra="vision")

from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin  # noqa: E402
from sklearn.metrics.pairwise import pairwise_kernels  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402


class SelfDistillationRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Kernel ridge regression, refitted on a mix of the targets and its own last fit.

    With `steps=1` it is `sklearn.kernel_ridge.KernelRidge`. See `limbeck.methods.self_distillation.kernel` for the formulas.

    Args:
        alpha: Penalty, above 0.
        steps: Number of fits, 1 or more; the first is the ordinary one.
        label_weight: Share of the ground truth in [0, 1]; a sequence gives one for each step after the first; "auto" computes
            each from held-out data, which `fit` is given.
        kernel: A kernel of `sklearn.metrics.pairwise`, a function, or "precomputed".
        gamma: Of the kernel.
        degree: Of the kernel.
        coef0: Of the kernel.
        kernel_params: Further arguments of a kernel that is a function.

    Attributes:
        dual_coef_: Coefficients of the last step `[n]` or `[n, k]`.
        dual_coefs_: Those of all steps.
        label_weights_: The share of the ground truth in each step after the first `[steps - 1]`.

    Example:
        >>> X, y = np.linspace(0, 1, 9)[:, None], np.arange(9) % 2
        >>> model = SelfDistillationRegressor(alpha=0.5, steps=3, label_weight="auto", kernel="rbf", gamma=9.0)
        >>> model.fit(X[::2], y[::2], X_val=X[1::2], y_val=y[1::2]).predict(X).shape
        (9,)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        steps: int = 2,
        label_weight: float | Sequence[float] | Literal["auto"] = 0.5,
        kernel: Any = "rbf",
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1,
        kernel_params: dict[str, Any] | None = None,
    ) -> None:
        self.alpha, self.steps, self.label_weight = alpha, steps, label_weight
        self.kernel, self.gamma, self.degree, self.coef0 = kernel, gamma, degree, coef0
        self.kernel_params = kernel_params

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> SelfDistillationRegressor:
        """Fit all steps, with one decomposition of the kernel matrix.

        Args:
            X: Points `[n, d]`.
            y: Targets `[n]` or `[n, k]`.
            X_val: Held-out points `[m, d]`, for `label_weight="auto"`.
            y_val: Their targets.

        Raises:
            UsageError: "auto" without held-out data, or a parameter out of range.
        """
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        basis = eigenbasis(self._kernel(X), y, self.alpha)
        self.X_fit_ = X
        if isinstance(self.label_weight, str):
            self.label_weights_ = self._estimate(basis, X_val, y_val)
        else:
            self.label_weights_ = weights_of(self.label_weight, self.steps)
        self.dual_coefs_ = duals_in(basis, self.alpha, self.label_weights_)
        self.dual_coef_ = self.dual_coefs_[-1]
        return self

    def predict(self, X: Any) -> Array:
        """What the last step says of points `[m, d]`: `[m]` or `[m, k]`."""
        check_is_fitted(self)
        found: Array = self._kernel(self._checked(X), self.X_fit_) @ self.dual_coef_
        return found

    def staged_predict(self, X: Any) -> Iterator[Array]:
        """What each step says of points `[m, d]`, beginning with the ordinary fit."""
        check_is_fitted(self)
        kernel = self._kernel(self._checked(X), self.X_fit_)
        for duals in self.dual_coefs_:
            yield kernel @ duals

    def _estimate(self, basis: tuple[Array, Array, Array], X_val: Any, y_val: Any) -> Array:
        """Step by step the label weight that held-out targets ask for, kept in [0, 1]."""
        if self.label_weight != "auto":
            raise UsageError("unknown label_weight", where="label_weight", found=self.label_weight, expected="auto")
        if X_val is None or y_val is None:
            raise UsageError(
                "label weights are estimated on data that are not fitted",
                where="fit",
                found="X and y alone",
                expected="X_val and y_val",
                fix="give held-out data, or a number as label_weight",
            )
        held = self._kernel(self._checked(X_val), self.X_fit_)  # [m, n]
        weights = list[float]()
        for _ in range(self.steps - 1):
            duals = duals_in(basis, self.alpha, np.array([*weights, 0.0]))
            weights.append(optimal_label_weight(y_val, held @ duals[0], held @ duals[-1]))
        return weights_of(weights, self.steps)

    def _checked(self, X: Any) -> Any:
        return validate_data(self, X, reset=False, dtype=np.float64)

    def _kernel(self, X: Any, Y: Any = None) -> Array:
        if callable(self.kernel):
            params = self.kernel_params or {}
        else:
            params = {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}
        found: Array = pairwise_kernels(X, Y, metric=self.kernel, filter_params=True, **params)
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags
