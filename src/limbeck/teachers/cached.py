"""Stored outputs in the place of the teacher that made them."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limbeck.core.batch import Batch
from limbeck.teachers.store import OUTPUT, OutputStore
from limbeck.teachers.topk import TopK


class Cached(nn.Module):
    """Stands in for the teacher role: looks up a batch's outputs by its sample ids and views.

    Outputs come in the dtype that the teacher returned, on the device of the batch; of top-k stores as dense logits with the
    rest spread evenly (see `TopK.dense`). Stored layers are submodules of the same path, so that `Role.features` finds them.
    The augmentation must be a function of (sample, view), as that of a `Source` is.

    Args:
        store: The store; `store.check(teacher=..., data=...)` says whether it fits.

    Example:
        ```python
        m = Roles(teacher=Cached(collect(resnet, data.train, "outputs", views=4)), student=student)
        logits = m.teacher(batch)
        ```
    """

    takes_batch = True

    def __init__(self, store: OutputStore) -> None:
        super().__init__()
        self.store = store
        self.taps = [name for name in store.header.layers if name != OUTPUT]
        for path in sorted(self.taps):
            _place(self, path)

    def forward(self, batch: Batch) -> Tensor:
        """The stored output `[B, ...]` for `batch.id` and `batch.view`."""
        tapped = [path for path in self.taps if self.get_submodule(path)._forward_hooks]
        stored = self.store.read(batch.id, batch.get("view", 0), layers=[OUTPUT, *tapped])
        device = next((t.device for t in tree_leaves(batch.get("x")) if isinstance(t, Tensor)), batch.id.device)
        outputs = {name: self._dense(name, value, device) for name, value in stored.items()}
        for path in tapped:
            self.get_submodule(path)(outputs[path])
        return outputs[OUTPUT]

    def _dense(self, name: str, value: Tensor | TopK, device: torch.device) -> Tensor:
        dtype = getattr(torch, self.store.header.layers[name].dtype)
        if isinstance(value, TopK):
            return value.map(partial(_move, device=device)).dense().to(dtype)
        return _move(value, device).to(dtype)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from other memory waits
    return tensor.to(device, non_blocking=True)


def _place(module: nn.Module, path: str) -> None:
    """Make a submodule at a dotted path that returns what it is given."""
    for name in path.split("."):
        if name not in module._modules:
            module.add_module(name, nn.Identity())
        module = module.get_submodule(name)
