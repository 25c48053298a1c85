"""Heads with several outputs per class: what they answer, what they are read as, and how they are built again."""

import copy

import pytest
import torch
from torch import nn

from limbeck.convert.record import load_student, save_student
from limbeck.convert.subclasses import AddSubclasses, SubclassHead, add_subclasses, subclass_path
from limbeck.core.errors import UsageError
from limbeck.models.load import num_classes
from limbeck.nn.mlp import mlp
from limbeck.prove import seeded

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def net(seed=0):
    return seeded(seed, lambda: mlp(4, 8, 3))


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("model", [net(), nn.Linear(4, 3)], ids=["nested", "alone"])
def test_the_model_answers_as_before_and_is_not_changed(model, tau):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wide, _ = AddSubclasses(4, tau)(model)
    torch.testing.assert_close(wide(X), model(X))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {id(p) for p in wide.parameters()}.isdisjoint(map(id, model.parameters()))


def test_without_a_bias_probabilities_stay():
    model = nn.Linear(4, 3, bias=False)
    torch.testing.assert_close(AddSubclasses(4)(model)[0](X).softmax(1), model(X).softmax(1))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_answer_is_the_logarithm_of_summed_probabilities(tau):
    head = SubclassHead(4, classes=3, size=5, temperature=tau)
    nn.init.normal_(head.subclasses.weight)
    nn.init.normal_(head.subclasses.bias)
    summed = (head.subclasses(X) / tau).softmax(1).unflatten(1, (3, 5)).sum(2)
    torch.testing.assert_close((head(X) / tau).log_softmax(1), summed.log())
    assert torch.equal(head(X).argmax(1), summed.argmax(1))


@pytest.mark.parametrize("model", [net(), nn.Linear(4, 3)], ids=["nested", "alone"])
def test_its_classes_are_counted_not_its_subclasses(model):
    assert num_classes(AddSubclasses(5)(model)[0]) == 3


def test_a_model_of_transformers_keeps_its_classes():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).eval()
    wide, record = AddSubclasses(3)(model)
    tokens = {"input_ids": torch.arange(10).view(2, 5)}
    torch.testing.assert_close(wide(**tokens).logits, model(**tokens).logits)
    assert (num_classes(wide), record["path"], subclass_path(wide)) == (2, "classifier", "classifier.subclasses")


def test_it_is_saved_and_built_again(tmp_path):
    wide, record = AddSubclasses(2, temperature=3.0)(net())
    nn.init.normal_(wide[2].subclasses.weight)
    save_student(tmp_path, wide, [record])
    assert torch.equal(load_student(tmp_path, net(seed=3))(X), wide.eval()(X))


@pytest.mark.parametrize("model", [net(), nn.Linear(4, 3)], ids=["nested", "alone"])
def test_subclasses_are_kept_where_there_are_as_many_already(model, tmp_path):
    wide, first = AddSubclasses(2)(model)
    again, record = AddSubclasses(2, temperature=3.0)(wide)
    one, other = (subclass_path(m) for m in (wide, again))
    assert torch.equal(wide.get_submodule(one).weight, again.get_submodule(other).weight)
    temperatures = [m.get_submodule(one.removesuffix("subclasses").rstrip(".")).temperature for m in (wide, again)]
    assert temperatures == [1.0, 3.0]
    save_student(tmp_path, again, [first, record])
    assert torch.equal(load_student(tmp_path, copy.deepcopy(model))(X), again(X))
    with pytest.raises(UsageError, match="another number of subclasses") as error:
        AddSubclasses(3)(wide)
    assert error.value.fix == "set subclasses=2"


def test_the_record_of_another_model_is_refused():
    _, record = AddSubclasses(2)(net())
    with pytest.raises(UsageError, match="another head"):
        add_subclasses(nn.Linear(4, 3), record)


def test_a_model_without_subclasses_is_refused():
    with pytest.raises(UsageError, match="no subclasses"):
        subclass_path(net())
    with pytest.raises(UsageError, match="subclasses are out of range"):
        AddSubclasses(0)
