"""A finished run, opened again: its student, the data it was judged on, and what can be made of the two."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from limbeck.convert.record import read_manifest, save_student
from limbeck.core.errors import UsageError
from limbeck.core.recipe import resolve_data
from limbeck.core.roles import Role, Roles
from limbeck.data import Data, load_data
from limbeck.data.condensed import Condensed
from limbeck.data.condensed_graphs import CondensedGraphs
from limbeck.evaluate.generation import generates
from limbeck.evaluate.tasks import evaluator
from limbeck.export.deploy import Deployed, Form, deploy
from limbeck.export.onnx import OnnxReport, to_onnx
from limbeck.family import FILE, Family, Member
from limbeck.job import tokenised
from limbeck.models.folder import load_folder
from limbeck.models.load import model_preprocess
from limbeck.models.specs import is_object
from limbeck.nn.elastic import Elastic, Extract
from limbeck.report.run import read_run

_BATCH = 32  # samples of the call that a deployed student is measured on


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        onnx: The file, and how well it agrees with the module.
        deployed: The student in the form in which it runs, where one was asked for.
        before: The student's numbers on held-out data.
        after: Those of the deployed student; both empty where the data are not at hand.
        unjudged: Why they are not.
    """

    onnx: OnnxReport
    deployed: Deployed | None = None
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    unjudged: str | None = None


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Args:
        folder: Its folder.
        student: The student, in evaluation mode.
        trust: Whether Python code that the folder names may be run.
    """

    folder: Path
    student: nn.Module
    trust: bool = False

    @classmethod
    def open(cls, run: str | os.PathLike[str], module: nn.Module | None = None, trust: bool = False) -> Finished:
        """Load the student of a run; the arguments are those of `limbeck.load`.

        Raises:
            UsageError: There is no finished run in the folder.
        """
        read_run(run)
        return cls(Path(run), load_folder(Path(run), module, trust), trust)

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """Type and shape, without the batch, of each input of the student."""
        found: dict[str, list[Any]] = read_run(self.folder).metrics.get("lineage", {}).get("input")
        if not found:
            raise UsageError(
                "the run does not say what its student takes",
                where=self.folder / "metrics.json",
                expected="lineage.input",
                fix="limbeck.export.onnx.to_onnx writes any module, given an example of its input",
            )
        return found

    @cached_property
    def data(self) -> Data:
        """The data of the run, as the student reads them.

        Raises:
            UsageError: They were objects of the caller's, or are no longer there, or ask for trust.
        """
        path = self.folder / "recipe.yaml"
        if not path.is_file():
            raise UsageError("the run does not say what its data are", where=path, fix="give the data in Python")
        named = resolve_data(yaml.safe_load(path.read_text(encoding="utf-8")).get("data"), path.parent)
        options = dict(named) if isinstance(named, Mapping) else {"spec": named}
        spec = str(options.pop("spec"))
        if re.match(r"an? ", spec):
            raise UsageError("the data were objects of the program's", where=path, found=spec, fix="go on in Python")
        if is_object(spec) and not self.trust:
            raise UsageError("the data are made by Python code", where=path, found=spec, fix="--trust, or trust=True")
        return tokenised(load_data(spec, **options), None, self._whole)[0]

    @property
    def held_out(self) -> Any:
        """The data that training never saw."""
        return self.data.get("test") or self.data.validation

    def judge(self, module: nn.Module) -> dict[str, float]:
        """The numbers of a module like the student on the data that training never saw; empty without labels."""
        judge = evaluator(self.held_out, module, 256, None, False)
        if judge is None:
            return {}
        with torch.no_grad():
            return judge.judge(Roles(student=Role("student", module, self.preprocess)), "student")

    @property
    def preprocess(self) -> Any:
        """What the student wants done to its inputs first."""
        return model_preprocess(self._whole)

    def prepared(self, x: Any) -> Any:
        """Inputs as the student takes them."""
        return x if self.preprocess is None else self.preprocess(x)

    @property
    def _whole(self) -> nn.Module:
        return self.student.model if isinstance(self.student, Elastic) else self.student


def export(
    run: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    module: nn.Module | None = None,
    trust: bool = False,
    to: Form | None = None,
) -> Exported:
    """Write the student of a run as ONNX, compared with the module; with `to`, in the form in which it runs.

    Args:
        run: The run's folder.
        path: The file; default `student/model.onnx` in the run's folder, with `to` `student/model-FORM.onnx`.
        module: An untrained student, where it is a module of the caller's.
        trust: Whether Python code that the folder names may be run.
        to: `int8-weight`, `int8-dynamic` or `2:4`: see `limbeck.export.deploy.deploy`.

    Returns:
        What was written, how well it agrees, and what the form costs and saves.

    Raises:
        UsageError: There is no finished run in the folder, an extra (`export`, `deploy`) is not installed, or the student
            does not go into the form.
        RunError: The student cannot be written as ONNX, or the graph computes something else.
    """
    done = Finished.open(run, module, trust)
    if isinstance(done.student, Condensed | CondensedGraphs):
        fix = f"train a network on it: limbeck distill --data condensed:{run} --student ..."
        raise UsageError("a data set is no graph", where=run, found="a condensed data set", fix=fix)
    example = _conditioned(done.student, _example(done.inputs))
    axes = ("batch", "sequence") if "input_ids" in done.inputs else ("batch",)
    name = "model.onnx" if to is None else f"model-{to.replace(':', '-')}.onnx"
    target = Path(path) if path is not None else done.folder / "student" / name
    if to is None:
        return Exported(to_onnx(done.student, example, target, axes=axes))
    x: Any = example
    unjudged = None
    try:
        source = done.held_out
        batch = source.batch(torch.arange(min(_BATCH, len(source))), 0)
        x = done.prepared(batch.x)
        x = x if isinstance(x, Mapping) else _conditioned(done.student, (x,))
    except UsageError as error:  # the data were objects of the caller's, say
        unjudged = error.what
    deployed = deploy(done.student, to, x)
    before, after = ({} if unjudged else done.judge(net) for net in (done.student, deployed.model))
    written = to_onnx(deployed.model, example, target, axes=axes, tolerance=deployed.tolerance)
    return Exported(written, deployed, before, after, unjudged)


def family(
    run: str | os.PathLike[str],
    module: nn.Module | None = None,
    trust: bool = False,
    *,
    count: int = 20,
    again: bool = False,
) -> Family:
    """The sub-networks of a run's elastic student, measured on this machine; the first call writes `family.json`.

    Args:
        run: The run's folder.
        module: The untrained student, where it is a module of the caller's.
        trust: Whether Python code that the folder names may be run.
        count: Sub-networks to measure.
        again: Whether to measure, where that was done before.

    Raises:
        UsageError: The student is not elastic, or the data are not at hand.
    """
    done = Finished.open(run, module, trust)
    if not isinstance(done.student, Elastic):
        found = type(done.student).__name__
        raise UsageError("this is no elastic model", where=run, found=found, fix="train one with a method such as deps")
    data, test = done.data.train, done.data.get("test") or done.data.get("validation")
    if (done.folder / FILE).is_file() and not again:
        return Family.read(done.folder, done.student, data, done.preprocess)
    made = Family.of(done.student, data, test, count=count, preprocess=done.preprocess)
    made.save(done.folder)
    return made


def save_member(run: str | os.PathLike[str], member: Member, small: nn.Module, out: str | os.PathLike[str]) -> None:
    """Write a sub-network of a run's student as a student of its own, for `limbeck.load`.

    Args:
        run: The run's folder.
        member: The sub-network.
        small: The module that `Family.pick` gave for it.
        out: The folder.
    """
    manifest = read_manifest(Path(run) / "student")
    records = [*manifest["records"], Extract(member.arch).record]
    save_student(out, small, records, manifest["spec"], manifest["meta"], manifest["num_classes"])


def _conditioned(module: Any, x: Any) -> Any:
    """Inputs of a generator with the empty condition beside the noise, so that the graph takes both; others as they are."""
    null = getattr(module, "null", None)
    if not generates(module) or null is None:
        return x
    return {"x_t": x[0], "condition": null.expand(len(x[0]), *null.shape)}


def _example(inputs: Mapping[str, Any]) -> tuple[Tensor, ...] | dict[str, Tensor]:
    example = {
        name: torch.rand(2, *shape) if dtype.startswith("float") else torch.ones(2, *shape, dtype=getattr(torch, dtype))
        for name, (dtype, *shape) in inputs.items()
    }
    return tuple(example.values()) if list(example) == ["x"] else example
