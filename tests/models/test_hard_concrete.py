"""Hard-concrete gates and their budget, in closed form."""

import math

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.nn.hard_concrete import Budget, HardConcrete, ramp


@pytest.mark.parametrize(
    ("alpha", "probability"), [(0.0, 0.83182), (math.log(100), 0.99798), (math.log(0.01), 0.04713)]
)
def test_the_chance_to_be_open(alpha, probability):
    gate = HardConcrete(100_000, alpha)
    assert gate.open_probability()[0].item() == pytest.approx(probability, abs=1e-5)
    z = gate.sample(torch.Generator().manual_seed(0))
    assert (z > 0).double().mean().item() == pytest.approx(probability, abs=5e-3)
    full = torch.tensor(alpha - 2 / 3 * math.log(11)).sigmoid().item()  # symmetric: P(z = 1)
    assert (z == 1).double().mean().item() == pytest.approx(full, abs=5e-3)
    assert z.min() >= 0
    assert z.max() <= 1


def test_gates_have_a_gradient_where_they_are_neither_open_nor_shut():
    gate = HardConcrete(1000, 0.0)
    z = gate.sample(torch.Generator().manual_seed(1))
    z.sum().backward()
    between = (z > 0) & (z < 1)
    assert (gate.alpha.grad[between] > 0).all()
    assert gate.alpha.grad[~between].eq(0).all()


def test_evaluation_shuts_the_smallest_and_keeps_the_rest_soft():
    gate = HardConcrete(5)
    gate.alpha.data.copy_(torch.tensor([4.0, -4.0, 3.0, -4.5, 2.0]))
    gone = round(5 - gate.open_probability().sum().item())
    assert gone == 2
    z = gate()
    assert gate.kept().tolist() == [0, 2, 4]
    assert z[[1, 3]].eq(0).all()
    torch.testing.assert_close(z[[0, 2, 4]], (0.8 * gate.alpha[[0, 2, 4]] / (2 / 3)).sigmoid())


def test_the_last_unit_never_goes_and_ties_go_from_the_end():
    gate = HardConcrete(4, math.log(0.01))
    assert gate.kept().tolist() == [0]
    gate.alpha.data.fill_(-1.0)
    assert gate.kept().tolist() == list(range(round(gate.open_probability().sum().item())))


def test_alpha_is_kept_within_its_bounds():
    gate = HardConcrete(2)
    gate.alpha.data.copy_(torch.tensor([90.0, -90.0]))
    gate.clamp_()
    torch.testing.assert_close(gate.alpha.data, torch.tensor([math.log(100), -math.log(100)]))


def test_a_budget_that_is_met_pushes_nobody():
    budget, p = Budget(), torch.tensor(0.6, requires_grad=True)
    budget(p, 0.5).backward()
    assert p.grad == budget.linear.grad == budget.quadratic.grad == 0


def test_a_budget_that_is_missed_pushes_by_the_gap():
    budget, p = Budget(initial=3.0), torch.tensor(0.2, requires_grad=True)
    loss = budget(p, 0.5)
    loss.backward()
    gap = 0.3
    assert loss.item() == pytest.approx(3 * gap + 3 * gap**2)
    assert budget.linear.grad.item() == pytest.approx(gap)  # never below 0: ascent only ever raises the multipliers
    assert budget.quadratic.grad.item() == pytest.approx(gap**2)
    assert p.grad.item() == pytest.approx(-3 - 6 * gap)


def test_the_papers_form_has_a_sign():
    budget = Budget(initial=2.0, variant="paper")
    assert budget(torch.tensor(0.6), 0.5).item() == pytest.approx(2 * 0.1 + 2 * 0.01, abs=1e-6)
    assert budget(torch.tensor(0.4), 0.5).item() == pytest.approx(-2 * 0.1 + 2 * 0.01, abs=1e-6)


def test_the_target_grows_and_stays():
    assert ramp(0.1, 0.7, 0, 30) == 0.1
    assert ramp(0.1, 0.7, 30, 30) == ramp(0.1, 0.7, 99, 30) == pytest.approx(0.7)
    assert ramp(0.1, 0.7, 5, 0) == pytest.approx(0.7)


def test_no_units_no_gates():
    with pytest.raises(UsageError, match="without units"):
        HardConcrete(0)
