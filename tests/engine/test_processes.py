"""Several processes with the same global batch compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
pytestmark = pytest.mark.processes


def go(name, processes, micro, out):
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "processes.py", name, str(processes), str(micro), out],
        env=environment, capture_output=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return load_file(out / "weights.safetensors"), json.loads((out / "losses.json").read_text())


@pytest.mark.parametrize("name", ["mimic", "gan", "tokens", "collected", "shard", "shard_gan", "shard_sid"])
def test_two_processes_equal_one(tmp_path, name):
    pytest.importorskip("lightning")
    weights, losses = go(name, 1, 1, tmp_path / "one")
    found, found_losses = go(name, 2, 1 if name.startswith("shard") else 2, tmp_path / "two")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    for key, values in losses.items():
        assert found_losses[key] == pytest.approx(values, abs=1e-5)
