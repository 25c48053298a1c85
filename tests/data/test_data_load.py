import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from limbeck.core.errors import UsageError
from limbeck.data import Data, DatasetSource, TensorSource, TextSource, load_data
from limbeck.data.build import as_source

SHARED = os.environ.get("LIMBECK_DATA")
shared = pytest.mark.skipif(not SHARED, reason="LIMBECK_DATA is not set")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def sizes(data):
    return {name: len(source) for name, source in data.items()}


def test_csv_with_names(tmp_path):
    lines = "\n".join(f'{k},"a text, number {k}",{"pos" if k % 2 else "neg"}' for k in range(100))
    data = load_data(write(tmp_path / "a.csv", "id,Text,Label\n" + lines), validation=0, test=0)
    assert sizes(data) == {"train": 100}
    assert data.classes == ("neg", "pos")
    assert data.train.texts[:2] == ["a text, number 0", "a text, number 1"]
    assert data.train.labels.tolist() == [0, 1] * 50


def test_csv_of_numbers(tmp_path):
    lines = "\n".join(f"{k / 8},{k},{k % 3}" for k in range(30))
    data = load_data(write(tmp_path / "a.csv", "width,height,target\n" + lines), validation=0, test=0)
    assert torch.equal(data.train.x, torch.stack([torch.arange(30) / 8, torch.arange(30).float()], 1))
    assert data.num_classes == 3
    only = load_data(tmp_path / "a.csv", features=["height"], label="width", validation=0, test=0)
    assert only.train.x.shape == (30, 1)
    assert only.train.labels.dtype == torch.float32
    assert only.num_classes is None


def test_tsv_without_names_keeps_quotes(tmp_path):
    text = "\n".join(f"\"say it {k} ' times\t{k % 2}" for k in range(40))
    data = load_data(write(tmp_path / "a.tsv", text), validation=0, test=0)
    assert data.train.texts[3] == "\"say it 3 ' times"
    assert data.train.labels.sum() == 20
    named = load_data(tmp_path / "a.tsv", columns=["phrase", "mood"], text="phrase", label="mood", validation=0, test=0)
    assert torch.equal(named.train.ids, data.train.ids)


def test_folder_of_named_files(tmp_path):
    for name, count in [("train-0", 20), ("train-1", 10), ("dev", 4), ("test", 3), ("unlabelled", 5)]:
        label = name != "unlabelled"
        text = "text,label\n" if label else "text\n"
        write(tmp_path / f"{name}.csv", text + "".join(f"{name} {k}{f',{k % 2}' * label}\n" for k in range(count)))
    data = load_data(tmp_path)
    assert sizes(data) == {"train": 30, "validation": 4, "test": 3, "unlabelled": 5}
    assert data.unlabelled.labels is None


def test_jsonl(tmp_path):
    lines = "\n".join(f'{{"x": [{k}, 0.5], "y": {k % 2}}}' for k in range(10))
    data = load_data(write(tmp_path / "a.jsonl", lines), validation=0, test=0)
    assert data.train.x.tolist()[3] == [3, 0.5]
    pairs = "\n".join(f'{{"premise": "p{k}", "hypothesis": "h{k}", "label": "{"yn"[k % 2]}"}}' for k in range(10))
    data = load_data(write(tmp_path / "b.jsonl", pairs), validation=0, test=0)
    assert data.train.texts[1] == ("p1", "h1")
    assert data.classes == ("n", "y")


def test_labels_of_all_minus_one_are_no_labels(tmp_path):
    write(tmp_path / "train.csv", "text,label\n" + "".join(f"t{k},{k % 2}\n" for k in range(30)))
    write(tmp_path / "test.csv", "text,label\n" + "".join(f"u{k},-1\n" for k in range(3)))
    data = load_data(tmp_path, validation=0)
    assert data.test.labels is None
    assert data.train.num_classes == 2


def test_classes_can_be_given(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"t{k},{'ab'[k % 2]}\n" for k in range(10)))
    data = load_data(path, classes=["b", "a", "c"], validation=0, test=0)
    assert data.train.labels.tolist() == [1, 0] * 5
    assert data.num_classes == 3


