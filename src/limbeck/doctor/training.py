"""Checks of the first steps: what reaches the parameters, and what becomes of the loss."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.core.method import Method
from limbeck.core.optim import Optim
from limbeck.doctor.exam import Exam, norm
from limbeck.doctor.finding import Finding

_DEAD = 1e-4  # of the strongest term, or of the whole gradient
_EXPLODED = 10.0
_STEPS = 3


def first_loss(exam: Exam) -> Finding | None:
    """The first loss is finite."""
    for done in exam.first.done:
        if not bool(done.loss.isfinite()):
            return Finding(
                "first_loss",
                "error",
                f"the first loss of '{done.role}' is not finite",
                where=f"roles.{done.role}",
                found=str(float(done.loss)),
                fix="look for a logarithm or a division by 0 in the loss, and at the inputs and outputs of the models",
            )
    return None


def dead_terms(exam: Exam) -> Finding | None:
    """Every term of the loss has a share in the gradient."""
    for done in exam.first.done:
        strongest = max(done.terms.values(), default=0.0)
        for name, size in done.terms.items():
            if size < _DEAD * strongest:
                return _dead(f"the term '{name}'", f"roles.{done.role}", size, strongest)
    method = exam.job.method
    whole = [gradient for done in exam.first.done for gradient in done.gradients.values()]
    for name in _weights(method):
        try:
            without = dataclasses.replace(method, **{name: 0.0})  # type: ignore[type-var]
            change = _distance(whole, _gradients(exam, without))
        except (UsageError, ValueError):
            continue  # this weight may not be 0
        if change < _DEAD * norm(whole):
            return _dead(f"the term weighted by '{name}'", f"method.{name}", change, norm(whole))
    return None


def gradient_leaks(exam: Exam) -> Finding | None:
    """Gradients reach the named role alone, and no frozen role shares a parameter with one that learns."""
    owners: dict[int, str] = {}
    for name, role in exam.models.items():
        for path, p in role.module.named_parameters():
            other = owners.setdefault(id(p), name)
            if other != name and (other in exam.stage.roles or name in exam.stage.roles):
                return Finding(
                    "gradient_leaks",
                    "error",
                    f"'{name}' and '{other}' share a parameter",
                    where=f"roles.{name}.{path}",
                    expected="parameters of their own",
                    fix="build the student from copy.deepcopy of the teacher's parts",
                )
    for done in exam.first.done:
        for name in done.leaks:
            frozen = name not in exam.stage.roles
            return Finding(
                "gradient_leaks",
                "error" if frozen else "warning",
                f"the update of '{done.role}' sends a gradient to '{name}'",
                where=f"roles.{name}",
                found="frozen, and its parameters require a gradient" if frozen else "the engine throws it away",
                expected=f"a gradient in '{done.role}' alone",
                fix="do not call requires_grad_ in its forward" if frozen else f"detach what comes from '{name}'",
            )
    return None


def unused_parameters(exam: Exam) -> Finding | None:
    """Every parameter that shall learn receives a gradient."""
    for role in exam.stage.roles:
        updates = [done.gradients for done in exam.first.done if done.role == role]
        if not updates:
            return Finding(
                "unused_parameters",
                "error",
                f"no update names the role '{role}'",
                where=f"roles.{role}",
                fix="yield an Update for it, or take it out of the roles that learn",
            )
        unused = [name for name in updates[0] if all(gradients[name] is None for gradients in updates)]
        if unused:
            everything = len(unused) == len(updates[0])
            return Finding(
                "unused_parameters",
                "error" if everything else "warning",
                f"{'all' if everything else len(unused)} parameters of '{role}' receive no gradient",
                where=f"roles.{role}",
                found=", ".join(unused[:5]) + (", ..." if len(unused) > 5 else ""),
                fix="is another module's forward used, or something detached?" if everything else
                "remove them, or freeze them with requires_grad_(False) so that weight decay leaves them alone",
            )  # fmt: skip
    return None


def no_op(exam: Exam) -> Finding | None:
    """The first update changes the role."""
    for role in exam.first.unchanged:
        size = max(done.norm for done in exam.first.done if done.role == role)
        return Finding(
            "no_op",
            "error",
            f"the update does not change '{role}'",
            where=f"optim.{role}",
            found=f"a gradient of norm {size:.3g}" + ("" if size else ", so the loss does not depend on it here"),
            fix="raise the learning rate" if size else "look for a constant loss, dead activations or a weight of 0",
        )
    return None


def learning_rate(exam: Exam) -> Finding | None:
    """Three steps on one batch do not make the loss explode."""
    losses: dict[str, list[float]] = {}
    _ = exam.first
    for done in exam.run(exam.roles(), exam.job.method, _STEPS + 1):
        losses.setdefault(done.role, []).append(float(done.loss))
    for role, values in losses.items():
        spec = exam.spec(role)
        if (isinstance(spec, Optim) and spec.maximize) or not math.isfinite(values[0]):
            continue
        worst = max((abs(v) if math.isfinite(v) else math.inf) for v in values[1:])
        if worst > _EXPLODED * max(abs(values[0]), 0.1):
            rate = f"lr {spec.lr:g}" if isinstance(spec, Optim) else "the optimizer"
            warm = isinstance(spec, Optim) and spec.warmup > 0
            return Finding(
                "learning_rate",
                "warning" if warm else "error",
                f"the loss of '{role}' explodes" + (" at the peak of the learning rate" if warm else ""),
                where=f"optim.{role}.lr",
                found=f"{rate}: loss " + ", ".join(f"{v:.3g}" for v in values) + " on one batch",
                expected="a loss that falls or stays",
                fix="divide the learning rate by 10, or set clip",
            )
    return None


def _dead(what: str, where: str, size: float, against: float) -> Finding:
    return Finding(
        "dead_terms",
        "warning",
        f"{what} has no share in the gradient",
        where=where,
        found=f"norm {size:.3g} against {against:.3g}",
        fix="raise its weight, or take it out; look for a detach, or an output that does not depend on the student",
    )


def _weights(method: Method) -> list[str]:
    """The fields of a method that weight a term and are in use."""
    if not dataclasses.is_dataclass(method):
        return []
    names = [f.name for f in dataclasses.fields(method) if f.name == "weight" or f.name.endswith("_weight")]
    return [n for n in names if isinstance(value := getattr(method, n), int | float) and value and value is not True]


def _gradients(exam: Exam, method: Method) -> list[Tensor | None]:
    """The gradients of all updates of the first step of a method like the job's."""
    return [g for done in exam.run(exam.roles(), method) for g in done.gradients.values()]


def _distance(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    if len(one) != len(other):
        return math.inf
    return norm(_minus(a, b) for a, b in zip(one, other, strict=True))


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a - b
