"""The worlds of the benchmarks of shapes and moving digits are what their pages say, and their measures can tell."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
cells = pytest.importorskip("cells")
shapes = pytest.importorskip("shapes")
digits = pytest.importorskip("moving_digits")


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def of(kind, g, count=16):
    x = getattr(shapes, kind)(200, count, g)
    return x, x[..., :2].norm(dim=2)


def test_points_lie_on_the_surfaces(g):
    x, _ = of("sphere", g)
    assert x.norm(dim=2).std(1).max() < 1e-5
    x, _ = of("box", g)
    assert torch.isclose(x.abs(), x.abs().amax(1, keepdim=True), atol=1e-4).any(2).all()
    x, out = of("cylinder", g)
    side, cap = (torch.isclose(v, v.amax(1, keepdim=True), atol=1e-4) for v in (out, x[..., 2].abs()))
    assert (side | cap).all()
    assert not side.all()
    assert not cap.all()


def test_points_lie_on_a_torus_and_a_cone(g):
    count = 16
    sizes = torch.Generator().manual_seed(0)
    big, small = shapes.between(0.8, 1.2, count, sizes), shapes.between(0.2, 0.4, count, sizes)
    x, out = of("torus", g)
    assert torch.allclose((out - big).square() + x[..., 2].square(), small.square().expand(-1, 200), atol=1e-5)
    assert ((out > big).double().mean() - 0.5 - small.mean() / big.mean() / torch.pi).abs() < 0.02  # more outside
    sizes = torch.Generator().manual_seed(0)
    radius, half = shapes.between(0.7, 1.1, count, sizes), shapes.between(0.7, 1.1, count, sizes)
    x, out = of("cone", torch.Generator().manual_seed(0))
    on_side = torch.isclose(out / radius, (half - x[..., 2]) / (2 * half), atol=1e-4)
    assert (on_side | torch.isclose(x[..., 2], -half.expand(-1, 200))).all()


def test_the_network_of_clouds_knows_no_order(g):
    net = shapes.network()
    for layer in net.net.layers:
        torch.nn.init.normal_(layer.known.weight, std=0.1)
    x, order = torch.randn(2, shapes.POINTS, 3, generator=g), torch.randperm(shapes.POINTS, generator=g)
    t, y = torch.tensor([0.3, 0.9]), torch.tensor([0, 4])
    assert torch.allclose(net(x, t, y)[:, order], net(x[:, order], t, y), atol=1e-5)


def test_chamfer_and_what_neighbours_tell(monkeypatch):
    monkeypatch.setattr(shapes, "pointnet", shapes.PointNet)
    x = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    assert shapes.chamfer(x, x + torch.tensor([0.25, 0, 0])).item() == 0.25
    real, _ = shapes.real(6000)
    again = shapes.drawn(6500, shapes.JUDGED).batch(torch.arange(shapes.JUDGED), 0).x
    fair = shapes.judge(again, 6000)
    assert abs(fair["nearest neighbour"] - 50) < 12
    assert abs(fair["energy"]) < 1
    far = shapes.judge(real + 10, 6000)
    assert far["nearest neighbour"] == 100
    assert far["coverage"] <= 2
    assert far["energy"] > 1000


def test_arms_have_equally_many_backward_passes(monkeypatch):
    monkeypatch.setitem(shapes.SETTINGS, "students", {**shapes.SETTINGS["students"], "passes": 13, "batch": 2})
    net = shapes.network().eval().requires_grad_(False)
    assert {arm: shapes.student(net, arm, 0, 1e-3)[1] for arm in shapes.arms(13)} == dict.fromkeys(shapes.arms(13), 13)


def test_digits_are_placed_and_go_straight_on():
    x, _ = digits.digits("clips")
    whole = digits.placed(x[:1], torch.tensor([[3.0, 1.0]]))
    assert torch.allclose(whole[0, 0, 1:9, 3:11], x[0, 0], atol=1e-6)
    assert whole.sum().item() == pytest.approx(x[0].sum().item(), rel=1e-5)
    half = digits.placed(x[:1], torch.tensor([[3.5, 1.0]]))
    assert torch.allclose(half[0, 0, 1:9, 4:11], (x[0, 0, :, 1:] + x[0, 0, :, :-1]) / 2, atol=1e-6)
    moves = digits.centres(digits.clips(0, 64, bad=False)).diff(dim=1)
    straight = moves.diff(dim=1).norm(dim=2) < 0.15  # no bounce between these frames
    assert straight.double().mean() > 0.3
    assert 0.4 < moves.norm(dim=2).mean() < 1.2


def test_the_parts_of_the_digits_do_not_overlap():
    rows = [set(range(*ends)) for ends in digits.PARTS.values()]
    assert len(set.union(*rows)) == sum(map(len, rows)) == 1797


def test_cells_go_on_and_begin_anew_under_other_settings(tmp_path, capsys):
    calls = []

    def measured():
        calls.append(1)
        return {"value": 3}

    for settings, expected in (({"a": [1]}, 1), ({"a": [1]}, 1), ({"a": [2]}, 2)):
        found = cells.Cells(tmp_path / "found.json", settings)
        assert found("one", measured)["value"] == 3
        assert len(calls) == expected
