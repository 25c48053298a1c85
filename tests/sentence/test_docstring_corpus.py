import random
import string

import pytest

from limbeck.core.errors import UsageError
from limbeck.data import docstrings as corpus
from limbeck.data.docstrings import Corpus, docstrings, key, load_corpus, pair, sentences, split_of, topics

BODY = "The stream is read to its end, one block after the other, and closed."


@pytest.fixture
def library(tmp_path):
    """A small standard library: two modules of each split, and things that must not be read."""
    rng = random.Random(0)
    names = {"train": [], "validation": [], "test": []}
    while min(map(len, names.values())) < 2:
        name = "".join(rng.choices(string.ascii_lowercase, k=6))
        if len(names[split_of(name)]) < 2:
            names[split_of(name)].append(name)
    for package, module in names.values():
        (tmp_path / package).mkdir()
        write(
            tmp_path / package / "__init__.py", f"The {package} package has parts.", f"Count {package} items in a box."
        )
        write(tmp_path / f"{module}.py", f"A {module} module alone.", f"Join {module} strings with a comma.")
    write(tmp_path / "test" / "test_x.py", "Never read this test file.", "Nor this one.")
    write(tmp_path / "site-packages" / "x.py", "Never read this third party file.", "Nor this one here.")
    (tmp_path / "broken.py").write_text("def f(:\n")
    write(
        tmp_path / "effects.py", "This module breaks when it is imported.", "Sum up the effects.", "raise SystemExit\n"
    )
    return tmp_path, names


def write(path, module, function, code=""):
    path.parent.mkdir(exist_ok=True)
    more = f"{BODY} It was {function.lower()[:-1]}ed."
    text = f'"""{module}"""\n{code}\nclass A:\n    def f(self):\n        """{function}\n\n        {more}\n        """\n'
    path.write_text(text)


def test_docstrings_are_read_without_importing(library):
    root, _ = library
    found = list(docstrings(root))
    effects = [(d.name, d.text) for d in found if d.module == "effects"]
    assert effects[0] == ("", "This module breaks when it is imported.")
    assert effects[1][0] == "A.f"
    assert not any("Never" in d.text for d in found)
    assert not any(d.module == "broken" for d in found)


def test_splits_share_no_module_and_no_text(library):
    root, names = library
    found = load_corpus(root=root)
    assert load_corpus(root=root) == found
    for split, modules in names.items():
        assert set(modules) <= set(getattr(found, split).modules)
    check_apart(found)


def check_apart(found: Corpus):
    parts = [getattr(found, name) for name in corpus.SPLITS]
    texts = [{key(t) for t in part.texts} for part in parts]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert set(parts[i].modules).isdisjoint(parts[j].modules)
        assert texts[i].isdisjoint(texts[j])
    for part, own in zip(parts, texts, strict=True):
        assert len(own) == len(part.texts)
        for column in zip(*part.pairs, strict=True):
            assert len({key(t) for t in column}) == len(part.pairs)
        assert all(key(s) not in key(b) for s, b in part.pairs)


def test_a_text_in_two_splits_stays_in_the_held_out_one(library):
    root, names = library
    write(
        root / names["train"][0] / "copied.py",
        "Copy of a held-out module.",
        f"Join {names['test'][1]} strings with a comma.",
    )
    found = load_corpus(root=root)
    shared = f"Join {names['test'][1]} strings with a comma."
    assert shared in found.test.texts
    assert shared not in found.train.texts
    assert shared not in {p.summary for p in found.train.pairs}
    check_apart(found)


def test_a_summary_with_two_bodies_is_no_question(library):
    root, names = library
    path = root / names["test"][0] / "twice.py"
    path.write_text(
        "".join(f'def f{i}():\n    """Close the open box.\n\n    {BODY} {i}{i}{i}\n    """\n' for i in range(2))
    )
    assert "Close the open box." not in {p.summary for p in load_corpus(root=root).test.pairs}


def test_topics_are_read_as_data(library):
    root, _ = library
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text(
        "topics = {'if': 'The if statement decides which branch is taken.'}\n"
    )
    assert list(topics(root)) == ["if"]
    found = load_corpus(root=root)
    assert "The if statement decides which branch is taken." in found.train.texts


def test_packages_add_training_texts_only(library):
    root, _ = library
    plain, more = load_corpus(root=root), load_corpus(["safetensors"], root=root)
    assert (plain.test, plain.validation) == (more.test, more.validation)
    assert len(more.train.texts) > len(plain.train.texts)
    with pytest.raises(UsageError, match="not installed"):
        load_corpus(["no_such_package"], root=root)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no docstrings"):
        load_corpus(root=tmp_path)


def test_twins_and_optional_modules():
    assert split_of("_pyio") == split_of("io")
    assert split_of("_collections_abc") == split_of("collections.abc")
    assert split_of("idlelib.run") == split_of("pydoc_data") == "train"
    shares = [split_of(f"module{i}") for i in range(2000)]
    assert 0.65 < shares.count("train") / 2000 < 0.75
    assert split_of("anything", held_out=0) == "train"


@pytest.mark.parametrize(
    "text",
    [
        "Return the sum.",
        "Two words\n\n" + BODY,
        "Close the stream when done.\n\nShort body here.",
        "Read the stream.\n\n" + BODY + " Read   the STREAM.",
    ],
)
def test_docstrings_that_make_no_pair(text):
    assert pair(text) is None


def test_a_pair_joins_the_summary_and_keeps_the_body():
    assert pair(f"Read all of\nthe stream.\n\n{BODY}\n\n    >>> code") == (
        "Read all of the stream.",
        f"{BODY}\n\n    >>> code",
    )


def test_sentences_do_not_cross_paragraphs():
    found = sentences(
        "One sentence about files here\n\nAnother one (e.g. this) about sockets. It has two parts, really!"
    )
    assert found == [
        "One sentence about files here",
        "Another one (e.g. this) about sockets.",
        "It has two parts, really!",
    ]


def test_the_real_corpus_is_large_and_apart():
    found = load_corpus()
    counts = found.counts()
    assert counts["train"]["texts"] > 8_000
    assert all(counts[name]["pairs"] > 100 for name in ("validation", "test"))
    check_apart(found)
