"""The main job on a tiny encoder and a handful of texts: everything that it promises to leave is there."""

import json
import random

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_encoder import WORDS, encoder

from limbeck import demo
from limbeck.data.docstrings import Corpus, Pair, Split


def split(seed, count):
    draw = random.Random(seed)
    texts = tuple(" ".join(draw.choices(WORDS, k=draw.randint(3, 8))) + f" {'abcdefg'[i % 7]}" for i in range(count))
    texts = tuple(dict.fromkeys(texts))
    pairs = tuple(Pair(a, f"{a} {b}") for a, b in zip(texts[:12], texts[12:24], strict=True))
    return Split(texts, pairs, (f"module{seed}",))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    teacher = encoder(tmp_path, layers=6)
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    monkeypatch.setattr(demo, "load_encoder", lambda name: teacher)
    monkeypatch.setattr(demo, "load_corpus", lambda: Corpus(split(1, 300), split(2, 40), split(3, 40)))
    monkeypatch.setattr(demo, "throughputs", lambda encoders, texts: dict(zip(encoders, (1.0, 3.0, 99.0), strict=True)))


def test_it_leaves_what_it_promises_and_goes_on_where_it_stopped(tiny, tmp_path, capsys):
    out = demo.main_job("6s", tmp_path / "run", progress="off")
    metrics = json.loads((out / "metrics.json").read_text())
    assert [c["name"] for c in metrics["candidates"]] == ["layers:2", "static"]
    assert {"teacher", "student_before", "student"} == metrics["models"].keys()
    assert metrics["lineage"]["onnx"]["max_rel_error"] < 1e-4
    assert "<svg" in (out / "report.html").read_text()
    chosen = next(c for c in metrics["candidates"] if c["chosen"])
    student = SentenceTransformer(str(out / "student"), device="cpu")
    assert sum(p.numel() for p in student.parameters()) <= chosen["parameters"]
    plan = (out / "plan.json").read_text()
    demo.main_job("6s", tmp_path / "run", progress="lines")  # all is done already: the plan and the numbers stay
    assert "of a budget of 6 s: it will take longer" in "".join(capsys.readouterr())
    assert (out / "plan.json").read_text() == plan
    again = json.loads((out / "metrics.json").read_text())
    assert again["models"] == metrics["models"]


def test_the_fastest_student_that_keeps_enough_is_chosen():
    job = demo.Demo.__new__(demo.Demo)
    job.judges, job.teacher = {"validation": lambda encoder: {"mrr@10": 0.5}}, None

    def students(*numbers):
        return {str(i): {"validation": {"mrr@10": q}, "numbers": {"throughput": v}} for i, (q, v) in enumerate(numbers)}

    assert job._choose(students((0.46, 3.0), (0.45, 90.0), (0.3, 900.0))) == "1"
    assert job._choose(students((0.40, 3.0), (0.44, 2.0))) == "1"


def test_speed_is_measured_in_turns(tmp_path):
    found = demo.throughputs({"a": encoder(tmp_path)}, ["open a file"] * 8, rounds=1)
    assert found["a"] > 0


def test_judging_the_teacher_itself(tmp_path):
    teacher = encoder(tmp_path)
    numbers = demo.Judge(split(2, 40), teacher)(teacher)
    assert numbers["spearman"] == pytest.approx(1)
    assert 0 <= numbers["mrr@10"] <= 1
    assert torch.is_grad_enabled()
