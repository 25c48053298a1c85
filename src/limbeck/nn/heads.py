"""The last layer of a classifier."""

from torch import nn

from limbeck.core.errors import UsageError


def find_head(module: nn.Module) -> str:
    """The dotted path of a classifier's last linear layer; empty where the module is that layer.

    Raises:
        UsageError: There is no linear layer.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        '2'
    """
    paths = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not paths:
        raise UsageError(
            "this model has no linear layer",
            where=type(module).__name__,
            expected="a classifier that ends in torch.nn.Linear",
            fix="wrap the model: its features, then a linear layer",
        )
    return paths[-1]


def head_of(module: nn.Module) -> nn.Linear:
    """A classifier's last linear layer.

    Example:
        >>> head_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).out_features
        3
    """
    head = module.get_submodule(find_head(module))
    assert isinstance(head, nn.Linear)
    return head
