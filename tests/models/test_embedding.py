"""What a classifier's last linear layer reads."""

import pytest
import torch
from torch import nn

from limbeck import Batch
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.data import TensorSource
from limbeck.models.embedding import embedding_size, with_embedding
from limbeck.nn.mlp import mlp
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
