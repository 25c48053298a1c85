"""Synthetic tables and images keep what they mean, and say what cannot be read."""

import csv

import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.categorical import Columns, biased_table, table_data
from limbeck.data.held_out import load_condensed
from limbeck.data.options import DataOptions
from limbeck.data.synthetic import SyntheticImages, SyntheticTable, load_synthetic
from limbeck.nn.mlp import mlp


def test_a_synthetic_table_is_kept_with_its_meaning(tmp_path):
    table = biased_table(100)
    columns = Columns.of(table, "group", "y")
    made = SyntheticTable(columns, columns.codes(table), columns.group_codes(table), {"seed": 3})
    made.save(tmp_path)
    again = SyntheticTable.load(tmp_path)
    assert again.codes.equal(made.codes)
    assert (again.columns, again.info) == (columns, {"seed": 3})
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == [*columns.names, "group"]
    binned = zip(columns.values[:7], made.codes[0, :7].tolist(), strict=True)
    assert [float(v) for v in lines[1][:7]] == [values[c] for values, c in binned]
    assert made.bytes() == {"codes": 800, "groups": 100}
    assert made.source().x.equal(columns.source(table).x)
    (tmp_path / "synthetic.json").write_text("{")
    for load in (SyntheticTable.load, load_synthetic):
        with pytest.raises(UsageError, match="cannot be read"):
            load(tmp_path)
    with pytest.raises(UsageError, match="no synthetic table"):
        SyntheticTable.load(tmp_path / "other")


def test_synthetic_images_are_kept_in_256_levels(tmp_path):
    g = torch.Generator().manual_seed(0)
    made = SyntheticImages(torch.rand(5, 3, 4, 4, generator=g), torch.arange(5), torch.arange(5) % 2, {"seed": 3})
    made.save(tmp_path)
    again = SyntheticImages.load(tmp_path)
    torch.testing.assert_close(again.images, made.images, rtol=0, atol=0.5 / 255 + 1e-6)
    assert (again.targets.tolist(), again.groups.tolist(), again.info) == (
        [0, 1, 2, 3, 4],
        [0, 1, 0, 1, 0],
        {"seed": 3},
    )
    assert sum(made.bytes().values()) == 5 * 48 + 5 + 5
    assert again.source().batch(torch.tensor([3]), 0).y.tolist() == [3]
    with pytest.raises(UsageError, match="another kind"):
        SyntheticTable.load(tmp_path)


def test_what_was_drawn_is_trained_on_like_any_condensed_set(tmp_path):
    table = biased_table(300)
    data = table_data(table, "group", "y", seed=1)
    columns = data.train.columns
    SyntheticTable(columns, columns.codes(table), columns.group_codes(table)).save(tmp_path / "rows")
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    SyntheticImages(x, y, torch.zeros(8, dtype=torch.int64)).save(tmp_path / "images")

    found = load_condensed(str(tmp_path / "rows"), DataOptions(held_out=data))
    assert found.train.x.shape == (300, sum(columns.sizes[:-1]))
    assert found.train.labels.tolist() == table["y"]
    assert found.train.classes == ("0", "1")
    assert found.test.labels.equal(data.test.x[:, -2:].argmax(1))
    net = SyntheticTable.load(tmp_path / "rows").condensed().train(mlp(found.train.x.shape[1], 16, 2), steps=200)
    right = (net(found.test.x).argmax(1) == found.test.labels).float().mean()
    assert right > 0.7  # the more frequent target is 0.58 of them

    held = Data(train=TensorSource({"image": x, "target": y}, torch.arange(8) % 2))
    found = load_condensed(str(tmp_path / "images"), DataOptions(held_out=held))
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == (y.tolist(), y.tolist())


def test_many_groups_are_numbers_of_more_than_a_byte(tmp_path):
    columns = Columns.numbered((2,), 300)
    SyntheticTable(columns, torch.zeros(300, 1, dtype=torch.int64), torch.arange(300)).save(tmp_path)
    assert SyntheticTable.load(tmp_path).groups.equal(torch.arange(300))
