from dataclasses import dataclass

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import TextSource, load_data
from limbeck.data.text import like_lengths

TEXTS = ["a much longer sentence about cats", "dogs", "two words", "", "the end of all"]


def words(texts, pairs=None):
    """A tokenizer of words: a number for each length."""
    joined = texts if pairs is None else [f"{a} {b}" for a, b in zip(texts, pairs, strict=True)]
    return {"input_ids": [[len(w) for w in t.split()] for t in joined]}


def rows(*values):
    return torch.tensor(values)


def padded(texts):
    lists = words(texts)["input_ids"]
    longest = max(1, *map(len, lists))
    ids = torch.tensor([t + [0] * (longest - len(t)) for t in lists])
    return ids, torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in lists])


@pytest.mark.parametrize("picked", [[0, 1], [4, 3, 2, 1, 0], [3], [1, 3]])
def test_batches_are_padded_to_the_longest(picked):
    batch = TextSource(TEXTS, words).batch(rows(*picked), view=0)
    ids, mask = padded([TEXTS[k] for k in picked])
    assert torch.equal(batch.x["input_ids"], ids)
    assert torch.equal(batch.x["attention_mask"], mask)


def test_left_padding_and_the_tokenizer_s_own_fill():
    class Left:
        pad_token_id, padding_side = 9, "left"

        def __call__(self, texts):
            return words(texts)

    x = TextSource(TEXTS, Left()).batch(rows(4, 2), 0).x
    assert x["input_ids"].tolist() == [[3, 3, 2, 3], [9, 9, 3, 5]]
    assert x["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_labels_lengths_and_subsets():
    source = TextSource(TEXTS, words, torch.tensor([0, 1, 2, 1, 0]), max_length=4)
    assert source.lengths.tolist() == [4, 1, 2, 0, 4]
    part = source.subset([4, 1])
    assert part.texts == ["the end of all", "dogs"]
    assert part.num_classes == 3
    assert part.lengths.tolist() == [4, 1]
    assert torch.equal(part.batch(rows(0, 1), 0).x["input_ids"], source.batch(rows(4, 1), 0).x["input_ids"])
    assert torch.equal(part.ids, source.ids[[4, 1]])
    assert part._tokens.flat is source._tokens.flat


def test_ids_and_fingerprint():
    source = TextSource(TEXTS, words)
    assert torch.equal(TextSource(TEXTS[::-1], words).ids.flip(0), source.ids)
    assert source.fingerprint() == TextSource(TEXTS, words).fingerprint()
    others = [TextSource(TEXTS[::-1], words), TextSource(TEXTS), TextSource(TEXTS, words, max_length=2)]
    assert len({s.fingerprint() for s in (source, *others)}) == 4


def test_pairs():
    source = TextSource([("a b", "c"), ("d", "e f g")], words)
    assert source.lengths.tolist() == [3, 4]


def test_without_a_tokenizer():
    source = TextSource(TEXTS)
    with pytest.raises(UsageError, match="with_tokenizer"):
        source.batch(rows(0), 0)
    assert source.with_tokenizer(words, max_length=1).lengths.max() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "no samples"),
        ((["a", 3],), "3 in row 1"),
        ((["a", "b"], words, [1]), "different lengths"),
        ((["a", "b"], words, [0, -4]), "-4 in row 1"),
        ((["a", "b"], lambda texts: {"input_ids": [[1]]}), "tokenizer's output"),
    ],
)
def test_bad_texts(arguments, message):
    with pytest.raises(UsageError, match=message):
        TextSource(*arguments)


def test_batches_of_like_lengths():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1003,), generator=g)
    order = torch.randperm(1003, generator=g)
    sorted_order = like_lengths(order, lengths, 32, torch.Generator().manual_seed(1))
    assert torch.equal(sorted_order.sort().values, torch.arange(1003))

    def padding(order):
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in order.split(32)) / int(lengths.sum())

    assert padding(sorted_order) < 0.1 < 0.5 < padding(order)
    assert torch.equal(sorted_order, like_lengths(order, lengths, 32, torch.Generator().manual_seed(1)))


def test_a_tokenizer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: k for k, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dogs", "the", "end", "of", "all"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    source = TextSource(TEXTS, tokenizer)
    expected = tokenizer([TEXTS[1], TEXTS[4]], padding=True, return_tensors="pt")
    found = source.batch(rows(1, 4), 0).x
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}
    cut = TextSource(TEXTS, tokenizer, max_length=3).batch(rows(4), 0).x["input_ids"]
    assert cut.tolist() == tokenizer([TEXTS[4]], truncation=True, max_length=3)["input_ids"]
    pairs = TextSource([("dogs", "the end")], tokenizer).batch(rows(0), 0).x["input_ids"]
    assert pairs.tolist() == [tokenizer("dogs", "the end")["input_ids"]]


def test_the_tokenizer_of_a_sentence_encoder_cuts_before_its_marks():
    @dataclass(frozen=True)
    class Marked:
        max_length: int = 8

        def __call__(self, texts):
            return {"input_ids": [[1, *words([t])["input_ids"][0][: self.max_length - 2], 2] for t in texts]}

    assert TextSource(TEXTS, Marked(), max_length=4).batch(rows(0), 0).x["input_ids"].tolist() == [[1, 1, 4, 2]]
    with pytest.raises(UsageError, match="pairs of texts"):
        TextSource([("a", "b")], Marked())


def test_sentences_of_a_text_file(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join([f"Sentence number {k}." for k in range(300)] + ["", "Sentence number 7.  "]))
    data = load_data(path, tokenizer=words)
    assert sum(len(s) for _, s in data.items()) == 300
    assert "Sentence number 7." in [t for _, s in data.items() for t in s.texts]
    assert data.train.lengths.unique().tolist() == [3]
