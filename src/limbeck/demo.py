"""The main job: a real sentence encoder, distilled on this machine into one that is cheap to run."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.convert.layers import InheritLayers
from limbeck.convert.static import StaticTokens
from limbeck.core.files import write_text
from limbeck.core.optim import Optim
from limbeck.core.roles import Roles
from limbeck.core.stages import Conversion
from limbeck.data import Data, TextSource
from limbeck.data.docstrings import Corpus, load_corpus
from limbeck.engine.progress import Progress, make_progress
from limbeck.engine.run import execute
from limbeck.engine.settings import Engine
from limbeck.evaluate.cost import parameters, size_bytes
from limbeck.evaluate.metrics import spearman
from limbeck.evaluate.retrieval import cosines, mrr, scored_pairs
from limbeck.evidence import machine
from limbeck.export.cards import model_card
from limbeck.export.onnx import to_onnx
from limbeck.methods.embedding.method import Embedding
from limbeck.models.sentence import BUNDLED, SentenceEncoder, load_encoder
from limbeck.report.run import write_report
from limbeck.teachers import Cached, OutputStore, collect
from limbeck.timing import seconds_of

BUDGET = "5m"
LENGTH = 128  # tokens of a training text
KEEP = 0.9  # share of the teacher's retrieval that a student has to keep to be chosen for its speed
TEACHER_SHARE, EXPORT_SECONDS = 0.25, 25.0  # of the budget for the teacher's one pass; for ONNX and the report


@dataclass(frozen=True)
class Candidate:
    """A student that is tried, how it learns, and its share of the training time."""

    how: Callable[[Corpus], Conversion]
    share: float
    batch_size: int
    optim: Optim
    method: Embedding = field(default_factory=Embedding)


# Chosen on the validation modules; the similarity term made the few-layer student worse there.
CANDIDATES = {
    "layers:2": Candidate(
        lambda corpus: InheritLayers([0, 5]),
        share=0.8,
        batch_size=64,
        optim=Optim(lr=1e-3, betas=(0.9, 0.98), schedule="cosine", warmup=0.1),
        method=Embedding(similarity_weight=0.0),
    ),
    "static": Candidate(
        lambda corpus: StaticTokens(corpus.train.texts),
        share=0.2,
        batch_size=256,
        optim=Optim(lr=1e-3, schedule="cosine", warmup=0.1),
    ),
}


def main_job(budget: str | None = None, out: str | os.PathLike[str] | None = None, progress: str = "auto") -> Path:
    """Distil MiniLM into the students of `CANDIDATES`, choose one, export it, and write the report.

    Called again with the same folder, it goes on where it stopped.

    Args:
        budget: Time for everything, such as `"2m"`; default 5 minutes on two idle cores.
        out: The run's folder.
        progress: `"auto"`, `"bar"`, `"lines"` or `"off"`.

    Returns:
        The run's folder, with `report.html`, `metrics.json`, the student as sentence-transformers loads it and as ONNX.

    Raises:
        UsageError: The encoder is not installed, or the budget cannot be read.
    """
    return Demo(seconds_of(budget or BUDGET), Path(out or "runs/minilm"), make_progress(progress)).run()


class Demo:
    """The job's state: what it read, and what it has measured so far."""

    def __init__(self, seconds: float, out: Path, progress: Progress) -> None:
        self.began, self.seconds, self.out, self.progress = time.perf_counter(), seconds, out, progress
        self.say = progress.say

    def run(self) -> Path:
        """All steps, in order."""
        self.teacher = load_encoder(BUNDLED)
        self.say(f"teacher: {BUNDLED}, {parameters(self.teacher)[0] / 1e6:.1f} M parameters")
        self.corpus = load_corpus()
        counts = self.corpus.counts()
        self.say("texts: docstrings of the standard library, divided by module: " + "; ".join(
            f"{name} {c['texts']:,} sentences of {c['modules']} modules" for name, c in counts.items()
        ))  # fmt: skip
        self.judges = {name: Judge(getattr(self.corpus, name), self.teacher) for name in ("validation", "test")}
        began = time.perf_counter()
        self.models = {"teacher": self._measure(self.teacher, "test")}
        self.judging = time.perf_counter() - began
        if (least := time.perf_counter() - self.began + self._apart()) > 0.7 * self.seconds:
            self.say(
                f"reading, judging and exporting take about {least:.0f} s by themselves here, of a budget of "
                f"{self.seconds:.0f} s: it will take longer, and the students train for a few steps"
            )
        self.say("making the students out of the teacher")
        self.students = {
            name: cast(SentenceEncoder, c.how(self.corpus)(self.teacher)[0]) for name, c in CANDIDATES.items()
        }
        self.plan = self._read_plan()
        store = self._teach()
        students = {name: self._train(name, candidate, store) for name, candidate in CANDIDATES.items()}
        speeds = throughputs(
            {"teacher": self.teacher, **{n: s["student"] for n, s in students.items()}}, self.corpus.test.texts
        )
        self.models["teacher"]["throughput"] = speeds["teacher"]
        for name, found in students.items():
            found["numbers"]["throughput"] = speeds[name]
        chosen = self._choose(students)
        self._finish(chosen, students)
        return self.out

    # Planning

    def _read_plan(self) -> dict[str, Any]:
        """How many texts and steps fit, as far as it is known: a resumed job does what was planned when it began."""
        path = self.out / "plan.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": {}}

    def _write_plan(self) -> None:
        write_text(self.out / "plan.json", json.dumps(self.plan, indent=1) + "\n")

    def _texts(self) -> int:
        """How many texts the teacher reads in its share of the time."""
        if "texts" not in self.plan:
            some = self._source(256, self.teacher)
            for _ in range(2):  # the first pays for what is made once
                began = time.perf_counter()
                with tempfile.TemporaryDirectory() as scratch:
                    collect(self.teacher, some, scratch, batch_size=64)
            rate = 256 / (time.perf_counter() - began)
            self.plan["texts"] = min(len(self.corpus.train.texts), int(TEACHER_SHARE * self.seconds * rate))
            self._write_plan()
        return self.plan["texts"]

    def _apart(self, students: int = len(CANDIDATES)) -> float:
        """Seconds of exporting and of judging so many students, three times each; the teacher takes several times as long."""
        return EXPORT_SECONDS + 0.6 * self.judging * students

    def _steps(self, name: str) -> int:
        """How many steps fit into a candidate's share of the time that is left."""
        if name not in self.plan["steps"]:
            names = list(CANDIDATES)
            waiting = names[names.index(name) :]
            left = self.seconds - (time.perf_counter() - self.began) - self._apart(len(waiting))
            share = CANDIDATES[name].share / sum(CANDIDATES[n].share for n in waiting)
            step = self._seconds_per_step(name, CANDIDATES[name])
            self.plan["steps"][name] = max(5, int(max(left, 0.1 * self.seconds) * share / step))
            self._write_plan()
        return self.plan["steps"][name]

    def _seconds_per_step(self, name: str, candidate: Candidate) -> float:
        """Timed on a copy, with random targets in the place of the teacher's."""
        student = copy.deepcopy(self.students[name])
        source = self._source(min(len(self.corpus.train.texts), 8 * candidate.batch_size), student)
        roles = Roles(teacher=Noise(self.teacher.encode(["a"]).shape[1]), student=student)
        engine = Engine(batch_size=candidate.batch_size, evaluate_every=0, precision=precision())
        for steps in (4, 16):  # the first run pays for what is made once; the set-up of the second is counted in
            began = time.perf_counter()
            execute(
                candidate.method,
                roles,
                Data(train=source),
                replace(engine, steps=steps),
                optim={"student": candidate.optim},
            )
        return (time.perf_counter() - began) / 16

    # Steps

    def _source(self, count: int, encoder: SentenceEncoder) -> TextSource:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(self.corpus.train.texts), generator=generator)[:count].tolist()
        return TextSource([self.corpus.train.texts[i] for i in rows], encoder.tokenize, max_length=LENGTH)

    def _teach(self) -> OutputStore:
        """The teacher's one pass over the training texts."""
        source = self._source(self._texts(), self.teacher)
        order = source.lengths.argsort(descending=True)
        self.progress.stage("teacher", len(source))
        store = collect(
            self.teacher, source.subset(order), self.out / "teacher", batch_size=64,
            progress=lambda done, _total: self.progress.step(done),
        )  # fmt: skip
        return store

    def _train(self, name: str, candidate: Candidate, store: OutputStore) -> dict[str, Any]:
        student = self.students[name]
        before = self.judges["test"](student)
        began = time.perf_counter()
        source = self._source(self.plan["texts"], student)
        steps = self._steps(name)
        engine = Engine(
            steps=steps, batch_size=candidate.batch_size, precision=precision(), log_every=max(1, steps // 100),
            evaluate_every=0, checkpoint_every=max(1, steps // 4), keep=1,
        )  # fmt: skip
        judge = self.judges["validation"]
        result = execute(
            candidate.method,
            Roles(teacher=Cached(store), student=student),
            Data(train=source),
            engine,
            optim={"student": candidate.optim},
            evaluate=lambda m: judge(m.student.module),
            out=self.out / "candidates" / name.replace(":", "-"),
            progress=Named(self.progress, name),
        )
        validation = {key: result.metrics[key] for key in ("mrr@10", "spearman")}
        seconds = time.perf_counter() - began
        numbers = self._measure(student, "test")
        self.say(f"{name}: validation MRR@10 {validation['mrr@10']:.3f}")
        return {
            "student": student, "before": before, "validation": validation, "numbers": numbers, "seconds": seconds,
            "history": result.history, "share": {"texts": len(source), "steps": steps, "method": asdict(candidate.method)},
        }  # fmt: skip

    def _measure(self, encoder: SentenceEncoder, split: str) -> dict[str, float]:
        """Quality on held-out texts, size, and sentences per second on this CPU."""
        found = self.judges[split](encoder)
        stsb = stsb_pairs()
        if stsb is not None:
            found["stsb_spearman"] = scored_pairs(encoder, *stsb)
        costs = {"parameters": parameters(encoder)[0], "bytes": size_bytes(encoder)}
        return {**found, **costs}

    def _choose(self, students: dict[str, dict[str, Any]]) -> str:
        """The fastest of the students that keep enough of the teacher's validation retrieval, or else the best one."""
        teacher = self.judges["validation"](self.teacher)["mrr@10"]
        good = [n for n, s in students.items() if s["validation"]["mrr@10"] >= KEEP * teacher]
        if good:
            return max(good, key=lambda n: students[n]["numbers"]["throughput"])
        return max(students, key=lambda n: students[n]["validation"]["mrr@10"])

    def _finish(self, chosen: str, students: dict[str, dict[str, Any]]) -> None:
        picked = students[chosen]
        encoder: SentenceEncoder = picked["student"]
        self.models |= {"student_before": picked["before"], "student": picked["numbers"]}
        self.say(f"chosen: {chosen}; writing the student, its ONNX form and the report")
        example = encoder.tokens(list(self.corpus.test.texts[:4])).padded(torch.arange(4))
        onnx = to_onnx(encoder, example, self.out / "student.onnx", axes=("batch", "sequence"))
        quality = {"mrr@10", "spearman", "stsb_spearman"}
        candidates = [
            {
                "name": name,
                "metrics": {k: v for k, v in s["numbers"].items() if k in quality},
                "validation": s["validation"],
                **{k: s["numbers"][k] for k in ("parameters", "bytes", "throughput")},
                "seconds": round(s["seconds"], 1),
                "chosen": name == chosen,
                **s["share"],
            }
            for name, s in students.items()
        ]
        metrics = {
            "task": "Sentence embeddings: a docstring's summary line finds its own body, among modules never trained on",
            "primary": "mrr@10",
            "models": self.models,
            "candidates": candidates,
            "data": self.corpus.counts() | {"trained on": {"texts": self.plan["texts"]}},
            "lineage": {
                "teacher": BUNDLED, "student": chosen, "method": "embedding", "choice": "made on the validation modules",
                "onnx": asdict(onnx),
            },
            "environment": machine(torch.device("cpu")),
            "seconds": round(time.perf_counter() - self.began, 1),
        }  # fmt: skip
        card = model_card(
            f"{BUNDLED}, {chosen}",
            metrics,
            load="from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer('student')\n"
            "embeddings = model.encode(['Open a file for reading.'])",
            licence="apache-2.0",
            library="sentence-transformers",
            base_model=f"sentence-transformers/{BUNDLED}",
            tags=("sentence-similarity",),
        )
        encoder.save(self.out / "student", card)
        rows = [{**row, "stage": name} for name, s in students.items() for row in s["history"]]
        write_text(self.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_text(self.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        write_report(self.out)
        self.progress.close()


class Judge:
    """Retrieval and agreement with the teacher on the held-out modules of one split."""

    def __init__(self, split: Any, teacher: SentenceEncoder) -> None:
        self.summaries = [pair.summary for pair in split.pairs]
        self.bodies = [pair.body for pair in split.pairs]
        self.texts = list(split.texts[:500])
        self.teacher = self._pairs(teacher)

    def _pairs(self, encoder: SentenceEncoder) -> Tensor:
        """The cosines of all pairs of texts."""
        found = encoder.encode(self.texts)
        upper = torch.triu_indices(len(found), len(found), offset=1)
        return cosines(found, found)[upper[0], upper[1]]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """The numbers of an encoder."""
        assert isinstance(encoder, SentenceEncoder)
        found = mrr(encoder.encode(self.summaries), encoder.encode(self.bodies))
        return {"mrr@10": float(found), "spearman": float(spearman(self._pairs(encoder), self.teacher))}


class Noise(nn.Module):
    """Stands in for the stored teacher while steps are timed."""

    takes_batch = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, batch: Any) -> Tensor:
        """Any targets."""
        return torch.randn(len(batch), self.width)


class Named:
    """Progress of one run inside a larger job: the stage is shown under the candidate's name, and the bar stays open."""

    def __init__(self, inner: Progress, name: str) -> None:
        self.inner, self.name = inner, name
        self.step, self.row, self.say = inner.step, inner.row, inner.say

    def stage(self, name: str, total: int | None, done: int = 0) -> None:
        """Under the candidate's name."""
        self.inner.stage(self.name, total, done)

    def close(self) -> None:
        """Not yet."""


def throughputs(encoders: Mapping[str, SentenceEncoder], texts: Sequence[str], rounds: int = 3) -> dict[str, float]:
    """Sentences per second on this CPU, of batches of like length that are tokenised beforehand.

    The encoders take turns, so that a machine that is busy for a while slows all of them; the median of the rounds counts.
    """
    tokens = {name: encoder.tokens(texts[:512]) for name, encoder in encoders.items()}
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encoder in encoders.items():
            done, began = 0, time.perf_counter()
            while done == 0 or time.perf_counter() - began < 0.5:
                encoder.encode_tokens(tokens[name], batch_size=32)
                done += len(texts[:512])
            rates[name].append(done / (time.perf_counter() - began))
    return {name: median(found) for name, found in rates.items()}


def precision() -> Any:
    """bf16 where the CPU multiplies it natively, else fp32."""
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def stsb_pairs() -> tuple[list[str], list[str], Tensor] | None:
    """The STS-B pairs under `LIMBECK_DATA`, where there are any."""
    path = Path(os.environ.get("LIMBECK_DATA", "")) / "stsb" / "dev.csv"
    if not os.environ.get("LIMBECK_DATA") or not path.is_file():
        return None
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))  # first sentence, second sentence, score; no header
    return [r[0] for r in rows], [r[1] for r in rows], torch.tensor([float(r[2]) for r in rows])
