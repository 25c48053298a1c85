"""Pairs of images and texts from tables and folders."""

from io import BytesIO

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import load_data
from limbeck.data.image_text import ImageText

image_module = pytest.importorskip("PIL.Image")


def png(k):
    file = BytesIO()
    image_module.new("RGB", (16, 16), (k % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_a_table_with_images_and_texts_is_pairs(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [png(k) for k in range(60)], "caption": [f"red {k}" for k in range(60)]}
    parquet.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    data = load_data(tmp_path / "pairs.parquet", image="image", text="caption", augment=False)
    seen = set()
    for _, source in data.items():
        assert isinstance(source, ImageText)
        x = source.batch(torch.arange(len(source)), 0).x
        for row, pixels in enumerate(x["pixel_values"]):  # each image still has its own text
            level = round(pixels[0, 0, 0].item() * 255)
            letters = [c for c, real in zip(x["input_ids"][row], x["attention_mask"][row], strict=True) if real]
            assert bytes(letters).decode() == f"red {level}" == source.captions.texts[row]
            seen.add(level)
    assert len(seen) == 60


def test_a_folder_with_a_prompt_is_pairs_with_prompts(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for k in range(20):
            (tmp_path / name / f"{k}.png").write_bytes(png(k if name == "cat" else 200 + k))
    data = load_data(tmp_path, prompt="a photo of a {}.", max_length=40)
    assert data.train.prompts.texts == ["a photo of a cat.", "a photo of a dog."]
    assert data.train.captions.texts[0] == f"a photo of a {('cat', 'dog')[data.train.labels[0]]}."
    assert data.train.views == 0
    with pytest.raises(UsageError, match="no place for the class"):
        load_data(tmp_path, prompt="a photo")


def test_one_text_for_an_image(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [png(k) for k in range(9)], "a": ["x"] * 9, "b": ["y"] * 9}
    parquet.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    with pytest.raises(UsageError, match="one text"):
        load_data(tmp_path / "pairs.parquet", image="image", text=["a", "b"])
