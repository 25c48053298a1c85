"""What spares passes and memory in a few-step training step changes no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import UsageError
from limbeck.core.recipe import Recipe
from limbeck.core.roles import Role, Roles, held
from limbeck.data import Data, TensorSource
from limbeck.diffusion import Denoiser, Draws, Experts, RectifiedFlow, Sampler
from limbeck.diffusion.matching import discriminator_scores, matching_updates, predicted_and_scored
from limbeck.diffusion.scores import predicted
from limbeck.job import assemble
from limbeck.methods.sid.method import SiD
from limbeck.nn.time_mlp import TimeMLP
from limbeck.plan import plan_job
from limbeck.prove import seeded


def network(seed: int = 0, classes: int = 2) -> nn.Module:
    net = seeded(seed, lambda: TimeMLP(2, 16, classes=classes))
    return Denoiser(net, RectifiedFlow(), "flow_prediction", null=classes or None)


def batch(n: int = 8) -> Batch:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    return Batch(x=x, y=torch.arange(n) % 2, id=torch.arange(n))


def roles() -> Roles:
    return Roles(teacher=network(0), student=Sampler(network(1), (1.0,)), fake=network(2))


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    params = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]


def test_a_pass_that_stops_gives_what_the_whole_one_gives() -> None:
    role, b = Role("fake", network()), batch()
    late: list[None] = []
    role.module.net.last.register_forward_hook(lambda *_: late.append(None))
    t = torch.full((8,), 0.5)
    _, taps = role.features(b.x, "net.body", t=t, condition=b.y)
    assert len(late) == 1
    found = role.upto(b.x, "net.body", t=t, condition=b.y)
    assert len(late) == 1
    torch.testing.assert_close(found, taps["net.body"], rtol=0, atol=0)
    for one, other in zip(*(gradients(x.square().sum(), role.module) for x in (found, taps["net.body"])), strict=True):
        assert one.equal(other)
    assert not role.module.net.body._forward_hooks


def test_a_pass_stops_at_the_first_of_several_outputs_and_not_in_sharded_models() -> None:
    lstm = nn.Sequential(nn.LSTM(3, 4))
    assert Role("fake", lstm).upto(torch.ones(2, 5, 3), "0").shape == (2, 5, 4)
    role, late = Role("fake", nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))), list[None]()
    role.module[1].register_forward_hook(lambda *_: late.append(None))
    next(role.module.parameters()).device_mesh = None  # as a sharded parameter has one
    assert role.upto(torch.ones(1, 2), "0").shape == (1, 3)
    assert late


def test_a_pass_cannot_stop_where_it_does_not_come() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(UsageError, match="does not call this part"):
        Role("fake", Around()).upto(torch.ones(1, 2), "unused")
    with pytest.raises(UsageError, match="no such module"):
        Role("fake", Around()).upto(torch.ones(1, 2), "nowhere")


@pytest.mark.parametrize("scale", [1.0, 0.0, 4.5, torch.linspace(0.5, 4, 8)], ids=str)
@pytest.mark.parametrize("kind", ["one", "experts", "no classes"])
def test_prediction_and_scores_of_one_pass(kind: str, scale: Any) -> None:
    module = network(classes=0 if kind == "no classes" else 2)
    if kind == "experts":
        module = Experts([module, network(1)], owners=(0, 1))
    role, b, t = Role("fake", module), batch(), torch.linspace(0.1, 0.9, 8)
    y = None if kind == "no classes" else b.y
    calls: list[int] = []
    first = module.experts[0] if kind == "experts" else module
    first.register_forward_hook(lambda _m, given, _o: calls.append(len(given[0])))
    x_0, scores = predicted_and_scored(role, "net.body", b.x, t, y, scale)
    assert len(calls) == 1 or kind == "experts" or (kind == "one" and not isinstance(scale, Tensor) and scale == 0)
    torch.testing.assert_close(x_0, predicted(role, b.x, t, y, scale))
    torch.testing.assert_close(scores, discriminator_scores(role, "net.body", b.x, t, y))


def test_held_parameters_get_nothing_and_gradients_go_through() -> None:
    net, x = network(), batch().x.requires_grad_()
    net.net.first.bias.requires_grad_(False)
    learning = [p.requires_grad for p in net.parameters()]
    saved: list[int] = []

    def slope() -> Tensor:
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda s: (saved.__setitem__(-1, saved[-1] + s.nbytes), s)[1], lambda s: s
        ):
            loss = net(x, torch.full((8,), 0.5)).square().sum()
        x.grad = None
        loss.backward()
        return x.grad.clone()

    free = slope()
    net.zero_grad()
    with held(Role("fake", net)):
        assert slope().equal(free)
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert saved[1] < saved[0]
    assert [p.requires_grad for p in net.parameters()] == learning
    with pytest.raises(ZeroDivisionError), held(Role("fake", net)):
        _ = 1 / 0
    assert [p.requires_grad for p in net.parameters()] == learning


def test_the_students_update_of_sid_is_that_without_holding() -> None:
    m, b, method = roles(), batch(), SiD(steps=1, gan_weight=0.1, discriminator="net.body", guidance=2.0)
    _, update = method.step(m, b)
    inside = gradients(update.loss, m.student.module)
    outside = gradients(method.improve(m, Draws(m, b), b).loss, m.student.module)
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other)
    assert all(p.requires_grad for p in m.fake.parameters())


def test_in_a_loop_of_ones_own_fake_gets_no_gradient_of_the_students_loss() -> None:
    m, b = roles(), batch()
    for update in SiD(steps=1).step(m, b):
        m.fake.module.zero_grad()
        update.loss.backward()
        assert (update.role == "fake") == any(p.grad is not None for p in m.fake.parameters())


def test_what_is_added_for_fake_is_computed_when_the_student_has_moved() -> None:
    m, b = roles(), batch()
    order: list[str] = []

    def more(name: str) -> Any:
        def term() -> Tensor:
            order.append(name)
            return m[name].net.last[1].bias.sum() if name == "fake" else torch.tensor(3.0)

        return term

    x = m.student(b.x, condition=b.y)
    for update in matching_updates(m, b, x, more={"student": more("student"), "fake": more("fake")}):
        order.append(f"{update.role} moves")
    assert order == ["student", "student moves", "fake", "fake moves"]
    plain = [u.loss.item() for u in matching_updates(m, b, x)]
    both = [u.loss.item() for u in matching_updates(m, b, x, more={"student": more("student"), "fake": more("fake")})]
    added = m.fake.module.net.last[1].bias.sum().item()
    assert both == pytest.approx([plain[0] + 3, plain[1] + added])


def tiny(kind: str) -> Any:
    if kind == "unet":
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, num_class_embeds=3,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        )  # fmt: skip
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=2,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    pytest.importorskip("diffusers")
    path = {"unet": "net.mid_block", "transformer": "net.transformer_blocks.0"}[kind]
    first = seeded(0, lambda: tiny(kind))
    b = Batch(
        x=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        y=torch.tensor([0, 1]),
        id=torch.arange(2),
    )
    found = []
    for checkpointed in (False, True):
        nets = [
            Denoiser(copy.deepcopy(first), RectifiedFlow(), "flow_prediction", null=2, keyword="class_labels")
            for _ in "abc"
        ]
        for net in nets if checkpointed else ():
            net.net.enable_gradient_checkpointing()
        m = Roles(teacher=nets[0], student=Sampler(nets[1], (1.0,)), fake=nets[2])
        if kind == "unet":
            m.student.module.train(), m.fake.module.train()
        else:  # its dropped classes are drawn from the global generator, so train mode is left to what asks for it
            for net in nets[1:]:
                net.net.train()
                net.net.transformer_blocks.apply(lambda part: part.eval() if "Embed" in type(part).__name__ else None)
        found.append([])
        for update in SiD(steps=1, gan_weight=0.1, discriminator=path, guidance=2.0).step(m, b):
            m[update.role].module.zero_grad()
            update.loss.backward()
            found[-1] += [p.grad.clone() for p in m[update.role].parameters() if p.grad is not None]
    assert len(found[0]) == len(found[1]) > 20
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_plan_counts_passes_that_stop() -> None:
    data = Data(train=TensorSource(torch.randn(32, 2), torch.arange(32) % 2, classes=("a", "b")))
    given = {"name": "sid", "steps": 1, "gan_weight": 0.1, "discriminator": "net.body"}
    recipe = Recipe.parse(
        {"student": "student", "data": "digits", "method": given, "engine": {"batch_size": 8}, "out": "runs/x"}
    )
    job = assemble(recipe, {"teacher": network()}, network(), data, {}, None)
    cost = {role.name: role.flops for role in plan_job(job, gpu="a100-80gb").stages[0].roles}
    assert cost["teacher"] < cost["fake"] < 5 * cost["teacher"]
