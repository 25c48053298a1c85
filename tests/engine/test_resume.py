"""Killed at any moment and started again, a run ends in the same bits as one never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from programs import Chain, Gan, Mimic, accuracy, gan_data, gan_roles, net, pair, table

from limbeck import Batch, Engine, Method, Optim, Roles, Train, Update
from limbeck.core.errors import Interrupted, RunError, UsageError
from limbeck.engine import checkpoint, run, train
from limbeck.engine.run import execute

HERE = Path(__file__).parent


class Killed(BaseException):
    pass


def bits(roles):
    return {f"{n}.{k}": v.clone() for n, r in roles.items() for k, v in r.module.state_dict().items()}


def rows(result):
    return [{k: v for k, v in row.items() if k != "time"} for row in result.history]


def chain(out, **engine):
    settings = {"epochs": 2, "batch_size": 16, "checkpoint_every": 3, "log_every": 2} | engine
    m = Roles(teacher=net(8, 32, 4, seed=1))
    optim = {"student": Optim(lr=0.01, schedule="cosine", warmup=2)}
    return execute(Chain(), m, table(), Engine(**settings), optim=optim, out=out, evaluate=accuracy)


def die(monkeypatch, where, after):
    """Let the run die at the `after`-th call of a function of the engine."""
    owner, name = where
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == after:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, deadly)


STEP, SAVE, RENAME = (train.Training, "_after_step"), (checkpoint, "_sha256"), (checkpoint.os, "replace")
POINTS = [(STEP, n) for n in (1, 4, 7, 12, 13, 15, 20, 24)]
POINTS += [(SAVE, n) for n in (1, 2, 4, 9, 14)] + [(RENAME, n) for n in (1, 5, 6, 8)]
POINTS += [((run.Run, "_collect"), 1), ((run.Run, "_end_stage"), 2), ((run.Run, "_search"), 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    result = chain(tmp_path_factory.mktemp("whole") / "run")
    return bits(result.roles), rows(result)


@pytest.mark.parametrize(("where", "after"), POINTS, ids=[f"{w[1]}-{n}" for w, n in POINTS])
def test_death_in_every_stage_and_between(tmp_path, monkeypatch, whole, where, after):
    with monkeypatch.context() as patch:
        die(patch, where, after)
        with pytest.raises(Killed):
            chain(tmp_path / "run")
    result = chain(tmp_path / "run")
    expected, history = whole
    found = bits(result.roles)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert rows(result) == history
    on_disk = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k != "time"} for r in on_disk] == history


def test_two_deaths_and_a_finished_run(tmp_path, monkeypatch, whole):
    for after in (5, 6):
        with monkeypatch.context() as patch:
            die(patch, STEP, after)
            with pytest.raises(Killed):
                chain(tmp_path / "run")
    chain(tmp_path / "run")
    again = chain(tmp_path / "run")  # finished: nothing is done again
    assert rows(again) == whole[1]
    for key, value in whole[0].items():
        assert torch.equal(bits(again.roles)[key], value)


class Dropping(Mimic):
    """Uses every kind of random state: dropout, a named generator, Python and numpy."""

    def step(self, m, batch):
        import numpy as np

        noise = torch.randn(len(batch), 8, generator=m.rng("noise"))
        scale = 1 + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
        x = torch.dropout(batch.x * scale + noise, 0.3, True)
        yield from super().step(m, Batch(x=x, y=batch.y))


def test_random_states_resume(tmp_path, monkeypatch):
    def go(out):
        return execute(Dropping(), pair(), table(), Engine(epochs=2, batch_size=16, checkpoint_every=1), out=out)

    expected = bits(go(tmp_path / "whole").roles)
    with monkeypatch.context() as patch:
        die(patch, STEP, 6)
        with pytest.raises(Killed):
            go(tmp_path / "cut")
    found = bits(go(tmp_path / "cut").roles)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_alternating_program_with_endless_data_resumes(tmp_path, monkeypatch):
    from types import SimpleNamespace

    def go(out):
        engine = Engine(steps=9, checkpoint_every=2, precision="bf16")
        return execute(Gan(), gan_roles(), SimpleNamespace(train=gan_data), engine, out=out)

    expected = bits(go(tmp_path / "whole").roles)
    with monkeypatch.context() as patch:
        die(patch, STEP, 6)
        with pytest.raises(Killed):
            go(tmp_path / "cut")
    found = bits(go(tmp_path / "cut").roles)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


class Own(Method):
    """A stage that owns its loop and its optimizer."""

    frozen = ()

    def stages(self, m, data):
        yield Train(run=self.loop, roles={"student": None}, data=data.train, name="own")

    def loop(self, m, data, state):
        optimizer = torch.optim.Adam(m.student.parameters(), lr=0.01)
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        state["optimizer"] = optimizer
        while state.get("done", 0) < 8:
            batch = data.batch(torch.arange(16) + 8 * state.get("done", 0), 0)
            loss = torch.nn.functional.cross_entropy(m.student(batch), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["done"] = state.get("done", 0) + 1
            yield {"loss": loss}


def test_a_stage_with_its_own_loop_resumes(tmp_path, monkeypatch):
    def go(out):
        return execute(Own(), Roles(student=net(8, 6, 4)), table(), Engine(checkpoint_every=2, log_every=1), out=out)

    expected = go(tmp_path / "whole")
    with monkeypatch.context() as patch:
        die(patch, STEP, 6)
        with pytest.raises(Killed):
            go(tmp_path / "cut")
    found = go(tmp_path / "cut")
    assert rows(found) == rows(expected)
    assert all(torch.equal(bits(found.roles)[k], v) for k, v in bits(expected.roles).items())


def test_surgery_in_mid_stage_resumes(tmp_path, monkeypatch):
    from programs import Narrow

    class Shrink(Mimic):
        def after_epoch(self, m, epoch):
            if epoch == 2:
                m.convert("student", Narrow(3))

    def go(out):
        return execute(Shrink(), pair(), table(), Engine(epochs=4, batch_size=32, checkpoint_every=1), out=out)

    expected = bits(go(tmp_path / "whole").roles)
    for after in (6, 9):
        with monkeypatch.context() as patch:
            die(patch, STEP, after)
            with pytest.raises(Killed):
                go(tmp_path / f"cut{after}")
        found = bits(go(tmp_path / f"cut{after}").roles)
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def damage(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["weights", "state", "manifest", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, monkeypatch, whole, capsys, what):
    with monkeypatch.context() as patch:
        die(patch, STEP, 8)
        with pytest.raises(Killed):
            chain(tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    last = tmp_path / "run" / "checkpoints" / names[-1]
    if what == "weights":
        damage(last / "roles" / "student.safetensors")
    elif what == "state":
        damage(last / "state.pt")
    elif what == "manifest":
        (last / "manifest.json").write_text("{")
    else:
        (last / "state.pt").unlink()
    result = chain(tmp_path / "run")
    assert names[-1] in capsys.readouterr().err
    assert all(torch.equal(bits(result.roles)[k], v) for k, v in whole[0].items())


def test_all_checkpoints_damaged(tmp_path, monkeypatch):
    chain(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        damage(path / "state.pt")
    with pytest.raises(RunError, match="all checkpoints are damaged"):
        chain(tmp_path / "run")


def test_another_run_in_the_folder_is_refused(tmp_path):
    chain(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(UsageError, match="holds another run"):
        chain(tmp_path / "run", batch_size=24)
    assert (tmp_path / "run" / "run.json").read_text() == before


def start(out, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, HERE / "killed.py", out, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.processes
def test_sigkill_at_random_times(tmp_path):
    expected = start(tmp_path / "whole")
    reference, _ = expected.communicate(timeout=120)
    times = random.Random(os.environ.get("LIMBECK_KILL_SEED", "0"))
    kills = 0
    for _ in range(4):
        process = start(tmp_path / "cut", "slow")
        deadline = time.monotonic() + 60
        while (
            not (tmp_path / "cut" / "history.jsonl").exists() and time.monotonic() < deadline and process.poll() is None
        ):
            time.sleep(0.02)
        time.sleep(times.uniform(0.0, 0.8) if kills == 0 else 3.0 + times.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    final = start(tmp_path / "cut")
    found, errors = final.communicate(timeout=120)
    assert final.returncode == 0, errors.decode()
    assert found == reference


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, number):
    process = start(tmp_path / "run", "slow")
    while not (tmp_path / "run" / "history.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Interrupted.exit_code
    assert b"run the same command again" in errors
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@dataclass(frozen=True)
class Again(Method):
    """Two stages that train the student with a helper; each makes its own, under one name."""

    trains: ClassVar = ("student", "helper")
    frozen: ClassVar = ()

    def stages(self, m, data):
        for i in range(2):
            m.helper = net(4, 1, seed=10 + i)
            yield Train(self.step, roles={"student": None, "helper": None}, data=data.train, span=(i / 2, (i + 1) / 2))

    def step(self, m, batch):
        loss = (m.helper(m.student(batch)).squeeze(1) - batch.y).square().mean()
        yield Update("student", loss)
        yield Update("helper", (m.helper(m.student(batch).detach()).squeeze(1) - batch.y).square().mean())


@pytest.mark.parametrize("after", [3, 6, 7, 9])  # in the first stage, at its end, and in the second
def test_a_role_that_each_stage_makes_anew_under_one_name_resumes(tmp_path, monkeypatch, after):
    def go(out):
        engine = Engine(steps=12, batch_size=16, checkpoint_every=2)
        optim = dict.fromkeys(("student", "helper"), Optim(lr=0.01))
        return execute(Again(), Roles(student=net(8, 6, 4, seed=2)), table(), engine, optim=optim, out=out)

    whole = bits(go(tmp_path / "whole").roles)
    with monkeypatch.context() as patch:
        die(patch, STEP, after)
        with pytest.raises(Killed):
            go(tmp_path / "run")
    found = bits(go(tmp_path / "run").roles)
    for key, value in whole.items():
        assert torch.equal(found[key], value), key
