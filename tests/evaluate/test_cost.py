import json
import time

import pytest
import torch
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Roles
from limbeck.evaluate.budget import Passes, as_dict, count_passes, count_role_passes
from limbeck.evaluate.cost import flops, latency, measure, parameters, peak_memory, size_bytes, throughput

MIB = 2**20


class Attention(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_parameters_counts_shared_once_and_frozen_apart():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert parameters(model) == (64 + 16 + 2, 64 + 16)


def test_bytes_counts_dtype_buffers_and_shared_state():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).half()
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.zeros(3))
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert size_bytes(model) == 64 * 2 + 3 * 4


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
def test_bytes_of_a_sparse_tensor_include_its_indices(layout):
    holder = nn.Module()
    holder.register_buffer("weight", getattr(torch.eye(10), layout)())
    indices = {"to_sparse_coo": 2 * 10, "to_sparse_csr": 11 + 10, "to_sparse_csc": 11 + 10}[layout]
    assert size_bytes(holder) == 10 * 4 + indices * 8


def test_costs_of_a_model_without_memory():
    with torch.device("meta"):
        model = nn.Linear(100_000, 100_000)
    assert size_bytes(model) == 4 * (10**10 + 10**5)
    assert flops(model, torch.zeros(2, 100_000, device="meta")) == 2 * 2 * 10**10


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.Linear(16, 8), torch.zeros(5, 16), 2 * 5 * 16 * 8),
        (nn.Conv2d(3, 4, 3, padding=1), torch.zeros(2, 3, 8, 8), 2 * 2 * 64 * 4 * 27),
        (nn.LSTM(16, 8), torch.zeros(5, 2, 16), 2 * 10 * (16 + 8) * 32),
        (Attention(), torch.zeros(2, 4, 5, 8), 2 * (2 * 4 * 5 * 5 * 8) * 2),
        (
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            torch.zeros(2, 5, 16),
            2 * 10 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * (2 * 4 * 5 * 5 * 4) * 2,
        ),
    ],
    ids=["linear", "conv", "lstm", "attention", "encoder layer"],
)
def test_flops_equal_the_closed_form(model, x, expected):
    fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    assert flops(model, x) == expected
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == fused


def test_measuring_changes_nothing_in_the_model():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure(model, torch.randn(8, 4), items=8, repeats=2)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_measure_gathers_every_cost_as_plain_data():
    cost = measure(nn.Linear(64, 32), torch.zeros(16, 64), items=16, repeats=5)
    assert (cost.parameters, cost.trainable, cost.bytes, cost.flops) == (2080, 2080, 8320, 2 * 16 * 64 * 32)
    assert cost.throughput == pytest.approx(16 / cost.latency.median)
    assert json.loads(json.dumps(cost.to_dict()))["latency"]["threads"] == torch.get_num_threads()


def test_latency_is_the_time_of_one_call_after_warm_up():
    calls = []

    def work():
        time.sleep(0.05 if len(calls) < 2 else 0.004)  # slow until warm
        calls.append(None)

    result = latency(work, warmup=2, repeats=11)
    assert len(calls) == 13
    assert 0.004 <= result.p10 <= result.median <= result.p90 <= result.p99
    assert result.median < 0.04
    assert throughput(lambda: time.sleep(0.004), items=10, warmup=0, repeats=3) < 10 / 0.004


def test_latency_needs_a_call():
    with pytest.raises(UsageError, match="at least one timed call"):
        latency(lambda: None, repeats=0)


def test_peak_memory_sees_what_is_freed_again():
    def work():
        torch.ones(96 * MIB, dtype=torch.uint8)

    assert 80 * MIB <= peak_memory(work) <= 140 * MIB
    assert peak_memory(work) >= 80 * MIB  # and again, although the process peaked there before
    assert peak_memory(lambda: None) <= 8 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_costs_on_a_gpu():
    model = nn.Linear(1024, 1024, device="cuda")
    x = torch.zeros(4096, 1024, device="cuda")
    cost = measure(model, x, items=4096)
    assert cost.latency.device.startswith("cuda")
    assert cost.peak_memory >= x.nbytes
    assert peak_memory(lambda: torch.ones(MIB, dtype=torch.uint8, device="cuda"), "cuda") >= MIB


def test_equal_arms_spend_equal_budgets():
    def arm(accumulate):
        student, teacher = nn.Linear(4, 2), nn.Linear(4, 2)
        with count_passes(student=student, teacher=teacher) as budget:
            for _ in range(3):
                x = torch.ones(8, 4)
                loss = (student(x) - teacher(x).detach()).square().mean()
                loss.backward()
            if accumulate:
                student(torch.ones(8, 4))
        student(torch.ones(1, 4))  # after the block: not counted
        return budget

    assert arm(False) == {"student": Passes(3, 3, 24), "teacher": Passes(3, 0, 24)}
    assert arm(False) != arm(True)
    assert as_dict(arm(True))["student"] == {"forward": 4, "backward": 3, "examples": 32}


def test_budget_counts_keyword_calls_and_structured_outputs_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return {"a": self.layer(x), "b": (self.layer(x), None)}

    model = Two()
    with count_passes(model=model) as budget:
        out = model(x=torch.ones(5, 4))
        (out["a"] + out["b"][0]).sum().backward()
    assert budget == {"model": Passes(1, 1, 5)}


def test_passes_of_roles_count_ones_that_stop_early():
    m = Roles(student=nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
    with count_role_passes(m) as budget:
        m.student.upto(torch.ones(5, 4), "0").sum().backward()
        m.student(torch.ones(3, 4))
    assert budget["student"].forward == 2
    assert budget["student"].examples == 8
