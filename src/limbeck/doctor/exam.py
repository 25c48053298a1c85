"""A job on the table: its first step is run on copies, once, and the checks look at what happened."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from limbeck.core.adapt import main_output
from limbeck.core.batch import Batch, _shape
from limbeck.core.errors import UsageError
from limbeck.core.method import Method, updates
from limbeck.core.optim import Optim, OptimSpec
from limbeck.core.roles import Roles
from limbeck.core.source import Source
from limbeck.core.stages import Train
from limbeck.core.update import Update
from limbeck.data.seeding import reseed
from limbeck.engine.feed import rows_of
from limbeck.plan.fake import copy_roles
from limbeck.plan.program import prepare_roles, sample, total_steps, training_stages
from limbeck.plan.trace import explained

if TYPE_CHECKING:
    from limbeck.job import Job


@dataclass
class Call:
    """The last call of a role's module: what the model was given, after preprocessing, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def repeat(self, module: nn.Module) -> Tensor:
        """Call a module in the same way again."""
        return main_output(module(*self.args, **self.kwargs))


@dataclass
class Done:
    """One update of the first step.

    Attributes:
        role: The role it names.
        loss: Its loss.
        terms: Norm of the gradient in the role's parameters of each log that has one.
        gradients: Gradient of each parameter of the role that learns; None where there is none.
        leaks: Other roles that received a gradient.
        applied: Whether the optimizer stepped.
    """

    role: str
    loss: Tensor
    terms: dict[str, float]
    gradients: dict[str, Tensor | None]
    leaks: list[str]
    applied: bool

    @property
    def norm(self) -> float:
        """Norm of the whole gradient."""
        return norm(self.gradients.values())


@dataclass
class FirstStep:
    """What the first step did, on copies of the roles.

    Attributes:
        roles: The copies after the step.
        done: The updates.
        calls: The last call of each role that was called.
        unchanged: Roles that were updated and are the same as before.
    """

    roles: Roles
    done: list[Done] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)


class Skip(Exception):
    """A check does not apply, for the reason given."""


class StepFailed(Skip):
    """The first step did not run to its end, for the reason given as `error`."""

    def __init__(self, error: UsageError) -> None:
        super().__init__("the first step has to run for this check")
        self.error = error


