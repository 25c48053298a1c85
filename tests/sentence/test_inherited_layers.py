from itertools import pairwise

import pytest
import torch
import transformers
from tiny_encoder import TEXTS, encoder
from torch import nn

from limbeck.convert.layers import InheritLayers, choose_layers, find_layers, inherit_layers
from limbeck.core.errors import UsageError
from limbeck.models.sentence import load_encoder

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 6}
TINY = {**SIZES, "vocab_size": 50}
MARKS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
PATCHES = {**SIZES, "image_size": 16, "patch_size": 8}
IDS, MASK = [[2, 7, 8, 9, 3], [2, 9, 3, 1, 1]], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
TEXT = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
IMAGE = {"pixel_values": torch.rand(2, 3, 16, 16)}
MODELS = {
    "Bert": (TINY, TEXT),
    "Roberta": (TINY, TEXT),
    "MPNet": (TINY, TEXT),
    "Electra": ({**TINY, "embedding_size": 16}, TEXT),
    "DistilBert": ({"dim": 16, "n_heads": 2, "hidden_dim": 32, "n_layers": 6, "vocab_size": 50}, TEXT),
    "ModernBert": ({**TINY, **MARKS}, TEXT),
    "ViT": (PATCHES, IMAGE),
    "Dinov2": (PATCHES, IMAGE),
    "Llama": ({**TINY, "num_key_value_heads": 2}, TEXT),
}


def build(name):
    config, inputs = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}Model")(config).eval(), inputs


@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_any_model_runs_saves_and_loads(name, tmp_path):
    model, inputs = build(name)
    student, record = InheritLayers([0, 3, 5])(model)
    assert student.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 6
    student.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = again(**inputs).last_hidden_state, student(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    rebuilt = inherit_layers(build(name)[0], record)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }


@pytest.mark.parametrize("name", ["Bert", "ModernBert", "ViT"])
def test_all_layers_give_the_same_model(name):
    model, inputs = build(name)
    student, _ = InheritLayers(6)(model)
    with torch.no_grad():
        assert torch.equal(student(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_a_student_shares_nothing_with_the_teacher_and_copies_the_right_layers():
    model, _ = build("Bert")
    student, _ = InheritLayers([1, 4])(model)
    assert {p.data_ptr() for p in student.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    for mine, theirs in zip(student.encoder.layer, (model.encoder.layer[1], model.encoder.layer[4]), strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
    assert len(model.encoder.layer) == 6
    assert student.encoder.layer[0].attention.self.config is student.config


def test_removing_layers_that_do_nothing_changes_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    net, x = Net(), torch.randn(2, 4)
    for i in (1, 2):
        nn.init.zeros_(net.blocks[i].weight)
        nn.init.zeros_(net.blocks[i].bias)
    student, record = InheritLayers(2)(net)
    assert record["layers"] == [0, 3]
    assert torch.equal(student(x), net(x))


def test_layers_of_a_sentence_encoder(tmp_path):
    teacher = encoder(tmp_path)
    student, record = InheritLayers(2)(teacher)
    assert record["layers"] == [0, 3]
    student.save(tmp_path / "student")
    torch.testing.assert_close(
        load_encoder(tmp_path / "student").encode(TEXTS), student.encode(TEXTS), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("total", "keep", "rule", "expected"),
    [
        (12, 9, "stride", list(range(9))),
        (12, 6, "stride", [0, 2, 4, 6, 8, 10]),
        (9, 6, "stride", list(range(6))),
        (12, 4, "even", [0, 4, 7, 11]),
        (6, 3, "even", [0, 3, 5]),
        (6, 6, "even", list(range(6))),
        (5, 1, "even", [4]),
        (5, 2, "first", [0, 1]),
        (5, 2, "last", [3, 4]),
    ],
)
def test_rules_for_layers(total, keep, rule, expected):
    assert choose_layers(total, keep, rule) == expected


def test_even_spacing_is_even_for_every_size():
    for total in range(2, 40):
        for keep in range(2, total + 1):
            found = choose_layers(total, keep)
            gaps = [b - a for a, b in pairwise(found)]
            assert (found[0], found[-1]) == (0, total - 1)
            assert max(gaps) - min(gaps) <= 1 <= min(gaps)


@pytest.mark.parametrize("layers", [0, 7, -1, [], [6], [-1], [1, 1], ["1"]])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(UsageError, match="expected"):
        InheritLayers(layers)(build("Bert")[0])


def test_an_unclear_list_of_layers_is_refused_and_can_be_named():
    two = nn.ModuleDict({"a": nn.Sequential(nn.Tanh(), nn.Tanh()), "b": nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh())})
    with pytest.raises(UsageError, match="a, b"):
        find_layers(two)
    with pytest.raises(UsageError, match="none"):
        find_layers(nn.Linear(2, 2))
    assert len(InheritLayers(1, path="b")(two)[0]["b"]) == 1
    with pytest.raises(UsageError, match="no list of layers"):
        InheritLayers(1, path="c")(two)


def test_experts_inside_layers_are_not_layers():
    layer = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))})
    assert find_layers(nn.ModuleDict({"blocks": nn.ModuleList([layer, nn.ModuleDict(layer)])})) == "blocks"


def test_layers_that_a_configuration_cannot_describe_are_refused():
    with pytest.raises(UsageError, match="keep the first layer"):
        InheritLayers([1, 2])(build("ModernBert")[0])
