"""What condensed sets are worth: networks of three kinds trained on each, against real images and all data.

    python benchmarks/condense.py --out benchmarks/results/condense.json --only digits
    LIMBECK_DATA=path python benchmarks/condense.py --out benchmarks/results/condense.json --only cifar10
    python benchmarks/condense.py --out benchmarks/results/condense.json --picture docs/img

One and ten images of each class, three sets of each kind (seeds 0, 1, 2, each with its own data, teachers and experts), and on
each set several trainings of a ConvNet (that which trajectories are matched with; recovery has one with batch normalisation), a
ResNet and an MLP that no set was made with: equally many steps for all, the last step's accuracy, on test images.

Each row that learns pixels is tuned over two rates of them, on seed 100 and its validation images alone, with the fewest images;
other rows have nothing to tune. All else, and how networks are trained, is as in the methods' proofs, and the same for all.

The result is written after every set: stopped and started again, it goes on. `runs/condense` has the sets, teachers and experts.
Times are of the process's CPU, on one thread.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from condense_sets import (
    BATCH,
    JUDGE,
    ROWS,
    TABLES,
    TASKS,
    TEMPERATURE,
    Row,
    World,
    as_many_bytes,
    labelled,
    with_tables,
)  # fmt: skip
from measuring import machine

from limbeck.core.errors import RunError
from limbeck.core.source import Source
from limbeck.data.augment import Views
from limbeck.data.condensed import Condensed
from limbeck.evaluate.condensation import Training, protocol

SEEDS, TUNING, EACH = (0, 1, 2), 100, (1, 10)
ALL_DATA = 12  # times as many steps


def judged(
    world: World, row: str, small: Condensed, test: Source, labels: Sequence[str], trainings: int, first: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Accuracies in per cent, by labels and kind of network; sets with tables of views bring their own views.

    Trainings are numbered: those from the `first` on are the same as if all had been asked for.
    """
    task, found = world.task, {}
    plain, mixed = Views(BATCH, task.operations), Views(BATCH, task.operations, "mixup", 0.8)
    steps = task.steps * (ALL_DATA if row == "all data" else 1)
    for kind in labels:
        hard, given = kind == "hard", labelled(row, world, small, kind)
        how = Training(steps, "hard" if hard else "soft", JUDGE, plain if hard else mixed)
        scores = protocol(given, test, task.networks(), how, trainings, 100 * world.seed + first)
        found[kind] = {name: [round(100 * value, 2) for value in values] for name, values in scores.items()}
    return found


def tuned(name: str, row: Row, world: World, each: int) -> dict[str, Any]:
    """The rate of the pixels with the best mean accuracy on validation images."""
    if row.rates is None:
        return {"pixels": 0.0}
    scores = {}
    for rate in world.task.rates[row.rates]:
        try:
            small = row.make(world, each, rate)
        except RunError:  # it diverged at this rate
            scores[rate] = 0.0
            continue
        found = judged(world, name, small, world.data.validation, row.labels, 1)
        scores[rate] = mean(v for kinds in found.values() for own in kinds.values() for v in own)
    return {"pixels": max(scores, key=lambda rate: scores[rate]), "scores": scores}


def cell(name: str, row: Row, world: World, each: int, rate: float) -> dict[str, Any]:
    """One set: made, measured and judged."""
    start = time.process_time()
    small = row.make(world, each, rate)
    making = time.process_time() - start - world.built
    used = dict(world.used)
    if name != "all data":
        small.save(world.folder / "sets" / f"{name}-{each}-{world.seed}")
    sizes = {kind: sum(labelled(name, world, small, kind).bytes().values()) for kind in row.labels}
    trainings = 1 if name == "all data" else world.task.trainings
    scores = judged(world, name, small, world.data.test, row.labels, trainings)
    seconds = {"making": round(making, 2), **{key: round(value, 2) for key, value in used.items()}}
    return {"samples": len(small), "bytes": sizes, "seconds": seconds, "accuracy": scores}


def more(name: str, row: Row, world: World, each: int, known: dict[str, Any]) -> dict[str, Any] | None:
    """A cell with the trainings that it lacks, on the set as it was saved; None where it lacks none."""
    have = min(len(values) for kinds in known["accuracy"].values() for values in kinds.values())
    if name == "all data" or have >= world.task.trainings:
        return None
    small = Condensed.load(world.folder / "sets" / f"{name}-{each}-{world.seed}")
    found = judged(world, name, small, world.data.test, row.labels, world.task.trainings - have, have)
    accuracy = {
        labels: {kind: values[:have] + found[labels][kind] for kind, values in kinds.items()}
        for labels, kinds in known["accuracy"].items()
    }
    return {**known, "accuracy": accuracy}


