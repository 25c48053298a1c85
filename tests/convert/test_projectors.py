import pytest
import torch
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.nn.projectors import Projector, projectors_for


def test_a_linear_projector_is_an_affine_map():
    p = Projector(3, 2)
    x = torch.randn(5, 3)
    (layer,) = p.net
    torch.testing.assert_close(p(x), x @ layer.weight.T + layer.bias)


def test_a_map_projector_maps_every_position_alike():
    maps, vectors = Projector(3, 2, rank=4), Projector(3, 2)
    vectors.net[0].weight.data = maps.net[0].weight.data.squeeze()
    vectors.net[0].bias.data = maps.net[0].bias.data
    x = torch.randn(5, 3, 4, 6)
    torch.testing.assert_close(maps(x), vectors(x.movedim(1, -1)).movedim(-1, 1))


def test_pooling_to_a_divisor_is_the_mean_of_blocks():
    p = Projector(3, 2, rank=4, size=(2, 2))
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(p(x)[0, :, 0, 1], p.net(x)[0, :, :2, 2:].mean((1, 2)))


def test_hidden_layers_are_relu_networks():
    p = Projector(3, 2, hidden=7)
    x = torch.randn(5, 3)
    torch.testing.assert_close(p(x), p.net[2](p.net[0](x).clamp(min=0)))


def test_weights_come_from_the_generator_alone_and_in_the_usual_range():
    state = torch.random.get_rng_state()
    a, b, c = (Projector(16, 400, generator=torch.Generator().manual_seed(s)).net[0].weight for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert 0.24 < a.abs().max() <= 0.25
    assert abs(a.std() - 0.25 / 3**0.5) < 0.005


def test_projectors_find_the_map_where_there_is_one():
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Flatten(), nn.LazyLinear(8)))
    _, s = Role("student", student).features(torch.randn(64, 1, 4, 4), "0", "1.2")
    s = {path: f.detach() for path, f in s.items()}
    true = Projector(4, 6, rank=4, generator=torch.Generator().manual_seed(5)), Projector(8, 12)
    t = {name: p(f).detach() for name, p, f in zip(("stem", "head"), true, s.values(), strict=True)}
    role = Role("projector", projectors_for(s, t, generator=torch.Generator().manual_seed(6)))
    optimizer = torch.optim.LBFGS(role.module.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        projected = role.raw(s)
        value = sum((projected[path] - t[path]).square().mean() for path in t)
        value.backward()
        return value

    before = loss().item()
    optimizer.step(loss)
    assert loss().item() < 1e-4 * before


def test_projectors_of_one_generator_differ():
    f = torch.randn(2, 4)
    projector = projectors_for({"a": f, "b.c": f}, {"x": f, "y": f})
    a, b = (m.net[0].weight for m in projector.values())
    assert not torch.equal(a, b)
    assert set(projector(**{"a": f, "b.c": f})) == {"x", "y"}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 4), (2, 4, 8), r"a -> b(.|\n)*\[2, 4\] and \[2, 4, 8\]"),
        ((2, 5, 4), (2, 6, 8), "number of tokens"),
        ((2,), (2,), "this rank"),
    ],
)
def test_features_that_do_not_match_are_refused(student, teacher, message):
    with pytest.raises(UsageError, match=message):
        projectors_for({"a": torch.zeros(student)}, {"b": torch.zeros(teacher)})


def test_features_come_in_pairs():
    with pytest.raises(UsageError, match="1 of the student, 2 of the teacher"):
        projectors_for({"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)})
