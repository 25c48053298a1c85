"""The input of a classifier's last linear layer, as models/load.py had it."""

def classifier_path(module: nn.Module) -> str:
    """The dotted path of a classifier's last linear layer, whose input is the model's feature.

    Raises:
        UsageError: There is no linear layer.

    Example:
        >>> classifier_path(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))
        '2'
    """
    paths = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not paths:
        raise UsageError(
            "there is no classifier to take features from", where=type(module).__name__, expected="a linear layer"
        )
    return paths[-1]


def penultimate(role: Role, x: Any) -> tuple[Tensor, Tensor]:
    """A classifier's output and its feature, the input of its last linear layer, in one forward pass.

    Args:
        role: The classifier.
        x: A batch, or a model input.

    Returns:
        The output `[B, C]` and the feature, `[B, D]` for most models.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> logits, feature = penultimate(Role("student", net), torch.ones(2, 8))
        >>> feature.shape, bool((net[2](feature) == logits).all())
        (torch.Size([2, 4]), True)
    """
    seen: list[Tensor] = []
    layer = role.module.get_submodule(classifier_path(role.module))
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        output, _ = role.features(x)
    finally:
        hook.remove()
    if not seen:
        raise UsageError("the last linear layer was not used", where=role.name, fix="let the model end in it")
    return output, seen[-1]

