import copy
from functools import partial

import pytest
import torch
from torch import nn

from limbeck.core.roles import Role
from limbeck.teachers import fingerprint


def conv(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU())


class Renamed(nn.ReLU):
    def _get_name(self):
        return "ReLU"


def scaled(x, by):
    return x * by


def test_equal_models_are_equal():
    net = conv()
    same = [conv(), copy.deepcopy(net), conv().eval(), conv().requires_grad_(False)]
    again = conv(bias=True)
    again.load_state_dict(net.state_dict())
    role = Role("teacher", conv())
    role.freeze()
    assert {fingerprint(m) for m in (net, *same, again, role)} == {fingerprint(net)}
    compiled = torch.compile(conv(), backend="eager")
    assert fingerprint(compiled) == fingerprint(net)


def flip(tensor):
    tensor.view(torch.int32).view(-1)[-1:].bitwise_xor_(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: flip(m[0].weight.data),
        lambda m: flip(m[0].bias.data),
        lambda m: flip(m[1].running_var),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m.half(),
        lambda m: m.register_buffer("extra", torch.zeros(1), persistent=False),
        lambda m: setattr(m[0], "stride", (2, 2)),
        lambda m: m.__setitem__(2, nn.GELU()),
        lambda m: m.__setitem__(2, Renamed()),
        lambda m: m.append(nn.Identity()),
        lambda m: setattr(m[1], "eps", 1e-3),
    ],
)
def test_any_change_changes_it(change):
    net = conv()
    before = fingerprint(net)
    change(net)
    assert fingerprint(net) != before


def test_swapped_parameters_are_seen():
    a = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    b = copy.deepcopy(a)
    b["a"], b["b"] = a["b"], a["a"]
    assert fingerprint(a) != fingerprint(b)


def test_preprocessing_belongs_to_a_role():
    prints = [
        fingerprint(Role("teacher", conv(), p))
        for p in (None, scaled, partial(scaled, by=2), partial(scaled, by=3), nn.ReLU(), nn.BatchNorm2d(3))
    ]
    assert len(set(prints)) == len(prints)


def test_a_transformers_model_is_known_by_its_settings_not_its_place():
    transformers = pytest.importorskip("transformers")

    def bert(**options):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **options
        )
        return transformers.BertModel(config)

    moved = bert()
    moved.config._name_or_path = "elsewhere"
    moved.config.transformers_version = "0"
    assert fingerprint(moved) == fingerprint(bert())
    assert fingerprint(bert(layer_norm_eps=1e-3)) != fingerprint(bert())
    assert fingerprint(bert(is_decoder=True)) != fingerprint(bert())
