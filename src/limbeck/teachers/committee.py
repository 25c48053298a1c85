"""Who of several networks speaks for a slot, and how loudly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import UsageError
from limbeck.data.ids import mix

Choice = Literal["all", "random", "best"]
CHOICES = ("all", "random", "best")


def votes(priors: Sequence[float], temperature: float) -> Tensor:
    r"""Weights of members that sum to one: $w_m = e^{a_m / T} / \sum_k e^{a_k / T}$ (CV-DD, Cui et al. 2025).

    Args:
        priors: How good the data are that each member distils, accuracies in PER CENT: shares would weigh all alike.
        temperature: `T`, above 0.

    Returns:
        `[M]`, fp32.

    Raises:
        UsageError: There are no priors, they are not finite, or the temperature is not above 0.

    Example:
        >>> [round(w, 4) for w in votes([63.0, 65.3], 5.0).tolist()]
        [0.387, 0.613]
    """
    if not priors or not all(math.isfinite(a) for a in priors):
        raise UsageError("these priors make no votes", where="priors", found=list(priors), expected="finite numbers")
    if temperature <= 0:
        raise UsageError("temperature is out of range", where="temperature", found=temperature, expected="above 0")
    return (torch.tensor(priors, dtype=torch.float64) / temperature).softmax(0).float()


def seats(
    slot: int, members: int, count: int, choice: Choice, priors: Sequence[float], seed: int = 0
) -> tuple[int, ...]:
    """The members of a slot, in ascending order.

    Args:
        slot: Its number.
        members: Size of the committee.
        count: Members of a slot.
        choice: `all`: combinations in order, again from the first when they are at an end; `random`: one drawn for each
            slot; `best`: those with the largest priors, for every slot.
        priors: One for each member.
        seed: Of the draws.

    Raises:
        UsageError: There are fewer members than a slot asks for.

    Example:
        >>> [seats(j, 3, 2, "all", [1, 2, 3]) for j in range(4)], seats(0, 3, 2, "best", [1, 3, 2])
        ([(0, 1), (0, 2), (1, 2), (0, 1)], (1, 2))
    """
    if not 1 <= count <= members:
        raise UsageError(
            "a slot asks for more teachers than there are", where="method.members", found=count,
            expected=f"1 to {members}", fix="give --teacher several times, or ask for fewer",
        )  # fmt: skip
    if choice == "best":
        return tuple(sorted(sorted(range(members), key=lambda k: -priors[k])[:count]))
    every = list(combinations(range(members), count))
    if choice == "random":
        slot = int(mix(mix(torch.tensor([seed << 32])) + slot)) & 0x7FFFFFFF
    return every[slot % len(every)]
