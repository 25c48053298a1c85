import logging

import pytest
import torch
from torch import nn

from limbeck.core.errors import RunError, UsageError
from limbeck.export.onnx import to_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Encoder(nn.Module):
    """Token ids and a mask to an embedding, returned as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, input_ids, attention_mask):
        hidden = self.layer(self.table(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return {"last_hidden_state": hidden, "sentence_embedding": (hidden * mask).sum(1) / mask.sum(1)}


def test_batch_and_sequence_vary(tmp_path):
    torch.manual_seed(0)
    example = {"input_ids": torch.randint(20, (1, 7)), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    report = to_onnx(Encoder(), example, tmp_path / "m.onnx", axes=("batch", "sequence"))
    assert report.checked == ((2, 7), (1, 7), (5, 4))
    assert report.inputs == ("input_ids", "attention_mask")
    assert report.max_abs_error < 1e-5
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [i.shape for i in session.get_inputs()] == [["batch", "sequence"]] * 2
    assert [o.name for o in session.get_outputs()] == ["output"]
    feed = {"input_ids": torch.randint(20, (9, 13)).numpy(), "attention_mask": torch.ones(9, 13).long().numpy()}
    assert session.run(None, feed)[0].shape == (9, 8)


def test_images_beside_texts_share_the_batch_alone(tmp_path):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.images, self.texts = nn.Linear(12, 4), nn.EmbeddingBag(20, 4)

        def forward(self, pixel_values, input_ids):
            return {"image_embeds": self.images(pixel_values.flatten(1)), "text_embeds": self.texts(input_ids)}

    torch.manual_seed(0)
    example = {"pixel_values": torch.rand(2, 3, 2, 2), "input_ids": torch.randint(20, (2, 6))}
    report = to_onnx(Pairs(), example, tmp_path / "m.onnx", axes=("batch", "sequence"))
    assert report.checked == ((2, 6), (1, 6), (5, 3))
    inputs = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()
    assert [i.shape for i in inputs] == [["batch", 3, 2, 2], ["batch", "sequence"]]
    with pytest.raises(UsageError, match="do not share"):
        to_onnx(
            Pairs(),
            {**example, "pixel_values": torch.rand(3, 3, 2, 2)},
            tmp_path / "n.onnx",
            axes=("batch", "sequence"),
        )


def test_a_convolutional_model_is_exported_in_eval_mode_quietly(tmp_path, capfd, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    state = {k: v.clone() for k, v in model.state_dict().items()}
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        report = to_onnx(model, (torch.randn(4, 3, 8, 8),), tmp_path / "m.onnx", opset=20)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.root.manager.disable == 0
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (report.opset, report.checked) == (20, ((2,), (1,), (5,)))
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 20


def test_large_weights_go_to_a_file_beside(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.export.onnx._LARGEST", 1000)
    report = to_onnx(nn.Linear(64, 64), (torch.randn(2, 64),), tmp_path / "m.onnx")
    files = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert sorted(files) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(files.values())
    onnxruntime.InferenceSession(tmp_path / "m.onnx")  # finds its weights at their final place


class Fixed(nn.Module):
    """The batch size is baked in as a number."""

    def forward(self, x):
        return x.reshape(2, 4) * 2


class Raising(nn.Module):
    def forward(self, x):
        raise ValueError("no such thing")


class Drawing(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (Fixed(), "could not be exported"),
        (Raising(), r"could not be exported .*\n  where: Raising\n  found: ValueError: no such thing"),
        (Drawing(), "the ONNX graph computes something else"),
    ],
    ids=["fixed batch", "raises", "random"],
)
def test_a_graph_that_differs_leaves_no_file(tmp_path, module, what):
    with pytest.raises(RunError, match=what):
        to_onnx(module, (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_before(tmp_path):
    (tmp_path / "m.onnx").write_text("the one before")
    with pytest.raises(RunError):
        to_onnx(Drawing(), (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the one before"]


@pytest.mark.parametrize(
    ("example", "axes"),
    [
        ((torch.ones(2, 4), torch.ones(3, 4)), ("batch",)),
        ((torch.ones(2),), ("batch", "sequence")),
        ((torch.ones(0, 4),), ("batch",)),
        ((), ("batch",)),
    ],
)
def test_an_example_without_the_axes_is_refused(tmp_path, example, axes):
    with pytest.raises(UsageError, match="do not share the dynamic axes"):
        to_onnx(nn.Linear(4, 2), example, tmp_path / "m.onnx", axes=axes)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"limbeck\[export\]"):
        to_onnx(nn.Linear(4, 2), (torch.ones(2, 4),), tmp_path / "m.onnx")
