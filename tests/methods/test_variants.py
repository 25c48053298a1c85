"""Where published programs differ from their papers: each side of `variant`, exactly."""

import pytest
import torch

from limbeck import Roles
from limbeck.core.errors import UsageError
from limbeck.data.condensed import Condensed
from limbeck.data.graphs import Graph, Graphs, motifs
from limbeck.data.slots import Slots
from limbeck.methods.ast.method import AST
from limbeck.methods.ftd.method import FTD
from limbeck.methods.infer.method import INFER
from limbeck.methods.mirage.method import Mirage
from limbeck.nn.convnet import ConvNet
from limbeck.nn.gnn import GNN
from limbeck.nn.mlp import mlp
from limbeck.optim.unroll import flatten
from limbeck.prove import seeded
from limbeck.teachers.trajectories import Segments


def gradients(method):
    """What reaches samples and step size, along an expert that goes straight on."""
    net = seeded(0, lambda: mlp(4, 6, 3))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    m = Roles(teacher=net, student=Condensed(x, torch.arange(6) // 2, step_size=0.1, learn=("x", "step_size")))
    start = flatten([p.detach() for p in net.parameters()])
    way = torch.randn(len(start), generator=torch.Generator().manual_seed(1))
    loss = method.follow(lambda k, e: start + 0.02 * e * way, m, Segments(2, 5).batch(torch.tensor([3]), 0)).loss
    student = m.student.module
    return torch.autograd.grad(loss, (student.x, student.step_size))


def test_the_program_of_tesla_has_half_the_gradient_of_the_samples_and_all_of_the_step_sizes():
    paper, code = (gradients(FTD(form="tesla", student_steps=4, variant=v)) for v in ("paper", "code"))
    torch.testing.assert_close(code[0], paper[0] / 2)
    torch.testing.assert_close(code[1], paper[1])
    assert paper[0].abs().sum() > 0
    for form in ("full", "constant"):
        a, b = (gradients(FTD(form=form, student_steps=4, variant=v)) for v in ("paper", "code"))
        assert a[0].equal(b[0])


def test_experts_of_flat_trajectories():
    paper, code = (FTD(variant=v).expert_training for v in ("paper", "code"))
    assert (paper.gsam_alpha, paper.adaptive, paper.radius) == (0.0, False, 0.01)
    assert (code.gsam_alpha, code.adaptive, code.radius) == (0.4, True, 0.01)
    assert FTD().variant == "code"


def test_the_penalty_of_smooth_experts_is_of_samples_or_of_pixels():
    assert AST(variant="paper").expert_training.norm == "sample"
    assert AST(variant="code").expert_training.norm == "pixel"


def test_a_layer_of_the_third_network_does_not_count():
    nets = [seeded(s, lambda: ConvNet(3, channels=1, size=8, width=4, depth=2, norm="batch")).eval() for s in range(3)]
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) // 2
    m = Roles(**{f"teacher_{i}": net for i, net in enumerate(nets)}, student=Condensed(x, y))
    paper, code = (INFER(operations=(), variant=v) for v in ("paper", "code"))
    m.student = paper.compensated(m.student.module, 3)
    kept, layers = m.student.module.x, [p for p in nets[2].modules() if isinstance(p, torch.nn.BatchNorm2d)]
    slots, found = Slots((torch.arange(3),), units=3), {}
    losses = [method.step(slots, m, slots(0, m.rng())).loss for method in (paper, code)]
    handle = layers[1].register_forward_pre_hook(lambda _, args: found.setdefault("x", args[0]))
    m.teacher_2(kept)
    handle.remove()
    mean, variance = found["x"].mean((0, 2, 3)), found["x"].var((0, 2, 3), unbiased=False)
    left_out = (mean - layers[1].running_mean).norm() + (variance - layers[1].running_var).norm()
    torch.testing.assert_close(losses[0] - losses[1], left_out, rtol=1e-4, atol=1e-5)
    assert left_out > 0.1


def test_sets_are_drawn_by_frequency_or_alike(monkeypatch):
    drawn, data = [], motifs(40)
    for variant in ("paper", "code"):
        small = Mirage(depth=1, threshold=0.5, variant=variant).condense(data)
        batches = small.batches
        monkeypatch.setattr(small, "batches", lambda *how, batches=batches: drawn.append(how[2]) or batches(*how))
        for given in ({}, {"sampling": "frequency"}):
            small.train(GNN("sage", labels=5, classes=2), steps=1, **given)
    assert drawn == ["frequency", "frequency", "uniform", "frequency"]


def test_trees_of_one_node_are_kept_or_dropped():
    pair = Graph(torch.tensor([1, 2]), torch.tensor([[0, 1], [1, 0]]))
    more = Graph(torch.tensor([1, 2, 7]), torch.tensor([[0, 1], [1, 0]]))
    data = Graphs([more, more, pair, pair], torch.tensor([0, 0, 1, 1]))
    paper, code = (Mirage(depth=1, threshold=2, variant=v).condense(data) for v in ("paper", "code"))
    assert 7 in paper.nodes.tolist()
    assert 7 not in code.nodes.tolist()


@pytest.mark.parametrize("method", [FTD, AST, INFER, Mirage])
def test_there_are_two(method):
    with pytest.raises(UsageError, match="variant is out of range"):
        method(variant="both")