def write(out: Path, *path: str, value: Any) -> None:
    """Put a value into the result, whoever else writes there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = read(out)
        part = whole
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = value
        aside = out.with_suffix(".tmp")
        aside.write_text(json.dumps(whole, indent=1) + "\n")
        aside.replace(out)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found


def summary(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Means over a row's sets, and deviations between them, by labels and kind of network; seconds and bytes."""
    every = list(cells.values())
    accuracy: dict[str, Any] = {}
    for labels, kinds in every[0]["accuracy"].items():
        own = {kind: [mean(c["accuracy"][labels][kind]) for c in every] for kind in kinds}
        own["all three"] = [mean(values) for values in zip(*own.values(), strict=True)]
        accuracy[labels] = {
            kind: {"mean": round(mean(values), 2), "deviation": round(stdev(values), 2)} for kind, values in own.items()
        }
    seconds = {key: round(mean(c["seconds"][key] for c in every), 2) for key in every[0]["seconds"]}
    return {"samples": every[0]["samples"], "bytes": every[0]["bytes"], "seconds": seconds, "accuracy": accuracy}


def run(name: str, out: Path, folder: Path, numbers: Sequence[int]) -> None:
    """All cells of a task that are not there yet, for these numbers of images of a class."""
    task = TASKS[name]
    write(out, "machine", value=machine("limbeck"))
    settings = {
        "steps": task.steps, "steps on all data": ALL_DATA * task.steps, "batch": BATCH, "trainings": task.trainings,
        "iterations": task.iterations, "experts, epochs, starts": task.experts, "tables": TABLES, "temperature": TEMPERATURE,
        "pixel rates": task.rates, "image": task.shape,
    }  # fmt: skip
    write(out, name, "settings", value=settings)
    for each in numbers:
        for row_name, row in ROWS.items():
            again = row.make is as_many_bytes and with_tables(task, each) == each
            if each < row.least or again or (row_name == "all data" and each != EACH[0]):
                continue
            place = (name, str(each), row_name)
            known = read(out).get(name, {}).get(str(each), {}).get(row_name, {})
            rates = read(out).get(name, {}).get("tuned", {})
            if row_name not in rates:
                rates[row_name] = tuned(row_name, row, World(task, TUNING, folder), row.least)
                write(out, name, "tuned", row_name, value=rates[row_name])
            for seed in SEEDS:
                world, before = World(task, seed, folder), known.get("sets", {}).get(str(seed))
                made = (
                    more(row_name, row, world, each, before)
                    if before
                    else cell(row_name, row, world, each, rates[row_name]["pixels"])
                )
                if made is not None:
                    write(out, *place, "sets", str(seed), value=made)
                    print(name, each, row_name, seed, made["seconds"], made["accuracy"], flush=True)
            write(out, *place, "summary", value=summary(read(out)[name][str(each)][row_name]["sets"]))


def pictured(name: str, out: Path, folder: Path, picture: Path) -> None:
    """Draw the sets of the first seed; those that are not there are made again, with the rates that were chosen."""
    from condense_picture import MADE, REAL, gallery

    rates, classes = read(out)[name]["tuned"], TASKS[name].splits(0).train.classes
    for row, each in (*((row, 1) for row in (*REAL, *MADE)), ("INFER", 10)):
        place = folder / "sets" / f"{row}-{each}-0"
        if not place.is_dir():
            ROWS[row].make(World(TASKS[name], 0, folder), each, rates[row]["pixels"]).save(place)
            print(place, flush=True)
    gallery(folder / "sets", picture / f"condense-{name}.png", classes, read(out)[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(TASKS), action="append")
    parser.add_argument("--each", type=int, choices=EACH, action="append", help="images of each class")
    parser.add_argument("--picture", type=Path, help="draw the sets there, and measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.only or TASKS:
        folder = Path("runs") / "condense" / name
        if given.picture:
            pictured(name, given.out, folder, given.picture)
        else:
            run(name, given.out, folder, given.each or EACH)


if __name__ == "__main__":
    main()
