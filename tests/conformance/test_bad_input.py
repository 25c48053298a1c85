"""Models, data and fields that a method cannot work with: one message with exit code 2, before anything is written."""

import pytest
import torch

import limbeck
from limbeck.core.errors import UsageError
from limbeck.nn.mlp import mlp

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 5
WRONG_LABELS = torch.where(torch.arange(40) == 0, 7, Y)

# Method, width of the student's output, data, fields, and words of the message.
TABLE = [
    ("kd", 6, (X, Y), {}, "same classes"),
    ("kd", 5, (X, WRONG_LABELS), {}, "label"),
    ("kd", 5, (X, Y), {"temperature": 0}, "temperature is out of range"),
    ("kd", 5, (X, Y), {"label_weight": 1.5}, "label_weight is out of range"),
    ("kd", 5, (X, Y), {"label_weight": "half"}, "wrong value"),
    ("kd", 5, (X, Y), {"temprature": 2.0}, "unknown field"),
    ("kd", 5, (X * float("nan"), Y), {}, "NaN"),
    ("pld", 6, (X, Y), {}, "same classes"),
    ("pld", 5, X, {}, "needs labels"),
    ("pld", 5, (X, WRONG_LABELS), {}, "label"),
    ("pld", 5, (X, torch.rand(40, 5)), {}, "one class index"),
    ("pld", 5, (X, Y), {"temperature": -1.0}, "temperature is out of range"),
    ("pld", 5, (X, Y), {"top_k": 6}, "top_k is out of range"),
    ("embedding", 4, X, {}, "cannot be compared"),
    ("embedding", 5, X, {"similarity_temperature": 0.0}, "similarity_temperature is out of range"),
    ("embedding", 5, X, {"cosine_weight": 0.0, "similarity_weight": 0.0}, "nothing to learn"),
]


@pytest.mark.parametrize(("method", "width", "data", "fields", "words"), TABLE)
def test_it_is_refused_before_anything_is_written(method, width, data, fields, words, tmp_path):
    student = mlp(6, 8, width)
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(UsageError, match=words) as error:
        limbeck.distill(mlp(6, 16, 5), student, data, method, out=tmp_path / "run", progress="off", **fields)
    assert error.value.exit_code == 2
    assert any((error.value.found, error.value.expected, error.value.fix))
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
