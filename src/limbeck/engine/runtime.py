"""Where a run is executed: one process that wraps nothing, or many through Lightning Fabric."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.errors import UsageError, require
from limbeck.core.roles import sharded
from limbeck.engine.settings import Engine

State = dict[str, Any]


class Runtime(Protocol):
    """What the engine asks of the machine; `rank` of `world` processes, each on its `device`."""

    rank: int
    world: int
    device: torch.device

    def place(self, module: nn.Module, shard: bool) -> None:
        """Move a module to the device, make it equal on all processes, shard its parameters where asked."""

    def add(self, tensors: list[Tensor]) -> None:
        """Sum tensors over the processes, in place."""

    def gather(self, value: Any) -> list[Any]:
        """A plain value of each process, in the order of ranks."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def model_state(self, module: nn.Module) -> State:
        """The whole state of a module."""

    def load_model(self, module: nn.Module, state: State) -> None:
        """Load a whole state."""

    def optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        """The whole state of an optimizer over a module."""

    def load_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Load a whole optimizer state."""


class Plain:
    """One process; wraps nothing."""

    rank, world = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, module: nn.Module, shard: bool) -> None:
        module.to(self.device)

    def add(self, tensors: list[Tensor]) -> None:
        return

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return

    def model_state(self, module: nn.Module) -> State:
        return module.state_dict()

    def load_model(self, module: nn.Module, state: State) -> None:
        module.load_state_dict(state)

    def optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        return optimizer.state_dict()

    def load_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
        optimizer.load_state_dict(state)


class Distributed(Plain):
    """Many processes and machines, started by Lightning Fabric.

    Gradients are summed by the engine when a role's update is due, not by a wrapper around the module: methods keep calling
    their modules directly, alternating updates need no special care, and frozen roles are left alone. Sharded roles use
    PyTorch's `fully_shard`, which keeps the module's class.
    """

    def __init__(self, engine: Engine) -> None:
        fabric = require("lightning.fabric", extra="scale").Fabric(
            accelerator="cpu" if engine.device == "cpu" else "auto", devices=engine.processes, strategy="ddp"
        )
        fabric.launch()
        super().__init__(fabric.device)
        self.fabric = fabric
        self.rank, self.world = fabric.global_rank, fabric.world_size

    def place(self, module: nn.Module, shard: bool) -> None:
        import torch.distributed as dist

        if sharded(module):
            return
        module.to(self.device)
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for child in module.children():
                if any(p.requires_grad for p in child.parameters()):
                    fully_shard(child, mesh=mesh)
            fully_shard(module, mesh=mesh)

    def add(self, tensors: list[Tensor]) -> None:
        import torch.distributed as dist

        # One flat tensor per dtype: many small collectives cost more than a copy.
        for dtype in {t.dtype for t in tensors}:
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in same])
            torch._foreach_copy_(same, [part.view_as(t) for part, t in zip(parts, same, strict=True)])

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.fabric.barrier()

    def model_state(self, module: nn.Module) -> State:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        if not sharded(module):
            return module.state_dict()
        return dict(get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))

    def load_model(self, module: nn.Module, state: State) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        if not sharded(module):
            module.load_state_dict(state)
        else:
            set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))

    def optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        if not sharded(module):
            return optimizer.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_optimizer_state_dict(module, optimizer, options=options))

    def load_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        if not sharded(module):
            optimizer.load_state_dict(state)
        else:
            set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))


def make_runtime(engine: Engine) -> Runtime:
    """The runtime that the settings ask for.

    Raises:
        UsageError: A GPU was asked for and there is none, or roles are to be sharded over one process.
    """
    if engine.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            "a GPU was asked for and torch sees none",
            where="engine.device",
            found=engine.device,
            expected="cpu or auto on this machine",
            fix="set engine.device=auto, or install a CUDA build of torch",
        )
    if engine.processes > 1:
        return Distributed(engine)
    if engine.shard:
        raise UsageError("one process has nothing to shard over", where="engine.shard", fix="set engine.processes")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Plain(torch.device(auto if engine.device == "auto" else engine.device))
    except RuntimeError as error:
        raise UsageError("unknown device", where="engine.device", found=engine.device, expected=str(error)) from None
