"""Run by the resume tests: a chain of stages whose end state is printed as a hash."""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from programs import Chain, accuracy, net, table

from limbeck import Engine, Optim, Roles
from limbeck.core.errors import LimbeckError
from limbeck.engine.run import execute


class Slow(Chain):
    def after_update(self, m, role):
        if "slow" in sys.argv:
            time.sleep(0.01)


def main():
    torch.set_num_threads(1)
    engine = Engine(epochs=20, batch_size=16, checkpoint_every=2, log_every=2)
    optim = {"student": Optim(lr=0.003)}
    roles = Roles(teacher=net(8, 32, 4, seed=1))
    try:
        result = execute(Slow(), roles, table(), engine, optim=optim, out=Path(sys.argv[1]), evaluate=accuracy)
    except LimbeckError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = [{k: v for k, v in row.items() if k != "time"} for row in result.history]
    total = hashlib.sha256(json.dumps(rows).encode())
    for _, role in sorted(result.roles.items()):
        for tensor in role.module.state_dict().values():
            total.update(tensor.numpy().tobytes())
    print(total.hexdigest())
    return 0


if __name__ == "__main__":
    sys.exit(main())
