"""A sentence encoder of a few thousand parameters, built the way real ones are."""

import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from limbeck.models.sentence import SentenceEncoder, from_sentence_transformer

WORDS = ["open", "close", "read", "write", "a", "the", "file", "socket", "for", "reading", "writing", "and", "then"]
WORDS += ["again", "bytes", "text", "line"]
TEXTS = ["open a file for reading", "close", "read the text and then write bytes again", "write a line", "a socket"]


def folder(path, layers=4, normalise=True, dense=0):
    """Write a tiny BERT encoder to a folder of sentence-transformers, and return the folder."""
    vocabulary = {
        w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"abcdefghijklmnopqrstuvw"[1:]])
    }
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **marks)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(path / "bert")
    tokenizer.save_pretrained(path / "bert")
    transformer = models.Transformer(str(path / "bert"))
    parts = [transformer, models.Pooling(16, pooling_mode="mean")]
    parts += [models.Dense(16, dense, activation_function=torch.nn.Tanh())] if dense else []
    parts += [models.Normalize()] if normalise else []
    SentenceTransformer(modules=parts, device="cpu").save(str(path / "encoder"))
    return path / "encoder"


def encoder(path, **options) -> SentenceEncoder:
    return from_sentence_transformer(SentenceTransformer(str(folder(path, **options)), device="cpu")).eval()
