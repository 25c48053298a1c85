"""The named models of a program, and the counters it may look at."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.adapt import call, main_output
from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError

if TYPE_CHECKING:
    from limbeck.core.stages import Conversion


def sharded(module: nn.Module) -> bool:
    """Whether the parameters of a module are spread over processes."""
    return any(hasattr(p, "device_mesh") for p in module.parameters())


class Role:
    """One model under its name: called like the model, returns the tensor that losses are about.

    Attributes that are not its own come from the module, so `m.student.fc.weight` works.

    Args:
        name: The role's name.
        module: The model.
        preprocess: What is done to the input first, such as this model's own normalisation.
    """

    def __init__(self, name: str, module: nn.Module, preprocess: Callable[[Any], Any] | None = None) -> None:
        if not isinstance(module, nn.Module):
            raise UsageError(
                "a role is not a module", where=name, found=type(module).__name__, expected="torch.nn.Module"
            )
        self.name, self.module, self.preprocess = name, module, preprocess
        self.forward: Callable[..., Any] = module  # the compiled module, where one was asked for
        self.frozen = False
        self._learned: list[nn.Parameter] = []
        self.takes_batch = getattr(module, "takes_batch", False)  # stored outputs look up ids and views

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The logits or embedding for `x`, a batch (its field `x` is used) or a model input."""
        return main_output(self.raw(x, *args, **kwargs))

    def raw(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's whole output for `x`."""
        return call(self.forward, self._input(x), *args, **kwargs)

    def features(self, x: Any, *paths: str, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """The output for `x`, and the outputs of the submodules named by dotted path on the way.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
            >>> logits, taps = Role("student", net).features(torch.ones(1, 2), "1")
            >>> logits.shape, taps["1"].shape
            (torch.Size([1, 4]), torch.Size([1, 3]))
        """
        taps: dict[str, Any] = {}
        hooks = []
        try:
            for path in paths:
                hooks.append(find(self.module, path, self.name).register_forward_hook(partial(_keep, taps, path)))
            output = main_output(call(self.module, self._input(x), **kwargs))
        finally:
            for hook in hooks:
                hook.remove()
        if taps and output.requires_grad and sharded(self.module):
            nothing = 0 * output.sum()  # parameters are gathered when gradients reach the output
            taps = {path: tap + nothing if isinstance(tap, Tensor) else tap for path, tap in taps.items()}
        return output, taps

    def upto(self, x: Any, path: str, **kwargs: Any) -> Any:
        """The output for `x` of the submodule named by dotted path, at which the forward pass stops.

        The whole pass is made where the parameters are sharded, since their hooks wait for its end.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(5, 1))
            >>> Role("student", net).upto(torch.ones(1, 2), "1").shape
            torch.Size([1, 4])
        """
        if sharded(self.module):
            return self.features(x, path, **kwargs)[1][path]
        hook = find(self.module, path, self.name).register_forward_hook(_stop)
        try:
            call(self.module, self._input(x), **kwargs)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise UsageError("the model does not call this part", where=f"{self.name}.{path}")

    def _input(self, x: Any) -> Any:
        if self.takes_batch:
            if isinstance(x, Batch):
                return x
            raise UsageError(
                "a role that looks at the whole batch was called with something else",
                where=self.name,
                found=type(x).__name__,
                expected="a Batch with the fields its module reads, such as id and view",
                fix=f"call m.{self.name}(batch)",
            )
        x = x.x if isinstance(x, Batch) else x
        return x if self.preprocess is None else self.preprocess(x)

    def freeze(self) -> None:
        """No gradient, and evaluation mode whatever calls `train()` on the module, a part or a parent of it."""
        if not self.frozen:
            self._learned = [p for p in self.module.parameters() if p.requires_grad]
        self.frozen = True
        self.module.eval()
        for p in self._learned:
            p.requires_grad_(False)
            p.grad = None  # of an earlier training
        for part in self.module.modules():
            part.__dict__["train"] = partial(_stay, part)

    def unfreeze(self) -> None:
        """Undo `freeze`: the parameters that had gradients before get them again."""
        for part in self.module.modules():
            part.__dict__.pop("train", None)
        for p in self._learned:
            p.requires_grad_(True)
        self.frozen = False

    def __getattr__(self, name: str) -> Any:
        if "module" not in self.__dict__:  # asked while being copied
            raise AttributeError(name)
        return getattr(self.__dict__["module"], name)

    def __repr__(self) -> str:
        return f"Role({self.name}: {type(self.module).__name__}{', frozen' if self.frozen else ''})"


class _Reached(Exception):
    """The forward pass has come as far as was asked."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextmanager
def held(role: Role) -> Iterator[None]:
    """The parameters of a role need no gradient meanwhile; gradients still go through it to its input.

    What is computed through the role then keeps less for the backward pass. Yield the update inside, so that the backward pass
    is inside too.

    Example:
        >>> m, x = Roles(critic=nn.Linear(2, 1)), torch.ones(1, 2, requires_grad=True)
        >>> with held(m.critic):
        ...     m.critic(x).sum().backward()
        >>> x.grad is not None, m.critic.weight.grad, m.critic.weight.requires_grad
        (True, None, True)
    """
    learning = [p for p in role.module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


class Roles:
    """The models of a program by name, and what a step may ask the engine.

    Args:
        **modules: Models by role name.

    Attributes:
        step: Steps done in this stage.
        epoch: Epochs done in this stage.
        total: Steps that this stage will have.
        lead: False in all but the first of several micro-batches, whose programs run in lock-step: what a step does to
            weights between two yields belongs under `if m.lead`.
        lineage: What rebuilds the converted roles: the role each came from, and the records of its conversions.

    Example:
        >>> m = Roles(student=nn.Linear(2, 2), teacher=nn.Linear(2, 2))
        >>> m.freeze("teacher")
        >>> m.teacher.module.train().training, m.student(torch.ones(1, 2)).shape
        (False, torch.Size([1, 2]))
    """

    step: int
    epoch: int
    total: int
    seed: int
    lead: bool
    lineage: dict[str, dict[str, Any]]
    _converted: set[str]
    _roles: dict[str, Role]
    _generators: dict[str, torch.Generator]
    _rates: dict[str, Callable[[int], float]]

    def __init__(self, **modules: nn.Module | Role) -> None:
        self.__dict__["_roles"] = {}
        self.__dict__["_generators"] = {}
        self.__dict__["_rates"] = {}
        self.__dict__.update(step=0, epoch=0, total=0, seed=0, lead=True, lineage={}, _converted=set())
        for name, module in modules.items():
            setattr(self, name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("step", "epoch", "total", "seed", "lead"):
            self.__dict__[name] = value
        elif hasattr(type(self), name):
            raise UsageError("this name is taken and cannot be a role's", where=f"roles.{name}", fix="use another name")
        elif isinstance(value, Role):
            self._roles[name] = value
        elif (old := self._roles.get(name)) is not None:
            self._roles[name] = Role(name, value, old.preprocess)
        else:
            self._roles[name] = Role(name, value)

    def __getattr__(self, name: str) -> Role:
        try:
            return self.__dict__["_roles"][name]
        except KeyError:
            if name.startswith("__"):
                raise AttributeError(name) from None
            raise UsageError(
                f"the method asks for the role '{name}' and there is none",
                where=f"roles.{name}",
                found=", ".join(self.__dict__["_roles"]) or "no roles",
                fix=f"pass {name}=<module>",
            ) from None

    __getitem__ = __getattr__

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def items(self) -> Iterator[tuple[str, Role]]:
        """Names and roles."""
        return iter(list(self._roles.items()))

    def convert(self, name: str, how: Conversion, of: str | None = None) -> dict[str, Any]:
        """Change a role's module and keep the record; the engine gives the new parameters to the role's optimizer.

        Args:
            name: The role that gets the converted module.
            how: The conversion, `module -> (module, record)`.
            of: The role whose module is converted, when another one.

        Returns:
            The record.
        """
        base = of or name
        frozen = self[base].frozen
        self[base].unfreeze()  # or the copy of a frozen layer would stay frozen
        module, record = how(self[base].module)
        if frozen and base != name:
            self[base].freeze()
        if base != name and not any(p.requires_grad for p in module.parameters()):
            own = {id(p) for p in self[base].module.parameters()}
            for p in module.parameters():  # of a model that was given frozen, as an earlier run leaves it
                p.requires_grad_(p.is_floating_point() and id(p) not in own)
        learning = {id(p) for p in module.parameters() if p.requires_grad}  # weights under adapters may be shared
        if base != name and not learning.isdisjoint(map(id, self[base].module.parameters())):
            raise UsageError(
                "a conversion shares parameters with its origin", where=f"{base} -> {name}", fix="copy them"
            )
        origin = self.lineage.get(base, {"base": base, "records": []})
        preprocess = self[base].preprocess
        setattr(self, name, module)
        if self[name].preprocess is None:
            self[name].preprocess = preprocess
        self.lineage[name] = {"base": origin["base"], "records": [*origin["records"], record]}
        self._converted.add(name)
        return record

    @property
    def teachers(self) -> dict[str, Role]:
        """The role `teacher`, or `teacher_0`, `teacher_1`, ... of methods that keep several apart."""
        return {name: role for name, role in self._roles.items() if name.partition("_")[0] == "teacher"}

    @property
    def progress(self) -> float:
        """The share of this stage that is done, in [0, 1]."""
        return self.step / self.total if self.total else 0.0

    def rate(self, name: str, step: int | None = None) -> float:
        """The learning rate of a role at a step of this stage (default: the present one), as a multiple of its peak.

        1 in a loop of one's own, and for optimizers whose schedule the engine does not know.
        """
        schedule = self._rates.get(name)
        return 1.0 if schedule is None else schedule(self.step if step is None else step)

    def every(self, n: int) -> bool:
        """Whether this step is one in `n`: steps 0, n, 2n, ... of the stage."""
        return self.step % n == 0

    def freeze(self, *names: str) -> None:
        """Freeze the roles named."""
        for name in names:
            self[name].freeze()

    def rng(self, name: str = "step", device: torch.device | str = "cpu") -> torch.Generator:
        """A random generator with a name, seeded by the run and saved in checkpoints; draws from it resume exactly."""
        key = f"{name}@{torch.device(device).type}"
        if key not in self._generators:
            seed = zlib.crc32(f"{self.seed}/{name}".encode())
            self._generators[key] = torch.Generator(device).manual_seed(seed)
        return self._generators[key]


def find(module: nn.Module, path: str, role: str = "model") -> nn.Module:
    """The submodule at a dotted path; an error that lists near names where there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in module.named_modules() if name]
        from difflib import get_close_matches

        near = get_close_matches(path, names, n=5, cutoff=0.3) or names[:5]
        raise UsageError(
            "there is no such module", where=f"{role}.{path}", found=path, expected=f"a path such as {', '.join(near)}"
        ) from None


def _keep(taps: dict[str, Any], path: str, _module: nn.Module, _args: Any, output: Any) -> None:
    taps[path] = output[0] if isinstance(output, tuple) else output


def _stop(_module: nn.Module, _args: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


def _stay(part: nn.Module, mode: bool = True) -> nn.Module:
    return part
