"""How long `limbeck --help` takes, and what `import limbeck` adds to a bare interpreter: wall time of fresh processes.

python benchmarks/startup.py --out benchmarks/results/startup.json
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measuring import machine, options, report, spread


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall time and CPU time of a command that must succeed."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    asked = options(__doc__.splitlines()[0], repeats=10)
    beside = Path(sys.executable).with_name("limbeck")
    limbeck = str(beside) if beside.exists() else shutil.which("limbeck")
    if limbeck is None:
        raise SystemExit("there is no `limbeck` command: pip install -e .")
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "import_limbeck": [sys.executable, "-c", "import limbeck"],
        "limbeck_help": [limbeck, "--help"],
    }
    for command in commands.values():
        seconds(command)  # files are in the cache from here on
    runs = [{name: seconds(command) for name, command in commands.items()} for _ in range(asked.repeats)]
    result = {
        "machine": machine(),
        "aims_s": {"limbeck_help": 0.5, "import_limbeck_minus_python": 0.2},
        "wall_s": {name: spread([run[name][0] for run in runs]) for name in commands},
        "cpu_s": {name: spread([run[name][1] for run in runs]) for name in commands},
        "import_limbeck_minus_python_wall_s": spread([r["import_limbeck"][0] - r["python"][0] for r in runs]),
    }
    report(result, asked.out)


if __name__ == "__main__":
    main()
