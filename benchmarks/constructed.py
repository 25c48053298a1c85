"""What constructed and elastic students cost while they train, as ratios within one run.

    python benchmarks/constructed.py --out benchmarks/results/constructed.json

- A training step under 2:4 (mask with AdamW, CAST with AdamS) over the same step of the dense network with AdamW:
  GPT-2 of four layers and width 256, 4 x 128 tokens.
- A sub-network's call over the call of the extracted network, and a step of DepS with four networks over the sum of the four
  networks' own forward and backward passes and one optimizer step: MobileNetV3-Large, 8 images of 96 pixels.

Times are of the process's CPU, on one thread; what is compared takes turns.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from measuring import machine, options, report, spread
from torch import nn

from limbeck import Batch, Optim, Roles
from limbeck.convert.parametrized import Parametrize, under
from limbeck.losses.tokens import next_tokens, token_cross_entropy
from limbeck.methods.deps.method import DepS
from limbeck.nn.elastic import Elastic, MakeElastic
from limbeck.nn.nm import ScaledNM
from limbeck.optim.adams import AdamS
from limbeck.prove import seeded


def turns(what: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(rounds + 2):
        for name, call in what.items():
            start = time.process_time()
            call()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: values[2:] for name, values in times.items()}


def ratios(times: Mapping[str, list[float]], of: str, over: str) -> dict[str, Any]:
    """The spread of one time over another, round by round."""
    return spread([a / b for a, b in zip(times[of], times[over], strict=True)])


def language_model() -> nn.Module:
    """A small GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=1000, n_embd=256, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return seeded(0, lambda: GPT2LMHeadModel(config))


def sparse_step(kind: str | None) -> Callable[[], None]:
    """A whole training step, dense or under a parametrization."""
    model = language_model().train()
    if kind is not None:
        model, _ = Parametrize(f"limbeck.nn.nm:{kind}", {"n": 2, "m": 4})(model)
    x = {"input_ids": torch.randint(0, 1000, (4, 128), generator=torch.Generator().manual_seed(0))}
    labels = next_tokens(x)
    if kind == "ScaledNM":
        masks = {weight: made.mask for weight, made in under(model, ScaledNM)}
        optimizer: torch.optim.Optimizer = AdamS(model.parameters(), masks, decay=1e-4, steps=10_000, lr=1e-4)
    else:
        optimizer = Optim("adamw", lr=1e-4).build(model)

    def step() -> None:
        token_cross_entropy(model(**x).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def elastic() -> Roles:
    """MobileNetV3-Large and its sub-networks."""
    import timm

    net = seeded(0, lambda: timm.create_model("mobilenetv3_large_100", num_classes=100))
    return Roles(student=MakeElastic(DepS().space(net))(net)[0].train())


def elastic_times(rounds: int) -> dict[str, Any]:
    """Calls and steps of an elastic network over those of plain ones."""
    m, method = elastic(), DepS(delay=0.0, ramp=0.0)
    net = m.student.module
    assert isinstance(net, Elastic)
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    batch = Batch(x=images, y=torch.arange(8))
    archs = net.space.sandwich(Random(0), 4)  # what step 0 of seed 0 draws
    plain = [net.extract(arch).train() for arch in archs]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    other = torch.optim.SGD(plain[0].parameters(), lr=1e-6)
    target = torch.full((8, 100), 0.01)

    def supernet() -> None:
        for update in method.step(m, batch):
            update.backward(m)
        optimizer.step()
        optimizer.zero_grad()

    def passes() -> None:
        F.cross_entropy(plain[0](images), batch.y, label_smoothing=0.1).backward()
        for network in plain[1:]:
            F.cross_entropy(network(images), target).backward()
        other.step()
        for network in plain:
            network.zero_grad()

    calls = {}
    with torch.no_grad():
        for name, at in (("smallest", 1), ("random", 2)):
            what = {"elastic": partial(net, images, arch=archs[at]), "extracted": partial(plain[at], images)}
            calls[name] = ratios(turns(what, rounds), "elastic", "extracted")
    steps = turns({"supernet": supernet, "passes": passes}, max(4, rounds // 4))
    return {"call over extracted": calls, "step over its passes": ratios(steps, "supernet", "passes"), "ms": _ms(steps)}


def _ms(times: Mapping[str, list[float]]) -> dict[str, Any]:
    return {name: spread(values, 1) for name, values in times.items()}


def main() -> None:
    given = options(__doc__ or "", rounds=40)
    torch.set_num_threads(1)
    kinds = {"dense": None, "mask": "MaskedNM", "cast": "ScaledNM"}
    times = turns({name: sparse_step(kind) for name, kind in kinds.items()}, given.rounds)
    sparse = {name: ratios(times, name, "dense") for name in ("mask", "cast")}
    result = {
        "machine": machine("timm", "transformers"),
        "sparse step over dense": sparse,
        "sparse ms": _ms(times),
        "elastic": elastic_times(given.rounds),
    }
    report(result, given.out)


if __name__ == "__main__":
    main()