class Heard(nn.Module):
    """Stands in for a teacher that reads the texts with a tokenizer of its own: what it answers to the batch."""

    takes_batch = True
    answers: Tensor

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.register_buffer("answers", answers, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The answers, whatever the batch."""
        return self.answers


class Exam:
    """A job, its first training stage, and a batch for it.

    Args:
        job: The job; nothing in it is changed.
        samples: Samples of the batch, at most.

    Attributes:
        stage: The first training stage, after the conversions before it.
        models: Copies of the roles as they are then, in the stage's modes.
        batch: Random samples of the stage's data.
        notes: What was passed over on the way to the stage.
    """

    def __init__(self, job: Job, samples: int = 64) -> None:
        self.job, self.seed, self.notes = job, job.engine.seed, list[str]()
        self.models = copy_roles(job.roles)
        stage = next(training_stages(job.method, self.models, job.data, self.notes), None)
        if stage is None:
            raise UsageError("the program has no stage that trains by steps, so there is nothing to examine")
        self.stage: Train = stage
        self.models.step, self.models.epoch, self.models.total = 0, 0, total_steps(stage, job.engine) or 0
        prepare_roles(stage, self.models)
        count = min(samples, job.engine.batch_size)
        batch = sample(stage.data, count, torch.Generator().manual_seed(self.seed), whole=2**31)
        self.batch: Batch = batch.to(_device(self.models))
        if job.taught is not None and "teacher" in self.models:
            self._hear(job.taught)

    def _hear(self, taught: Source) -> None:
        teacher = self.models.teacher
        heard = taught.batch(rows_of(taught, self.batch.id.cpu()), 0).to(self.batch.id.device)
        with torch.no_grad():
            self.models.teacher = Heard(teacher(heard))
        self.models.teacher.freeze()

    def roles(self) -> Roles:
        """Copies of the roles that learn beside those that are frozen, at the stage's first step."""
        frozen = [role.module for _, role in self.models.items() if role.frozen]
        kept = {id(part): part for module in frozen for part in (module, *module.parameters())}
        copies = copy_roles(self.models, kept)
        copies.seed = self.seed
        prepare_roles(self.stage, copies)
        return copies

    @cached_property
    def first(self) -> FirstStep:
        """The first step.

        Raises:
            StepFailed: It did not run to its end.
        """
        result = self._attempt
        if isinstance(result, UsageError):
            raise StepFailed(result)
        return result

    @property
    def ran(self) -> bool:
        """Whether the first step ran to its end."""
        return isinstance(self._attempt, FirstStep)

    @property
    def calls(self) -> dict[str, Call]:
        """The last calls of the roles, as far as the first step got."""
        _ = self._attempt
        return self._step.calls

    @cached_property
    def _attempt(self) -> FirstStep | UsageError:
        step = self._step = FirstStep(self.roles())
        before = {name: _values(role.module) for name, role in step.roles.items()}
        try:
            with self._watched(step):
                step.done = list(self.run(step.roles, self.job.method))
        except UsageError as error:
            return error
        for name in {done.role for done in step.done if done.applied}:
            values = _values(step.roles[name].module)
            if all(torch.equal(values[k], before[name][k]) for k in values):
                step.unchanged.append(name)
        return step

    def run(self, m: Roles, method: Method, steps: int = 1) -> Iterator[Done]:
        """Run steps on the batch as a loop of one's own would, and tell of each update.

        Args:
            m: Roles from `roles()`; changed.
            method: The method, or one like it with other fields.
            steps: How many, all on the same batch, at the peak of the learning rate.
        """
        reseed(self.seed)
        sole = next(iter(self.stage.roles)) if len(self.stage.roles) == 1 else None
        optimizers = {name: self._optimizer(name, m) for name in self.stage.roles}
        function = getattr(self.stage.step, "__func__", None)
        program = self.stage.step if function is None else MethodType(function, method)
        assert program is not None
        for _ in range(steps):
            for update in updates(program, m, self.batch, sole):
                yield _carry_out(update, m, optimizers)
            m.step += 1

    def spec(self, name: str) -> OptimSpec:
        """How a role is optimised."""
        return self.stage.roles[name] or self.job.optim.get(name) or Optim()

    def _optimizer(self, name: str, m: Roles) -> torch.optim.Optimizer:
        spec = self.spec(name)
        return self.job.method.optimizer(m, name, spec) if isinstance(spec, Optim) else spec(m[name].module)

    @contextmanager
    def _watched(self, step: FirstStep) -> Iterator[None]:
        shapes: dict[str, str] = {}
        with ExitStack() as hooks, explained(self.stage, self.batch, shapes):
            for name, role in step.roles.items():
                note = partial(_note, step, shapes, name)
                hooks.callback(role.module.register_forward_hook(note, with_kwargs=True).remove)
            yield


def _note(
    step: FirstStep, shapes: dict[str, str], name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    result = main_output(output)
    shapes[name] = _shape(result)
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    step.calls[name] = Call(args, kwargs, result.detach())


def _carry_out(update: Update, m: Roles, optimizers: Mapping[str, torch.optim.Optimizer]) -> Done:
    if update.role not in optimizers:
        raise UsageError(
            "an update names a role that does not learn in this stage",
            found=update.role,
            expected=" or ".join(optimizers),
        )
    if not isinstance(update.loss, Tensor) or update.loss.ndim or not update.loss.requires_grad:
        raise UsageError(
            f"the loss of '{update.role}' cannot be differentiated",
            found=_shape(update.loss),
            expected="a scalar tensor that depends on the role's parameters",
            fix="check for .detach(), torch.no_grad() or a missing reduction",
        )
    named = {n: p for n, p in m[update.role].module.named_parameters() if p.requires_grad}
    terms = {
        n: _gradient_norm(t, list(named.values())) for n, t in update.logs.items() if t.requires_grad and not t.ndim
    }
    update.loss.backward()
    done = Done(
        update.role,
        update.loss.detach(),
        terms,
        {n: None if p.grad is None else p.grad.clone() for n, p in named.items()},
        [name for name, role in m.items() if name != update.role and _has_gradient(role.module, named.values())],
        update.apply,
    )
    if update.apply:
        optimizers[update.role].step()
    for name, role in m.items():
        if update.apply or name != update.role:
            role.module.zero_grad(set_to_none=True)
    return done


def _gradient_norm(term: Tensor, params: list[nn.Parameter]) -> float:
    grads = torch.autograd.grad(term, params, retain_graph=True, allow_unused=True)
    return norm(grads)


def norm(tensors: Iterable[Tensor | None]) -> float:
    """The norm of tensors taken together; those that are None count as 0."""
    return math.hypot(*(float(t.norm()) for t in tensors if t is not None))


def _has_gradient(module: nn.Module, but: Any) -> bool:
    known = set(map(id, but))
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters() if id(p) not in known)


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def _device(m: Roles) -> torch.device:
    return next((p.device for _, role in m.items() for p in role.module.parameters()), torch.device("cpu"))