def test_parquet_of_numbers_and_texts(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    vectors = [[float(k), 1.0, 2.0] for k in range(20)]
    pq.write_table(pa.table({"x": vectors, "label": [k % 4 for k in range(20)]}), tmp_path / "v.parquet")
    data = load_data(tmp_path / "v.parquet", validation=0, test=0)
    assert data.train.x.shape == (20, 3)
    assert data.num_classes == 4
    names = pa.array(["dog", "cat"] * 10).dictionary_encode()
    pq.write_table(pa.table({"sentence": [f"s{k}" for k in range(20)], "label": names}), tmp_path / "t.parquet")
    data = load_data(tmp_path / "t.parquet", validation=0, test=0)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [1, 0] * 10


def test_hugging_face_data_sets(tmp_path):
    hub = pytest.importorskip("datasets")
    features = hub.Features({"text": hub.Value("string"), "label": hub.ClassLabel(names=["bad", "good"])})
    made = hub.Dataset.from_dict({"text": [f"t{k}" for k in range(40)], "label": [0, 1] * 20}, features=features)
    splits = hub.DatasetDict({"train": made, "valid": made.select(range(4))})
    splits.save_to_disk(str(tmp_path / "saved"))
    for spec in (f"hf:{tmp_path / 'saved'}", tmp_path / "saved", splits):
        data = load_data(spec)
        assert sizes(data) == {"train": 40, "validation": 4}
        assert data.classes == ("bad", "good")
        assert data.train.texts[3] == "t3"
    items = made.map(lambda row: {"input_ids": [len(row["text"])] * 3}, remove_columns=["text"]).with_format("torch")
    batch = DatasetSource(items).batch(torch.tensor([1, 2]), 0)
    assert batch.x.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert batch.y.tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"(?s)cannot be loaded.*hf:no-such.*save_to_disk"):
        load_data("hf:no-such/data-set")


def test_functions_in_files_and_modules(tmp_path, monkeypatch):
    code = (
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def points():\n    return TensorDataset(torch.rand(200, 2), torch.arange(200) % 2)\n"
        "def splits():\n    return {'train': points(), 'test': points()}\n"
        "def broken():\n    return 3\n"
    )
    path = write(tmp_path / "my_points.py", code)
    assert sum(sizes(load_data(f"{path}:points")).values()) == 200
    monkeypatch.chdir(tmp_path)
    assert sizes(load_data("my_points:splits")) == {"train": 200, "test": 200}
    with pytest.raises(UsageError, match="found: int"):
        load_data("my_points.py:broken")
    with pytest.raises(UsageError, match=r"(?s)found: point.*expected: points"):
        load_data("my_points.py:point")
    with pytest.raises(UsageError, match="no such Python file"):
        load_data("nowhere.py:points")
    with pytest.raises(UsageError, match="there is no such module"):
        load_data("nowhere_at_all:points")


def test_objects():
    x, y = torch.rand(100, 3), torch.arange(100) % 2
    source = TensorSource(x, y)
    data = Data(train=source)
    assert load_data(data) is data
    assert as_source(source) is source
    assert list(load_data({"train": source, "test": (x, y)})) == ["train", "test"]
    for value in (source, (x, y), TensorDataset(x, y), {"x": x, "y": y}, DataLoader(TensorDataset(x, y), batch_size=7)):
        divided = load_data(value, validation=0.2, test=0)
        assert list(divided) == ["train", "validation"]
        assert divided.num_classes == 2
    arrays = load_data({"x": x.numpy(), "y": y.numpy()}, validation=0, test=0)
    assert torch.equal(arrays.train.ids, source.ids)
    assert "x" in load_data({"input_ids": y, "attention_mask": y}, validation=0, test=0).train.batch(
        torch.tensor([0]), 0
    )


def test_own_sources_are_divided_too():
    class Own:
        ids, views = torch.arange(50), 1

        def __len__(self):
            return 50

        def batch(self, rows, view):
            return TensorSource(torch.arange(50.0), ids=self.ids).batch(rows, view)

        def fingerprint(self):
            return "own"

    data = load_data(Own())
    assert data.test.batch(torch.tensor([0]), 0).x.tolist() == data.test.ids[:1].tolist()


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", "", {}, "no samples"),
        ("a.csv", "text,label\n", {}, "no samples"),
        ("a.csv", 'text,label\n\n"a\nb",0\nb\n', {}, r"(?s)another number of fields.*line 5.*expected: 2"),
        ("a.csv", "phrase,mood\na,0\nb,1\n", {}, r"(?s)no column.*phrase \(text\), mood \(integer\).*text="),
        (
            "a.csv",
            "text,label\na,0\nb,1\n",
            {"label": "mood"},
            r"(?s)no column 'mood'.*text \(text\), label \(integer\)",
        ),
        ("a.csv", "text,label\na,0\nb,-3\n", {}, r"(?s)label is out of range.*-3 in row 1"),
        ("a.csv", "text,label\na,0\nb,3\n", {"classes": ["p", "q"]}, r"(?s)3 in row 1.*0 to 1"),
        ("a.csv", "text,label\na,x\nb,z\n", {"classes": ["x", "y"]}, r"(?s)'z' in row 1.*x, y"),
        ("a.csv", "text,label\na,1\nb,1\n", {}, "one class only"),
        ("a.csv", "w,label\n1,0\nnan,1\n", {}, r"(?s)missing, NaN.*a\.csv: w.*row 1"),
        ("a.csv", "w,label\n1,0\n,1\n", {}, r"(?s)missing, NaN.*row 1"),
        ("a.csv", "text,score\na,0.5\nb,nan\n", {}, r"(?s)NaN.*row 1"),
        ("a.csv", "text,text\na,b\n", {}, "same name"),
        ("a.jsonl", '{"text": "a"}\nnothing\n', {}, r"(?s)not JSON.*line 2"),
        ("a.jsonl", "[1]\n", {}, r"(?s)no object.*line 1"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', {}, r"(?s)not a text.*None in row 1"),
        ("a.txt", "\n \n", {}, "no lines with text"),
        ("a.parquet", "this is no parquet", {}, "not a whole parquet file"),
        ("a.xlsx", "", {}, r"(?s)not read.*\.csv"),
        ("a.csv", "text\na\nb\n", {"txt": "text"}, r"(?s)unknown field.*data\.txt.*expected: text"),
        ("a.csv", "text\na\nb\n", {"validation": 0.7, "test": 0.4}, "validation is out of range"),
        ("a.csv", "text\na\nb\n", {"image_size": 0}, "image_size is out of range"),
    ],
)
def test_bad_files(tmp_path, name, text, options, message):
    pytest.importorskip("pyarrow")
    with pytest.raises(UsageError, match=message):
        load_data(write(tmp_path / name, text), **options)


