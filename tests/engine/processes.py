"""Run by the tests of several processes: trains a case, writes the weights and losses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from programs import Gan, Mimic, accuracy, gan_data, gan_roles, net, table
from safetensors.torch import save_file
from torch.nn import functional as F

from limbeck import Engine, Method, Optim, Roles, Update
from limbeck.data import TensorSource
from limbeck.diffusion import Cosine, Denoiser
from limbeck.engine.run import execute
from limbeck.methods.sid.method import SiD
from limbeck.nn.time_mlp import TimeMLP
from limbeck.prove import seeded

SGD = Optim("sgd", lr=0.1, momentum=0.9, clip=1.0)
SHARDED = {"shard": ("student",), "shard_gan": Gan.trains, "shard_sid": ("student", "fake")}


class Tokens(Method):
    """A mean over an uneven number of items in each part."""

    frozen = ()

    def step(self, m, batch):
        mask = batch.y > 1
        loss = (m.student(batch).logsumexp(1) * mask).sum() / mask.sum().clamp(min=1)
        yield Update("student", loss, count=mask.sum(), apply=False)
        yield Update("student", F.cross_entropy(m.student(batch), batch.y))


class Collected(Method):
    """Gradients of several losses, applied by an update that brings none."""

    frozen = ()

    def step(self, m, batch):
        for scale in (0.5, 2.0):
            yield Update("student", F.cross_entropy(scale * m.student(batch), batch.y), apply=False)
        yield Update("student")


def sid():
    """Three networks of one form, passes that stop half-way, and one that is held while another learns through it."""
    teacher, student = (
        seeded(k, lambda: Denoiser(TimeMLP(2, 16, classes=3), Cosine(), "sample", null=3)) for k in (1, 2)
    )
    g = torch.Generator().manual_seed(0)
    data = TensorSource(torch.randn(96, 2, generator=g), torch.arange(96) % 3)
    method = SiD(steps=2, gan_weight=0.3, gan_start=0.0, discriminator="net.body")
    return method, Roles(teacher=teacher, student=student), SimpleNamespace(train=data)


def case(name):
    """Method, roles, data."""
    if name.endswith("gan"):
        return Gan(), gan_roles(), SimpleNamespace(train=gan_data)
    if name == "shard_sid":
        return sid()
    students = Roles(student=net(8, 6, 4, seed=2))
    if name in ("tokens", "collected"):
        return (Tokens() if name == "tokens" else Collected()), students, table()
    students.teacher = net(8, 32, 4, seed=1)
    return Mimic(), students, table()


def main():
    torch.set_num_threads(1)
    name, processes, micro, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    method, roles, data = case("mimic" if name in ("shard", "resume") else name)
    engine = Engine(
        steps=6, batch_size=12 if name.endswith("gan") else 32, processes=processes, micro_batches=micro, device="cpu",
        log_every=1, checkpoint_every=4, shard=SHARDED.get(name, ()) if processes > 1 else (),
    )  # fmt: skip
    optim = dict.fromkeys((*method.trains, *method.makes), SGD)
    evaluate = accuracy if not name.endswith(("gan", "sid")) else None
    result = execute(method, roles, data, engine, optim=optim, evaluate=evaluate, out=out / "run")
    from limbeck.engine.checkpoint import Checkpoints

    (end,) = (p.name for p in (out / "run" / "checkpoints").glob("*-train-end"))
    saved, _ = Checkpoints(out / "run" / "checkpoints", 2).load(end)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    keys = [k for row in result.history for k in row if k.startswith("train/loss")]
    losses = {k: [row[k] for row in result.history if k in row] for k in sorted(set(keys))}
    (out / "losses.json").write_text(json.dumps(losses))
    save_file({f"{r}.{k}": v for r, state in saved.items() for k, v in state.items()}, out / "weights.safetensors")


if __name__ == "__main__":
    main()
