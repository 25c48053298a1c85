"""Tables as rows of categories and back: what bins hold, one numbering for all parts, and tables that cannot work."""

import numpy as np
import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data.categorical import Columns, biased_table, columns_of, read_table, table_data


def test_tables_become_rows_of_categories_and_tables_again():
    table = biased_table(200)
    columns = Columns.of(table, "group", "y")
    assert columns.sizes == (4,) * 7 + (2,)
    codes = columns.codes(table)
    assert all(30 < count < 70 for count in torch.bincount(codes[:, 0]).tolist())
    made = columns.source(table)
    assert made.x.shape == (200, 30)
    assert (made.x.sum(1) == 8).all()
    assert made.labels.tolist() == table["group"]
    again = columns.table(codes, made.labels)
    assert again["y"] == table["y"]
    assert columns.codes(again).equal(codes)  # a bin's median lies in the bin
    assert Columns.from_dict(columns.as_dict()) == columns
    assert columns.codes({name: [1e9] if name != "y" else [0] for name in columns.names})[0].tolist() == [3] * 7 + [0]


def test_equal_numbers_are_in_one_bin_and_no_bin_is_empty():
    some = [float(v) for v in range(50)]
    table = {"a": [0.0] * 50 + some, "b": some + [99.0] * 50, "s": [0, 1] * 50, "y": [0, 0, 1, 1] * 25}
    columns = Columns.of(table, "s", "y")
    for k in (0, 1):
        assert 1 < columns.sizes[k] < 4
        assert all(torch.bincount(columns.codes(table)[:, k], minlength=columns.sizes[k]) > 0)


def test_the_last_part_of_bins_is_not_looked_at():
    table = biased_table(400)
    table["merit_0"] = [v if i < 200 else 100 * v for i, v in enumerate(table["merit_0"])]
    assert max(Columns.of(table, "group", "y", rows=range(200)).ends[0]) < 2
    data = table_data(table, "group", "y")
    for part in (data.validation, data.test):
        for row in part.ids.tolist():
            table["noise_0"][row] += 1000
    assert max(table_data(table, "group", "y").train.columns.ends[data.train.columns.names.index("noise_0")]) < 100
    assert sum(len(part) for _, part in data.items()) == 400
    assert len(torch.cat([part.ids for _, part in data.items()]).unique()) == 400
    assert columns_of(data.test.subset([1, 2])) is data.train.columns


def test_a_frame_and_a_file_are_tables(tmp_path):
    table = {"age": [20, 31, 45, 60], "sex": ["f", "m", "m", "f"], "paid": ["no", "yes", "yes", "no"]}
    (tmp_path / "t.csv").write_text(
        "\n".join(",".join(map(str, row)) for row in (table, *zip(*table.values(), strict=True)))
    )
    read = read_table(tmp_path / "t.csv", ["sex"])
    assert read == table
    pandas = pytest.importorskip("pandas")
    assert Columns.of(pandas.DataFrame(table), "sex", "paid") == Columns.of(read, "sex", "paid")


def words(**change):
    return {"a": [0.5, 1.5, 2.5, 3.5], "s": ["x", "y", "x", "y"], "y": [0, 1, 1, 0]} | change


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (words(a=[1.0, float("nan"), 2.0, 3.0]), "a value is missing"),
        (words(a=["u", None, "v", "w"]), "a value is missing"),
        (words(a=[1.0, float("inf"), 2.0, 3.0]), "not finite"),
        (words(a=[1.0, "u", 2.0, 3.0]), "words and numbers"),
        (words(a=[1.0]), "differ in length"),
        (words(s=["x"] * 4), "cannot be protected"),
        (words(s=[0.1, 0.2, 0.3, 0.4]), "cannot be protected"),
        (words(y=[1] * 4), "cannot be protected or predicted"),
        ({"a": [1.0, 2.0], "y": [0, 1]}, "a column is missing"),
    ],
)
def test_tables_that_cannot_work(table, what):
    with pytest.raises(UsageError, match=what):
        Columns.of(table, "s", "y", bins=1)


def test_rows_that_do_not_fit_their_columns():
    columns = Columns.of(words(a=["u", "v", "u", "v"]), "s", "y")
    with pytest.raises(UsageError, match="none of the categories"):
        columns.codes(words(a=["u", "v", "u", "z"]))
    with pytest.raises(UsageError, match="none of the categories"):
        columns.group_codes(words(s=["x", "y", "x", "z"]))
    with pytest.raises(UsageError, match="a column is missing"):
        columns.codes({"y": [0]})
    binned = Columns.of(words(), "s", "y", bins=1)
    with pytest.raises(UsageError, match="a value is no number"):
        binned.codes(words(a=["u", "v", "u", "z"]))
    with pytest.raises(UsageError, match="one group"):
        table_data(words(a=["u"] * 4) | {"s": ["x", "x", "x", "y"]}, "s", "y")


def test_numbers_of_numpy_are_numbers_and_words_are_words():
    table = {"a": np.arange(40), "s": np.array(["f", "m"] * 20), "y": [np.int64(k % 2) for k in range(40)]}
    columns = Columns.of(table, "s", "y")
    assert columns.sizes == (4, 2)
    assert columns.ends[0] is not None
    assert columns.groups == ("f", "m")
    assert columns.codes({"a": [np.float32(39.0)], "y": [True]}).tolist() == [[3, 1]]


def test_groups_have_one_number_in_all_parts():
    table = biased_table(400)
    table["group"] = ["rare" if i % 40 == 0 else ("n", "o")[i % 2] for i in range(400)]
    data = table_data(table, "group", "y")
    for _, part in data.items():
        for position, row in enumerate(part.ids.tolist()):
            assert part.columns.groups[part.labels[position]] == table["group"][row]
    alone = [i for i, group in enumerate(table["group"]) if group != "n"]  # a part without the first group
    some = {name: [column[i] for i in alone] for name, column in table.items()}
    assert sorted(data.train.columns.group_codes(some).unique().tolist()) == [1, 2]
