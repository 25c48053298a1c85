import yaml

from limbeck.export.cards import model_card, write_card

RESULTS = {
    "primary": "mrr@10",
    "models": {"teacher": {"mrr@10": 0.8, "bytes": 90_000_000}, "student": {"mrr@10": 0.77, "bytes": 40_000_000}},
    "candidates": [{"name": "static | table", "metrics": {"mrr@10": 0.6}, "bytes": 10_000_000, "chosen": True}],
    "data": {"sentences": 21_873, "splits": {"train": 17_000}},
    "lineage": {"teacher": "minilm", "method": "kd", "layers": [0, 3]},
    "environment": {"cpu": "some"},
}


def parts(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_tells_everything_that_was_measured():
    card = model_card("small", RESULTS, load="model = 1", licence="mit", base_model="org/minilm", tags=["st"])
    front, body = parts(card)
    assert front["license"] == "mit"
    assert front["base_model"] == "org/minilm"
    assert front["tags"] == ["knowledge-distillation", "limbeck", "st"]
    assert "distilled from `minilm` by the method `kd`" in body
    assert "```python\nmodel = 1\n```" in body
    assert "| Bytes | 90 MB | 40 MB |" in body
    assert "| static / table | 10 MB | 0.600 |" in body
    assert "- Splits:\n  - Train: 17,000" in body
    assert "- Layers: 0, 3" in body


def test_an_unknown_licence_is_said_and_not_invented():
    front, body = parts(model_card("small", RESULTS, load=""))
    assert "license" not in front
    assert "licence of `minilm` was not stated" in body


def test_missing_pieces_leave_no_empty_sections(tmp_path):
    text = write_card(tmp_path, "small", {}, load="x = 1").read_text()
    assert "## Evidence" not in text
    assert "## Use" in text
    assert "\n\n\n" not in text
