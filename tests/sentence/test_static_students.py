import copy

import pytest
import torch
from tiny_encoder import TEXTS, encoder
from torch import nn

from limbeck.convert.record import rebuild
from limbeck.convert.static import StaticTokens, token_shares, token_vectors
from limbeck.core.errors import UsageError


@pytest.mark.parametrize("dense", [0, 8])
def test_a_tokens_vector_is_the_teachers_hidden_state_between_the_marks(tmp_path, dense):
    teacher = encoder(tmp_path, normalise=False, dense=dense)
    found = token_vectors(teacher, batch_size=7)
    row = torch.tensor([[2, 9, 3]])
    hidden = teacher.parts[0]({"input_ids": row, "attention_mask": torch.ones_like(row)})["token_embeddings"][:, 1]
    expected = teacher.parts[2]({"sentence_embedding": hidden})["sentence_embedding"] if dense else hidden
    assert found.shape == (len(teacher.tokenize.tokenizer), dense or 16)
    torch.testing.assert_close(found[9], expected[0], rtol=0, atol=1e-5)


def test_shares_of_tokens_and_weights_by_rarity(tmp_path):
    teacher = encoder(tmp_path)
    student, _ = StaticTokens(TEXTS, rarity=0.1)(teacher)
    share = token_shares(student.tokenize(TEXTS)["input_ids"], len(teacher.tokenize.tokenizer))
    assert share.sum() == pytest.approx(1)
    torch.testing.assert_close(student.parts[0].log_weights.exp(), 0.1 / (0.1 + share))


def test_vectors_are_centred_over_the_texts(tmp_path):
    student, _ = StaticTokens(TEXTS)(encoder(tmp_path))
    vectors = student.parts[0].vectors.detach()
    share = token_shares(student.tokenize(TEXTS)["input_ids"], len(vectors))
    torch.testing.assert_close(share @ vectors, torch.zeros(16), rtol=0, atol=1e-5)
    assert vectors.norm(dim=1).mean() == pytest.approx(1)


def test_special_marks_are_not_added(tmp_path):
    teacher = encoder(tmp_path)
    student, _ = StaticTokens()(teacher)
    assert teacher.tokenize(["open"])["input_ids"] == [[2, 4, 3]]
    assert student.tokenize(["open"])["input_ids"] == [[4]]


def test_word_order_does_not_matter(tmp_path):
    student, _ = StaticTokens(TEXTS)(encoder(tmp_path))
    a, b = student.encode(["open a file", "file a open"])
    torch.testing.assert_close(a, b)


def test_the_record_rebuilds_the_structure_without_running_the_teacher(tmp_path, monkeypatch):
    teacher = encoder(tmp_path)
    student, record = StaticTokens(TEXTS)(teacher)
    monkeypatch.setattr("limbeck.convert.static.token_vectors", None)
    again = rebuild(copy.deepcopy(teacher), [record])
    again.load_state_dict(student.state_dict())
    assert torch.equal(again.encode(TEXTS), student.encode(TEXTS))


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = encoder(tmp_path).train()
    before = copy.deepcopy(teacher.state_dict())
    StaticTokens(TEXTS)(teacher)
    assert teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.tokenize(["open"])["input_ids"] == [[2, 4, 3]]


def test_training_brings_a_static_student_closer_to_its_teacher(tmp_path):
    teacher = encoder(tmp_path)
    student, _ = StaticTokens(TEXTS)(teacher)
    goal, tokens = teacher.encode(TEXTS), student.tokens(TEXTS).padded(torch.arange(len(TEXTS)))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = (1 - (student(**tokens) * goal).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("module", ["linear", "static"])
def test_only_encoders_with_context_become_static(tmp_path, module):
    wrong = nn.Linear(2, 2) if module == "linear" else StaticTokens()(encoder(tmp_path))[0]
    with pytest.raises(UsageError, match="static"):
        StaticTokens()(wrong)


def test_a_rarity_below_zero_is_refused():
    with pytest.raises(UsageError, match="rarity"):
        StaticTokens(rarity=0)