def test_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(UsageError, match="UTF-8"):
        load_data(tmp_path / "a.csv")


def test_splits_with_different_columns(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,0\nb,1\n"), write(tmp_path / "test.csv", "phrase,label\na,0\n")
    with pytest.raises(UsageError, match=r"(?s)different columns.*test\.csv.*text: no such column"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("digit", "digits"),
        ("no/such/folder", "hf:NAME"),
        (3, "found: int"),
        (iter(()), "map-style"),
        (None, "NoneType"),
    ],
)
def test_unknown_specs(spec, near):
    with pytest.raises(UsageError, match=near):
        load_data(spec)


def test_near_paths_are_listed(tmp_path):
    write(tmp_path / "sentences.txt", "a")
    with pytest.raises(UsageError, match=r"expected: .*sentences\.txt"):
        load_data(tmp_path / "sentence.txt")


@shared
def test_cifar10():
    pytest.importorskip("torchvision")
    data = load_data(Path(SHARED) / "cifar10", seed=1)
    assert sum(sizes(data).values()) == 25_000
    assert len(data.test) == 5_000
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    batch = data.train.batch(torch.arange(8), 0)
    assert batch.x.shape == (8, 3, 32, 32)
    assert not torch.equal(batch.x, data.train.batch(torch.arange(8), 1).x)
    assert torch.equal(batch.x, data.train.batch(torch.arange(8), 0).x)
    assert len(set(data.train.ids.tolist()) & set(data.validation.ids.tolist())) == 0


@shared
def test_sst2_and_stsb():
    data = load_data(Path(SHARED) / "sst2")
    assert sizes(data) == {"train": 6920, "validation": 872, "test": 1821}
    assert data.num_classes == 2
    assert isinstance(data.train, TextSource)
    pairs = load_data(Path(SHARED) / "stsb")
    assert sizes(pairs) == {"train": 5749, "validation": 1500}
    assert pairs.train.texts[0] == ("A plane is taking off.", "An air plane is taking off.")
    assert (float(pairs.train.labels.min()), float(pairs.train.labels.max())) == (0.0, 5.0)


@shared
def test_files_without_a_fitting_column():
    with pytest.raises(UsageError, match=r"audio \(other\), digit \(integer\), speaker \(text\)"):
        load_data(Path(SHARED) / "fsdd")
    with pytest.raises(UsageError, match=r"0 \(text\), 1 \(text\)"):
        load_data(Path(SHARED) / "ncbi-disease")


def test_a_folder_with_the_name_of_embedded_data_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iris").mkdir()
    with pytest.raises(UsageError, match="names two things"):
        load_data("iris")


def test_classes_of_increments_are_classes_of_the_data(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for split, names in (("train", "ac"), ("increment_1", "bd"), ("test", "abcd")):
        for name in names:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, i, 9)).save(tmp_path / "images" / split / name / f"{i}.png")
        rows = "\n".join(f"{i},{name}" for i in range(3) for name in names)
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / f"{split}.csv").write_text(f"x,label\n{rows}\n")
    for folder in ("images", "tables"):
        data = load_data(str(tmp_path / folder), validation=0)
        assert data.classes == ("a", "b", "c", "d")
        assert data.train.labels.unique().tolist() == [0, 2]
        assert data["increment_1"].labels.unique().tolist() == [1, 3]
