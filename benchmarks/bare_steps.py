"""Training steps of the few-step methods as one would write them by hand for one kind of network, with nothing around.

All are for rectified flows, `x_t = (1 - t) x_0 + t eps`, and networks that predict `eps - x_0` for class labels. A discriminator
stops at the part that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import Batch

CLASSES, GUIDANCE = 4, 4.5
Step = Callable[[], None]


class Labelled(nn.Module):
    """A network of diffusers that is told a class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        return self.net(x, time, class_labels=y).sample


class Frames(nn.Module):
    """A network of images on each frame of clips `[B, C, T, H, W]`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        frames = x.movedim(2, 1)
        count = frames.shape[1]
        found = self.net(frames.flatten(0, 1), time.repeat_interleave(count), y.repeat_interleave(count))
        return found.view(frames.shape).movedim(1, 2)


class Stop(Exception):
    """What a discriminator reads is there."""


def wide(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (x.ndim - 1))


def x_0(net: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x - wide(t, x) * net(x, 999 * t, y)


def guided(net: Any, x: Tensor, t: Tensor, y: Tensor, scale: Any = GUIDANCE) -> Tensor:
    null = torch.full_like(y, CLASSES)
    some, none = x_0(net, torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    return none + scale * (some - none)


def noisy(x: Tensor, low: float = 0.02, high: float = 0.98) -> tuple[Tensor, Tensor]:
    t = low + (high - low) * torch.rand(len(x))
    return (1 - wide(t, x)) * x + wide(t, x) * torch.randn_like(x), t


def denoising(net: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    x = x.detach()
    x_t, t = noisy(x, 0.001, 1.0)
    found = x_0(net, x_t, t, y) if scale == 1 else guided(net, x_t, t, y, scale)
    return (((1 - wide(t, x)) / wide(t, x)) ** 2 * (found - x).square()).mean()


def moved(x: Tensor, gradient: Tensor) -> Tensor:
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def unwrap(module: Any) -> Any:
    """The networks inside a sampler, experts and a denoiser."""
    module = getattr(module, "denoiser", module)
    return [unwrap(expert) for expert in module.experts] if hasattr(module, "experts") else module.net


def part_of(net: Any) -> nn.Module:
    """What the discriminator reads."""
    return net.net.mid_block


def read(net: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The scores of a discriminator inside a network, which goes no further."""
    taken: list[Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
        taken.append(output)
        raise Stop

    hook = part_of(net).register_forward_hook(stop)
    try:
        net(x, 999 * t, y)
    except Stop:
        pass
    finally:
        hook.remove()
    return taken[0].mean(1).clamp(-10, 10)


def told(net: Any, real: Tensor, made: Tensor, y: Tensor) -> Tensor:
    (a, t), (b, _) = noisy(real), noisy(made.detach())
    return (F.softplus(-read(net, a, t, y)) + F.softplus(read(net, b, t, y))).mean()


def fooled(net: Any, x: Tensor, y: Tensor) -> Tensor:
    x_t, t = noisy(x)
    return F.softplus(-read(net, x_t, t, y)).mean()


class Trainer:
    """Networks, and an optimizer for each that learns; their parameters need a gradient only while they do."""

    def __init__(self, nets: Mapping[str, nn.Module], learning: tuple[str, ...], rate: float) -> None:
        kept = {id(p) for p in nets["teacher"].parameters()}  # adapters learn on weights that are the teacher's
        self.params = {name: [p for p in nets[name].parameters() if id(p) not in kept] for name in learning}
        self.adam = {name: torch.optim.Adam(params, lr=rate, fused=True) for name, params in self.params.items()}
        self.hold(*learning)

    def hold(self, *names: str) -> None:
        for p in chain(*(self.params[name] for name in names)):
            p.requires_grad_(False)

    def free(self, name: str) -> None:
        for p in self.params[name]:
            p.requires_grad_(True)

    def learn(self, name: str, loss: Tensor) -> None:
        loss.backward()
        self.adam[name].step()
        self.adam[name].zero_grad()
        self.hold(name)


def swiftbrush(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    teacher, student, fake = (unwrap(nets[name]) for name in ("teacher", "student", "fake"))
    z, y = batch.x, batch.y

    def step() -> None:
        go.free("student")
        x = x_0(student, z, torch.ones(len(z)), y)
        with torch.no_grad():
            x_t, t = noisy(x)
            gap = wide((1 - t) * t, x) * (guided(fake, x_t, t, y) - guided(teacher, x_t, t, y))
        go.learn("student", moved(x, gap))
        go.free("fake")
        go.learn("fake", denoising(fake, x, y))

    return step


def vsd(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    """Its student is a generator here; what follows it is not guided."""
    teacher, student, fake = (unwrap(nets[name]) for name in ("teacher", "student", "fake"))
    z, y = batch.x, batch.y

    def step() -> None:
        go.free("student")
        x = x_0(student, z, torch.ones(len(z)), y)
        with torch.no_grad():
            x_t, t = noisy(x)
            gap = wide((1 - t) * t, x) * (x_0(fake, x_t, t, y) - guided(teacher, x_t, t, y))
        go.learn("student", moved(x, gap) * x[0].numel())
        go.free("fake")
        go.learn("fake", denoising(fake, x, y) * x[0].numel())

    return step


def diversity(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    """Of language models: `drawn` are the samples of a prompt and their tokens; vectors are the teacher's embeddings."""
    teacher, student = nets["teacher"], nets["student"]
    n, length = drawn
    prompt, negative = (x["input_ids"].repeat_interleave(n, 0) for x in (batch.x, batch.negative))

    @torch.no_grad()
    def sampled() -> Tensor:
        found, ids, cache = [], prompt, None
        for _ in range(length):
            output = student(input_ids=ids, cache=cache, use_cache=True)
            ids, cache = torch.multinomial(output.logits[:, -1].softmax(-1), 1), output.cache
            found.append(ids)
        return torch.cat(found, 1)

    def said(net: Any, before: Tensor, tokens: Tensor) -> Tensor:
        logits = net(input_ids=torch.cat([before, tokens], 1)).logits
        return logits[:, before.shape[1] - 1 : -1].log_softmax(-1)

    def step() -> None:
        go.free("student")
        student.eval()
        tokens = sampled()
        student.train()
        own = said(student, prompt, tokens)
        with torch.no_grad():
            plain, away = said(teacher, prompt, tokens), said(teacher, negative, tokens)
            target = (away + GUIDANCE * (plain - away)).log_softmax(-1)
            v = F.normalize(teacher.get_input_embeddings()(tokens).mean(1), dim=-1).view(-1, n, teacher.config.n_embd)
            each = (1 - v @ v.mT).sum(-1)
            weights = 2 / n * (each / (n - 1) - (each.sum(1, keepdim=True) - 2 * each) / ((n - 1) * (n - 2)))
        gap = (own.exp() * (own - target)).sum((1, 2)).mean()
        chosen = own.gather(-1, tokens[..., None]).sum((1, 2)).view(-1, n)
        go.learn("student", gap - 15 * (weights * chosen).sum(1).mean())

    return step


def sid(
    nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int], scale: float = 1.0, adversarial: bool = False
) -> Step:
    teacher, student, fake = (unwrap(nets[name]) for name in ("teacher", "student", "fake"))
    real, y = batch.x, batch.y

    def made(k: int) -> Tensor:
        found = torch.randn_like(real)
        for i in range(k):
            t = torch.full((len(real),), 1 - i / 4)
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == k - 1):
                found = x_0(student, (1 - wide(t, real)) * found + wide(t, real) * torch.randn_like(real), t, y)
        return found

    def score(net: Any, x_t: Tensor, t: Tensor) -> Tensor:
        return x_0(net, x_t, t, y) if scale == 1 else guided(net, x_t, t, y, scale)

    def step() -> None:
        with torch.no_grad():
            x = made(drawn[1])
        go.free("fake")
        loss = denoising(fake, x, y, scale)
        go.learn("fake", loss + told(fake, real, x, y) / 2 if adversarial else loss)
        go.free("student")
        x = made(drawn[0])
        x_t, t = noisy(x)
        taken: list[Tensor] = []
        hook = part_of(fake).register_forward_hook(lambda _m, _a, output: taken.append(output)) if adversarial else None
        a, b = score(teacher, x_t, t), score(fake, x_t, t)
        weight = 1 / (x - a).abs().flatten(1).mean(1).detach()
        loss = (weight * ((a - b) * (b - x)).flatten(1).sum(1)).mean()
        if hook is not None:
            hook.remove()
            loss = loss + 0.1 * F.softplus(-taken[0].mean(1)).mean() * real[0].numel()
        go.learn("student", loss)

    return step


def sid_guided(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    return sid(nets, go, batch, drawn, scale=GUIDANCE)


def sid_discriminator(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    return sid(nets, go, batch, drawn, adversarial=True)


def dmd(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int], adversarial: bool = False) -> Step:
    """Distribution matching, for one student or for two that share out the classes."""
    teacher, students, fakes = (unwrap(nets[name]) for name in ("teacher", "student", "fake"))
    students, fakes = ([net] if isinstance(net, nn.Module) else net for net in (students, fakes))
    of = batch.y * len(students) // CLASSES
    order = of.argsort(stable=True)
    sizes = torch.bincount(of).tolist()
    real, y = batch.x[order], batch.y[order]

    def each(call: Callable[..., Tensor], networks: list[Any], *given: Tensor) -> Tensor:
        parts = zip(networks, *(value.split(sizes) for value in given), strict=True)
        return torch.cat([call(net, *values) for net, *values in parts])

    def mean(call: Callable[..., Tensor], *given: Tensor) -> Tensor:
        parts = zip(fakes, *(value.split(sizes) for value in given), strict=True)
        return torch.stack([call(net, *values) for net, *values in parts]).sum()

    def step() -> None:
        go.free("student")
        x = each(x_0, students, torch.randn_like(real), torch.ones(len(y)), y)
        with torch.no_grad():
            x_t, t = noisy(x)
            a, b = x_0(teacher, x_t, t, y), each(x_0, fakes, x_t, t, y)
            gap = (b - a) / wide((x - a).abs().flatten(1).mean(1), x)
        loss = moved(x, gap)
        go.learn("student", loss + 3e-3 * mean(fooled, x, y) if adversarial else loss)
        go.free("fake")
        x = x.detach()
        loss = mean(denoising, x, y)
        go.learn("fake", loss + 1e-2 * mean(told, real, x, y) if adversarial else loss)

    return step


def msd_discriminator(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    return dmd(nets, go, batch, drawn, adversarial=True)


def phased_dmd(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    """Its first phase: two of four steps, to time 0.5."""
    teacher, (student, _), fake = (unwrap(nets[name]) for name in ("teacher", "student", "fake"))
    z, y, end, times = batch.x, batch.y, 0.5, (1.0, 0.75, 0.5)
    go.params["student"] = list(student.parameters())

    def made(k: int) -> Tensor:
        x = torch.randn_like(z)
        for i in range(k):
            t, then = times[i], end if i == k - 1 else times[i + 1]
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == k - 1):
                x = x + (then - t) * student(x, torch.full((len(z),), 999 * t), y)
        return x

    def more(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = 0.52 + 0.48 * torch.rand(len(x))
        ratio = (1 - t) / (1 - end)
        sigma, noise = (t**2 - ratio**2 * end**2).sqrt(), torch.randn_like(x)
        return wide(ratio, x) * x + wide(sigma, x) * noise, t, noise

    def step() -> None:
        with torch.no_grad():
            x = made(drawn[1])
            x_t, t, noise = more(x)
        go.free("fake")
        u = fake(x_t, 999 * t, y)
        go.learn("fake", (u - (noise - x)).square().mean())
        go.free("student")
        x = made(drawn[0])
        with torch.no_grad():
            x_t, t, _ = more(x)
            gap = wide(1 - t, x) * (x_0(fake, x_t, t, y) - guided(teacher, x_t, t, y))
        go.learn("student", moved(x, gap))

    return step


def mdt_dist(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    teacher, student = unwrap(nets["teacher"]), unwrap(nets["student"])
    real, y = batch.x, batch.y

    @torch.no_grad()
    def slope(x_t: Tensor, t: Tensor, v: Tensor, phi: Tensor) -> Tensor:
        return (phi.detach() - student(x_t - 0.01 * v, 999 * (t - 0.01), y)) / 0.01

    def step() -> None:
        go.free("student")
        t, noise = 0.01 + 0.99 * torch.rand(len(real)), torch.randn_like(real)
        x_t = (1 - wide(t, real)) * real + wide(t, real) * noise
        with torch.no_grad():
            v = teacher(x_t, 999 * t, y)
        phi = student(x_t, 999 * t, y)
        (phi + wide(t, real) * slope(x_t, t, v, phi) - v).square().mean().backward()
        x = x_0(student, torch.randn_like(real), torch.ones(len(real)), y)
        with torch.no_grad():
            x_t = (1 - wide(t, real)) * x + wide(t, real) * noise
            v, phi = teacher(x_t, 999 * t, y), student(x_t, 999 * t, y)
            gap = phi + wide(t, real) * slope(x_t, t, v, phi) - v
        go.learn("student", moved(x, -wide(1 - t, x) * gap))

    return step


def mcm(nets: Any, go: Trainer, batch: Batch, drawn: tuple[int, int]) -> Step:
    teacher, student, average = (unwrap(nets[name]) for name in ("teacher", "student", "student_average"))
    head, head_average, critic = (nets[name] for name in ("head", "head_average", "discriminator"))
    clips, y = batch.x, batch.y

    def follow(slow: nn.Module, fast: nn.Module) -> None:
        torch._foreach_lerp_(list(slow.parameters()), [p.detach() for p in fast.parameters()], 0.05)

    def huber(a: Tensor, b: Tensor) -> Tensor:
        return (((a - b).square() + 1e-6).sqrt() - 1e-3).mean()

    def shown(x: Tensor) -> Tensor:
        return x[:, :, ::2].movedim(2, 1).flatten(0, 1)

    def step() -> None:
        go.free("student")
        x_t, t = noisy(clips)
        with torch.no_grad():
            there = guided(teacher, x_t, t, y, 5 + 10 * wide(torch.rand(len(t)), clips))
            s = t - 0.02
            x_s = x_t + wide((s - t) / t, clips) * (x_t - there)
            goal = head_average(x_0(average, x_s, s, y))
        made = x_0(student, x_t, t, y)
        go.learn("student", huber(head(made), goal) - critic(shown(made)).mean())
        follow(average, student)
        made = made.detach()
        go.free("head")
        go.learn("head", huber(head(made), goal))
        follow(head_average, head)
        go.free("discriminator")
        a, b = shown(clips), shown(made)
        loss = ((-critic(a)).clamp_min(-1) + critic(b).clamp_min(-1)).mean()
        mid = torch.lerp(b, a, torch.rand(len(a), 1, 1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mid).sum(), mid, create_graph=True)
        go.learn("discriminator", loss + 1e-5 * (slope.flatten(1).norm(dim=1) - 1).square().mean())

    return step


STEPS: dict[str, Callable[[Any, Trainer, Batch, tuple[int, int]], Step]] = {
    "swiftbrush": swiftbrush,
    "vsd": vsd,
    "diversity_cfg": diversity,
    "sid": sid,
    "sid, guided": sid_guided,
    "sid, discriminator": sid_discriminator,
    "dmd": dmd,
    "msd": dmd,
    "msd, discriminator": msd_discriminator,
    "phased_dmd": phased_dmd,
    "mdt_dist": mdt_dist,
    "mcm": mcm,
}


def bare_step(
    name: str,
    nets: Mapping[str, nn.Module],
    learning: tuple[str, ...],
    batch: Batch,
    drawn: tuple[int, int],
    rate: float,
) -> Step:
    """A whole training step: passes, updates of all that learn, averages.

    Args:
        name: Of `STEPS`.
        nets: The networks by role; changed.
        learning: Those that learn.
        batch: The batch.
        drawn: Steps that the student takes for itself and for what follows it.
        rate: Of Adam.
    """
    for net in nets.values():
        net.requires_grad_(False)
    return STEPS[name](nets, Trainer(nets, learning, rate), batch, drawn)
