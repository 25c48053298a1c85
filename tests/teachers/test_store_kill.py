"""A collection killed at some moment and started again leaves the files of one that never was."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_programs import Points, Slow, collect_slowly

from limbeck.teachers import OutputStore

PROGRAM = Path(__file__).with_name("store_programs.py")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    collect_slowly(folder)
    return contents(folder)


def start(folder, *words):
    return subprocess.Popen([sys.executable, PROGRAM, folder, *words], stdout=subprocess.PIPE, text=True)


def check_valid(folder, least):
    """The store is whole as far as it goes, and right."""
    store, data = OutputStore(folder), Points(200)
    assert least <= len(store) < 400
    have = ~store.missing(data.ids, 0)
    with torch.no_grad():
        exact = Slow().eval().net(data.x[have])
    torch.testing.assert_close(store.read(data.ids[have])["output"], exact)


@pytest.mark.processes
def test_killed_in_the_middle_of_writing_a_shard(tmp_path, whole):
    child = start(tmp_path, "half")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("*.part")
    assert left.stat().st_size > 0
    check_valid(tmp_path, least=6 * 8)
    assert len(OutputStore(tmp_path)) == 6 * 8
    collect_slowly(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.processes
def test_killed_at_random_moments(tmp_path, whole):
    draw = random.Random(0)
    done = 0
    for _ in range(2):
        child = start(tmp_path)
        batches = draw.randint(4, 15)
        for _ in range(batches):
            assert child.stdout.readline() == "batch\n"
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        done += 8 * (batches - 1)  # all but the last were written
        check_valid(tmp_path, least=done)
    collect_slowly(tmp_path)
    assert contents(tmp_path) == whole
    assert os.listdir(tmp_path)
