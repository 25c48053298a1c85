"""What a classifier's last linear layer reads."""

import pytest
import torch
from torch import nn

from limbeck import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.data import TensorSource
from limbeck.models.embedding import embedding_layer, embedding_size, readout, with_embedding
from limbeck.nn.mlp import mlp
from limbeck.nn.subspace import row_space
from limbeck.teachers import Cached, collect


def test_stored_embeddings_are_those_of_the_model(tmp_path):
    model, source = mlp(4, 8, 3), TensorSource(torch.rand(6, 4))
    stored = Role("teacher", Cached(collect(model, source, tmp_path / "store", layers=["1"])))
    batch = source.batch(torch.arange(6), 0)
    for one, other in zip(with_embedding(stored, batch), with_embedding(Role("teacher", model), batch), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    assert embedding_size(stored) == embedding_size(Role("teacher", model)) == (8, 3)


def test_outputs_without_a_layer_beside_them_have_no_embedding(tmp_path):
    source = TensorSource(torch.rand(6, 4))
    stored = Role("teacher", Cached(collect(mlp(4, 8, 3), source, tmp_path / "store")))
    with pytest.raises(UsageError, match="not known from stored outputs"):
        with_embedding(stored, source.batch(torch.arange(2), 0))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Softmax(-1), nn.Unflatten(1, (1, 3))), nn.ReLU()]
)
def test_a_model_that_ends_in_something_else_is_refused(model):
    with pytest.raises(UsageError):
        with_embedding(Role("teacher", model), Batch(x=torch.ones(2, 4)))


class Flattened(nn.Module):
    """What the head reads is no layer's output, unless a layer is put there."""

    def __init__(self, named=False):
        super().__init__()
        self.body, self.named, self.head = nn.Conv2d(1, 3, 2), nn.Identity() if named else None, nn.Linear(27, 2)

    def forward(self, x):
        h = self.body(x).flatten(1)
        return self.head(h if self.named is None else self.named(h))


def test_the_layer_whose_output_is_the_embedding():
    x = torch.rand(2, 1, 4, 4)
    dropped = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    path = embedding_layer(Role("teacher", dropped), x)
    assert path in ("2", "3")  # out of training, dropout gives what it is given
    assert dropped.training
    assert embedding_layer(Role("teacher", Flattened(named=True)), x) == "named"
    with pytest.raises(UsageError, match="cannot be stored") as error:
        embedding_layer(Role("teacher", Flattened()), x)
    assert "without stored outputs" in error.value.fix


def test_a_model_of_transformers_has_an_embedding_layer():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    role = Role("teacher", transformers.BertForSequenceClassification(config))
    tokens = {"input_ids": torch.arange(10).view(2, 5)}
    _, taps = role.features(tokens, embedding_layer(role, tokens))
    assert next(iter(taps.values())).shape == (2, 16)


def test_what_a_head_sees_is_found_from_stored_outputs(tmp_path):
    model, source = mlp(4, 8, 3), TensorSource(torch.randn(200, 4))
    store = collect(model, source, tmp_path / "store", layers=["1"], dtype="fp32")
    seen = [row_space(readout(Role("teacher", m), source).double()) for m in (model, Cached(store))]
    torch.testing.assert_close(*(q @ q.T for q in seen), atol=1e-4, rtol=0)
