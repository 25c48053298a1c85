"""Spaces of sub-networks."""

from random import Random

import pytest

from limbeck.core.errors import UsageError
from limbeck.nn.mlp import mlp
from limbeck.nn.space import Space

SPACE = Space({"depth": (2, 3, 4), "a": (3, 4, 6), "b": (8, 16)})


def test_ends_and_number():
    assert SPACE.largest() == {"depth": 4, "a": 6, "b": 16}
    assert SPACE.smallest() == {"depth": 2, "a": 3, "b": 8}
    assert SPACE.count() == 18


def test_draws_follow_the_generator_and_reach_everything():
    draws = [[SPACE.sample(g) for _ in range(200)] for g in (Random(3) for _ in range(2))]
    assert draws[0] == draws[1]
    assert len({tuple(arch.values()) for arch in draws[0]}) == 18
    sandwich = SPACE.sandwich(Random(0), 5)
    assert sandwich[:2] == [SPACE.largest(), SPACE.smallest()]
    assert len(sandwich) == 5


def test_sizes_that_go_together():
    coupled = Space(SPACE.choices, together=[("depth", "a")])
    pairs = {(arch["depth"], arch["a"]) for arch in (coupled.sample(Random(i)) for i in range(60))}
    assert pairs == {(2, 3), (3, 4), (4, 6)}
    assert coupled.count() == 6


def test_stages_of_a_space():
    part = SPACE.within({"depth": (4,), "a": (4, 6)})
    assert part.count() == 4
    assert part.largest() == SPACE.largest()


def test_shares_are_rounded():
    space = Space.of(mlp(4, 36, 20, 3), {"*.channels": (0.3, 0.5, 1.0)}, divisor=8)
    assert space.choices == {"0.channels": (8, 16, 36), "2.channels": (8, 20)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Space({"a": (3, 2)}), "ascend"),
        (lambda: Space({"a": ()}), "ascend"),
        (lambda: Space({"a": (1, 2), "b": (1, 2, 3)}, [("a", "b")]), "together"),
        (lambda: Space({"a": (1, 2)}, [("a", "c")]), "together"),
        (lambda: SPACE.check({"a": 5}), "no sub-network"),
        (lambda: SPACE.check({"c": 5}), "no sub-network"),
        (lambda: SPACE.within({"a": (5,)}), "no sub-network"),
        (lambda: SPACE.within({"c": (5,)}), "no sub-network"),
        (lambda: Space.of(mlp(4, 8, 3), {"*.heads": (2,)}), "no such dimension"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(UsageError, match=words):
        call()
