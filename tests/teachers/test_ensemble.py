import copy

import pytest
import torch
from store_programs import Points, net
from torch import nn

from limbeck.core.errors import UsageError
from limbeck.core.roles import Role, Roles
from limbeck.teachers import Ensemble, collect, fingerprint

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def members(n=3, classes=4):
    torch.manual_seed(4)
    return [nn.Linear(3, classes) for _ in range(n)]


def test_the_mean_of_probabilities():
    models = members()
    weights = [1.0, 2.0, 5.0]
    out = Ensemble(models, weights=weights)(X)
    mean = sum(w / 8 * m(X).softmax(-1) for m, w in zip(models, weights, strict=True))
    torch.testing.assert_close(out.exp(), mean)
    torch.testing.assert_close(out.logsumexp(-1), torch.zeros(7))


def test_the_mean_of_logits():
    models = members()
    torch.testing.assert_close(Ensemble(models, average="logits")(X), sum(m(X) for m in models) / 3)


def test_one_member_is_itself():
    (model,) = members(1)
    torch.testing.assert_close(Ensemble([model])(X), model(X).log_softmax(-1))
    torch.testing.assert_close(Ensemble([model], "logits")(X), model(X))


def test_probabilities_are_stable_for_sure_members():
    sure = nn.Linear(3, 4)
    nn.init.zeros_(sure.weight)
    sure.bias.data = torch.tensor([1e4, 0.0, 0.0, -1e4])
    out = Ensemble([sure, sure])(X)
    torch.testing.assert_close(out[0], torch.tensor([0.0, -1e4, -1e4, -2e4]))


def test_members_have_their_own_preprocessing():
    a, b = members(2)
    out = Ensemble([a, b], "logits", preprocess=[None, lambda x: 2 * x - 1])(X)
    torch.testing.assert_close(out, (a(X) + b(2 * X - 1)) / 2)


def test_class_maps_reorder_and_select():
    a, b = members(1, 3)[0], members(1, 5)[0]
    out = Ensemble([a, b], "logits", class_maps=[None, [4, 0, 2]])(X)
    torch.testing.assert_close(out, (a(X) + b(X)[:, [4, 0, 2]]) / 2)


def test_members_stay_frozen_and_the_ensemble_trains_nothing():
    models = [nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9)) for _ in range(2)]
    ensemble = Ensemble(models).train()
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert not any(part.training for member in models for part in member.modules())
    assert torch.equal(ensemble(X), ensemble(X))
    assert set(ensemble.state_dict()) == {f"members.{i}.0.{p}" for i in (0, 1) for p in ("weight", "bias")}


def test_gradients_pass_through_to_the_input():
    x = X.clone().requires_grad_()
    Ensemble(members())(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_it_is_a_role_and_can_be_stored_and_copied(tmp_path):
    data, models = Points(), [net(), net(6)]
    m = Roles(teacher=Ensemble(models))
    batch = data.batch(torch.arange(5), 1)
    store = collect(m.teacher, data, tmp_path, dtype="fp32")
    torch.testing.assert_close(store.read(batch.id, batch.view)["output"], m.teacher(batch))
    twin = copy.deepcopy(m.teacher.module)
    assert torch.equal(twin(batch), m.teacher(batch))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in m.teacher.module.parameters()}
    assert twin.roles[0].module is twin.members[0]
    assert fingerprint(twin) == fingerprint(m.teacher.module)
    assert fingerprint(Ensemble(models, "logits")) != fingerprint(Ensemble(models))
    assert fingerprint(Ensemble(models, weights=[1, 2])) != fingerprint(Ensemble(models))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modules": []}, "modules(.|\n)*one member or more"),
        ({"average": "mean"}, "average(.|\n)*probabilities or logits"),
        ({"weights": [1.0]}, "weights(.|\n)*1 items(.|\n)*2, one per member"),
        ({"weights": [1.0, 0.0]}, "numbers above 0"),
        ({"weights": [1.0, float("nan")]}, "numbers above 0"),
        ({"preprocess": [None]}, "preprocess(.|\n)*2, one per member"),
        ({"class_maps": [None]}, "class_maps(.|\n)*2, one per member"),
        ({"class_maps": [None, [-1]]}, "class_maps(.|\n)*below 0"),
        ({"modules": [1, 2]}, "not a module"),
    ],
)
def test_members_that_make_no_ensemble(given, message):
    with pytest.raises(UsageError, match=message):
        Ensemble(**({"modules": members(2)} | given))


def test_members_that_disagree_are_refused_when_called():
    with pytest.raises(UsageError, match=r"\[7, 3\], \[7, 5\](.|\n)*class_maps"):
        Ensemble([nn.Linear(3, 3), nn.Linear(3, 5)])(X)
    with pytest.raises(UsageError, match=r"class_maps\[1\](.|\n)*found: 5(.|\n)*0 to 4"):
        Ensemble([nn.Linear(3, 1), nn.Linear(3, 5)], class_maps=[None, [5]])(X)


def test_role_wraps_nothing_extra():
    ensemble = Ensemble(members())
    torch.testing.assert_close(Role("teacher", ensemble)(X), ensemble(X))
