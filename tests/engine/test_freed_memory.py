"""What is freed is kept for the next step, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from limbeck.core.memory import keep_freed_memory
done = keep_freed_memory()
for k in range(8):
    if k == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(1_000_000) for _ in range(20)]
    del parts
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    """Whether it was done, and the pages that five steps of 80 MB got from the system."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    done, pages = told.stdout.split()
    return done == "True", int(pages)


def test_a_step_gets_the_memory_of_the_one_before():
    done, pages = faults()
    if not done:
        pytest.skip("not glibc")
    assert pages < 100


def test_the_environment_has_the_last_word():
    done, pages = faults(MALLOC_TRIM_THRESHOLD_="1000000")
    assert not done
    if sys.platform == "linux":
        assert pages > 100


def test_the_command_line_does_it_for_its_own_process_alone(monkeypatch):
    from limbeck import cli

    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append(1))
    cli.main(["--version"])
    assert not calls
    monkeypatch.setattr(sys, "argv", ["limbeck", "--version"])
    cli.main()
    assert calls == [1]
