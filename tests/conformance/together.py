"""Run by the suite: cases on two processes, which find each other through Lightning Fabric; writes what they end in."""

import sys
from pathlib import Path

import torch
from cases import CASES, bits, rows, run


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = run(CASES[name], processes=2)
        if torch.distributed.get_rank() == 0:
            torch.save({"bits": bits(result.roles), "rows": rows(result)}, out / f"{name}.pt")
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
