"""Checks of the models: do they fit the data, each other, and what they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError
from limbeck.doctor.exam import Call, Exam, Skip, StepFailed
from limbeck.doctor.finding import Finding, Severity


def shapes(exam: Exam) -> Finding | None:
    """The first step runs to its end."""
    try:
        _ = exam.first
    except StepFailed as failed:
        return _from_error("shapes", failed.error)
    return None


def method(exam: Exam) -> Finding | None:
    """The method accepts these models and data."""
    try:
        exam.job.method.check(exam.roles(), exam.batch)
    except UsageError as error:
        return _from_error("method", error)
    except Exception as error:
        return Finding("method", "error", "the method's own check cannot run", found=f"{type(error).__name__}: {error}")
    return None


def modes(exam: Exam) -> Finding | None:
    """Frozen roles are in evaluation mode, answer alike twice, and keep their buffers."""
    for name, role in exam.first.roles.items():
        if role.frozen and name in exam.calls:
            finding = _mode(name, role.module, exam.calls[name])
            if finding is not None:
                return finding
    return None


def _mode(name: str, module: nn.Module, call: Call) -> Finding | None:
    training = [path or type(module).__name__ for path, part in module.named_modules() if part.training]
    if training:
        return Finding(
            "modes",
            "error",
            f"the frozen role '{name}' is in train mode",
            where=f"roles.{name}: {', '.join(training[:3])}",
            fix="do not set .training or call .train() in its forward",
        )
    before = {path: buffer.clone() for path, buffer in module.named_buffers()}
    with torch.no_grad():
        first, second = (call.repeat(module) for _ in range(2))
    moved = [path for path, buffer in module.named_buffers() if not torch.equal(buffer, before[path])]
    if moved:
        return Finding(
            "modes",
            "error",
            f"the frozen role '{name}' changes its own buffers when it is called",
            where=f"roles.{name}: {', '.join(moved[:3])}",
            fix="its normalisation works in train mode: pass training=self.training, or track_running_stats=True",
        )
    if not torch.equal(first, second):
        return Finding(
            "modes",
            "error",
            f"the frozen role '{name}' answers differently each time",
            where=f"roles.{name}",
            found=f"two calls with one input differ by up to {float((first - second).abs().max()):.3g}",
            expected="the same output",
            fix="something in it draws random numbers in evaluation mode: F.dropout(x, training=self.training)",
        )
    return None


def classes(exam: Exam) -> Finding | None:
    """Teacher, student and labels have the same number of classes."""
    y = exam.batch.get("y")
    if not _class_numbers(y):
        raise Skip("the data have no class labels")
    outputs = {n: exam.calls[n].output for n in ("teacher", "student") if n in exam.calls}
    counts = {n: output.shape[-1] for n, output in outputs.items() if output.ndim == 2}
    if not counts:
        raise Skip("no model gives one number for each class")
    severity: Severity = "warning" if exam.ran else "error"  # the loss may not be about classes
    known = getattr(exam.stage.data, "num_classes", None)
    seen = f"labels {int(y.min())} to {int(y.max())}"
    wrong = {n: c for n, c in counts.items() if int(y.max()) >= c or (known is not None and known > c)}
    if wrong or int(y.min()) < 0:
        return Finding(
            "classes",
            severity,
            "there are labels for which a model has no class",
            where=", ".join(f"roles.{n}" for n in wrong) or "batch.y",
            found=f"{seen}; " + ", ".join(f"{n} {c} classes" for n, c in counts.items()),
            expected=f"{known or int(y.max()) + 1} classes, labels from 0",
            fix="give the last layer as many outputs as the data have classes, and number the classes from 0",
        )
    if len(set(counts.values())) > 1:
        return Finding(
            "classes",
            severity,
            "teacher and student have different numbers of classes",
            found=", ".join(f"{n} {c}" for n, c in counts.items()),
            expected="the same classes in the same order",
            fix=f"give the student {counts['teacher']} outputs, or use a teacher of {counts['student']} classes",
        )
    return None


def class_order(exam: Exam) -> Finding | None:
    """The names of the classes stand in the same order in the data and in the models."""
    owners = {"data": exam.stage.data, **{n: r.module for n, r in exam.models.items()}}
    names = {owner: found for owner, value in owners.items() if (found := class_names(value))}
    if len(names) < 2:
        raise Skip(f"class names are known for {', '.join(names)} only" if names else "no class names are known")
    for (one, a), (other, b) in combinations(names.items(), 2):
        if a == b or not set(a) & set(b):  # names without a common word are in another language, so to say
            continue
        place = next(i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
        shown = [f"{who} '{(v[place : place + 1] or ['none'])[0]}'" for who, v in ((one, a), (other, b))]
        return Finding(
            "class_order",
            "error",
            f"the classes of {one} and {other} are not in the same order" if set(a) == set(b) else
            f"{one} and {other} have different classes",
            where=f"class {place}",
            found=", ".join(shown),
            expected="the same name at each number",
            fix=f"number the labels as {other} does: data.classes takes the names in order",
        )  # fmt: skip
    return None


def teacher_skill(exam: Exam) -> Finding | None:
    """The teacher knows the labels better than chance does."""
    y, call = exam.batch.get("y"), exam.calls.get("teacher")
    if call is None or not _class_numbers(y) or call.output.ndim != 2 or len(y) != len(call.output) or len(y) < 16:
        raise Skip("this needs a teacher that gives class scores, and at least 16 samples with labels")
    count = call.output.shape[1]
    right = float((call.output.argmax(1) == y).float().mean())
    chance = float(torch.bincount(y.clamp(0), minlength=count).max()) / len(y)  # of always saying the commonest class
    chance = min(chance, 1 / count + 2 * ((1 - 1 / count) / count / len(y)) ** 0.5)
    if right > chance:
        return None
    return Finding(
        "teacher_skill",
        "warning",
        "the teacher does not know these labels",
        where="roles.teacher",
        found=f"{right:.0%} right of {len(y)} samples, where guessing gets {1 / count:.0%} of {count} classes",
        fix="look at the order of the classes, the teacher's input normalisation, and whether its weights were loaded",
    )


def vocabulary(exam: Exam) -> Finding | None:
    """Teacher, student and data read the same tokens in the same way."""
    ids = exam.batch.get("x")
    ids = ids.get("input_ids") if isinstance(ids, Mapping) else None
    if not isinstance(ids, Tensor):
        raise Skip("the data are no texts")
    readers = {"data": exam.stage.data, **{n: r.module for n, r in exam.models.items() if r.preprocess is None}}
    for name, module in list(readers.items())[1:]:
        size = _embeddings(module)
        if size is not None and int(ids.max()) >= size:
            return Finding(
                "vocabulary",
                "error",
                f"the data have tokens that the role '{name}' does not know",
                where=f"roles.{name}",
                found=f"token {int(ids.max())}",
                expected=f"0 to {size - 1}",
                fix="tokenise with this model's tokenizer, or enlarge its embedding",
            )
    tokens = {name: found for name, value in readers.items() if (found := _vocabulary(value))}
    for (one, a), (other, b) in combinations(tokens.items(), 2):
        differ = [t for t in {*a, *b} if a.get(t) != b.get(t)]
        if differ:
            token = min(differ)
            return Finding(
                "vocabulary",
                "error",
                f"{one} and {other} have different vocabularies and read the same token numbers",
                where=f"{one}.tokenizer, {other}.tokenizer",
                found=f"{len(differ)} tokens differ, such as {token!r}: {a.get(token)} and {b.get(token)}",
                expected="one tokenizer, or each role with its own in preprocess",
                fix="start the student from the teacher's vocabulary, or tokenise for each",
            )
    return None


def normalisation(exam: Exam) -> Finding | None:
    """Each model gets images normalised as its own configuration says."""
    x = exam.batch.get("x")
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or float(x.std()) == 0:
        raise Skip("the data are no images")
    judged = False
    for name, role in exam.models.items():
        wanted, call = _wanted(role.module), exam.calls.get(name)
        given = call.args[0] if call is not None and call.args else None
        if wanted is None or not isinstance(given, Tensor) or given.shape[:2] != x.shape[:2]:
            continue
        judged = True
        raw = float(x.min()) >= 0 and float(x.max()) <= 1
        seen = _affine(x.double(), given.double()) if raw else None
        off = max((float((a - b).abs().max()) for a, b in zip(seen, wanted, strict=True)), default=0.0) if seen else 0.0
        scale = float(given.std())
        if off <= 0.05 and (raw or 0.2 < scale < 5):
            continue
        return Finding(
            "normalisation",
            "warning" if name in exam.stage.roles else "error",
            f"the input of '{name}' is not normalised as its configuration says",
            where=f"roles.{name}.preprocess",
            found=_show(seen) if seen else f"values of standard deviation {scale:.3g}",
            expected=_show(wanted),
            fix=f"Role('{name}', model, preprocess=limbeck.models.load.model_preprocess(model)), with images in [0, 1]",
        )
    if not judged:
        raise Skip("no model says how its input is to be normalised")
    return None


def class_names(owner: Any) -> list[str] | None:
    """The class names that a data set or model carries, in order, in lower case; None where it carries none."""
    config = getattr(owner, "config", None)
    by_number = getattr(config, "id2label", None) or {}
    timm = getattr(owner, "pretrained_cfg", None) or {}
    names: Any = getattr(owner, "classes", None) or timm.get("label_names")
    names = names or [by_number[i] for i in sorted(by_number)]
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        return None
    plain = [str(name).lower().replace("_", " ").strip() for name in names]
    placeholder = all(name in (f"label {i}", str(i)) for i, name in enumerate(plain))
    return None if placeholder else plain


def _from_error(check: str, error: UsageError) -> Finding:
    parts = (None if v is None else str(v) for v in (error.where, error.found, error.expected, error.fix))
    return Finding(check, "error", error.what, *parts)


def _class_numbers(y: Any) -> bool:
    return isinstance(y, Tensor) and y.ndim == 1 and len(y) > 0 and y.dtype in (torch.int64, torch.int32)


def _embeddings(module: nn.Module) -> int | None:
    """Rows of the table that token numbers are looked up in, where the model says which that is."""
    find = next((p.get_input_embeddings for p in module.modules() if hasattr(p, "get_input_embeddings")), None)
    table = find() if callable(find) else None
    return getattr(table, "num_embeddings", None)


def _vocabulary(owner: Any) -> dict[str, int] | None:
    tokenizer = getattr(owner, "tokenizer", None) or getattr(owner, "tokenize", None)
    vocabulary = getattr(getattr(tokenizer, "tokenizer", tokenizer), "get_vocab", None)
    return None if vocabulary is None else vocabulary()


def _wanted(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation that a model was trained with, by its own word."""
    config = getattr(module, "pretrained_cfg", None) or {}
    if not (config.get("mean") and config.get("std")):
        return None
    return torch.tensor(config["mean"], dtype=torch.float64), torch.tensor(config["std"], dtype=torch.float64)


def _affine(x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation `[C]` such that `given = (x - mean) / std` in each channel."""
    dims = (0, 2, 3)
    std = x.std(dims) / given.std(dims).clamp(min=1e-12)
    return x.mean(dims) - std * given.mean(dims), std


def _show(pair: tuple[Tensor, Tensor]) -> str:
    return ", ".join(f"{n} {[round(v, 3) for v in t.tolist()]}" for n, t in zip(("mean", "std"), pair, strict=True))
