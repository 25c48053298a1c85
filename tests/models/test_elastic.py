"""Elastic models: a sub-network's call is the extracted model's, to the last bit."""

import copy
from random import Random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from limbeck.convert.record import load_student, save_student
from limbeck.convert.slicing import Slice
from limbeck.convert.sort_channels import SortChannels, importance
from limbeck.convert.structure import structure
from limbeck.core.errors import UsageError
from limbeck.core.roles import Role
from limbeck.evaluate.recalibrate import recalibrate
from limbeck.nn.elastic import Elastic, Extract, MakeElastic
from limbeck.nn.space import Space

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with a norm and dropout."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.fc2(self.drop(self.bn(self.fc1(x)).relu()))


def tower():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*(Block(8, 12) for _ in range(4))), nn.Linear(8, 3))


SPACE = Space({"1": (1, 2, 4), **{f"1.{i}.ffn": (3, 6, 12) for i in range(4)}})


def archs(space, count):
    rng = Random(1)
    return [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(count))]


@pytest.mark.parametrize("mode", [True, False])
def test_hundreds_of_sub_networks_are_their_extracted_models(mode):
    net = Elastic(tower(), SPACE).train(mode)
    for arch in archs(SPACE, 200):
        small = net.extract(arch)  # before the call, which moves running statistics
        for part in small.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        assert net(X, arch=arch).equal(small(X))
        assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())
    assert net.eval()(X).equal(net(X, arch=SPACE.largest()))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet26"])
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    parts = structure(model)
    sizes = {f"{d}.*.channels": (0.25, 0.5, 1.0) for d in parts.depths} | dict.fromkeys(parts.depths, (1, 2, 9))
    space = Space.of(model, sizes, divisor=8)
    net, images = Elastic(model, space), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for arch in archs(space, 6):
            assert net(images, arch=arch).equal(net.extract(arch)(images))


def test_smaller_kernels_are_the_middle_of_bigger_ones():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=4).eval()
    space = Space.of(model, {"*.kernel": (3, 5, 7), "*.channels": (0.5, 1.0)}, divisor=8)
    assert {sizes for name, sizes in space.choices.items() if name.endswith("kernel")} == {(3,), (3, 5)}
    net, images = Elastic(model, space), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for arch in archs(space, 6):
            assert net(images, arch=arch).equal(net.extract(arch)(images))
    name = next(name for name, sizes in space.choices.items() if sizes == (3, 5))
    small = net.extract({name: 3})
    conv, whole = (m.get_submodule(name.replace("kernel", "conv_dw")) for m in (small, model))
    assert conv.weight.equal(whole.weight[..., 1:4, 1:4])
    assert (conv.kernel_size, conv.padding) == ((3, 3), (1, 1))
    edges = whole.weight.detach().clone()
    whole.weight.data *= torch.nn.functional.pad(torch.ones(3, 3), (1, 1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images))  # zeros around the middle change nothing
    assert not whole.weight.equal(edges)
    with pytest.raises(UsageError, match="no such middle"):
        Elastic(model, Space({name: (4, 5)}))
    with pytest.raises(UsageError, match="keeps its middle"):
        Slice({name: [0, 1, 2]})(model)


def test_gradients_add_up_inside_and_are_zero_outside():
    net = Elastic(tower(), SPACE)
    arch = {**SPACE.smallest(), "1": 2}
    net(X, arch=arch).square().sum().backward()
    one = {n: p.grad.clone() for n, p in net.model.named_parameters() if p.grad is not None}
    first = net.model[1][0].fc1.weight.grad
    assert first[:3].ne(0).any()
    assert first[3:].eq(0).all()
    assert net.model[1][2].fc1.weight.grad is None
    net(X, arch=arch).square().sum().backward()
    for n, p in net.model.named_parameters():
        if n in one:
            torch.testing.assert_close(p.grad, 2 * one[n])


def test_the_gradient_is_that_of_the_extracted_model():
    net = Elastic(tower(), SPACE)
    arch = {"1": 4, "1.0.ffn": 6, "1.1.ffn": 3, "1.2.ffn": 12, "1.3.ffn": 6}
    small = net.extract(arch)
    for part in small.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    net(X, arch=arch).square().sum().backward()
    small(X).square().sum().backward()
    assert net.model[1][1].fc2.weight.grad[:, :3].equal(small[1][1].fc2.weight.grad)
    assert net.model[0].weight.grad.equal(small[0].weight.grad)


def test_running_statistics_are_the_whole_models_alone():
    net = Elastic(tower(), SPACE).train()
    net(X)
    before = copy.deepcopy(net.state_dict())
    for arch in archs(SPACE, 5):
        net(X, arch=arch)
    assert all(net.state_dict()[k].equal(v) for k, v in before.items())


def test_an_arch_is_an_argument_so_recomputation_runs_the_same():
    net = Elastic(tower(), SPACE).eval()
    arch, x = SPACE.smallest(), X.clone().requires_grad_()
    out = checkpoint(lambda x: net(x, arch=arch), x, use_reentrant=False)
    net(X, arch=SPACE.largest())  # something else ran in between
    out.sum().backward()
    found = x.grad.clone()
    x.grad = None
    net(x, arch=arch).sum().backward()
    assert found.equal(x.grad)


def test_dropout_is_the_whole_models_unless_asked_for():
    net = Elastic(tower(), SPACE).train()
    arch = SPACE.largest()
    assert net(X, arch=arch).equal(net(X, arch=arch))
    assert not net(X).equal(net(X))
    dropping = Elastic(tower(), SPACE, dropout=True).train()
    assert not dropping(X, arch=arch).equal(dropping(X, arch=arch))


def test_new_weights_are_seen_and_copies_are_their_own():
    net = Elastic(tower(), SPACE).eval()
    arch = SPACE.smallest()
    before = net(X, arch=arch)
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.model[0].weight.mul_(2)
    assert not net(X, arch=arch).equal(before)
    assert other(X, arch=arch).equal(before)
    assert net(X, arch=arch).equal(net.extract(arch)(X))


def test_a_frozen_role_thaws():
    role = Role("student", Elastic(tower(), SPACE))
    role.freeze()
    still = role(X, arch=SPACE.smallest())
    role.unfreeze()
    role.module.train()
    assert not role(X, arch=SPACE.smallest()).equal(still)  # statistics of the batch


def test_families_come_back_from_their_folder(tmp_path):
    net, record = MakeElastic(SPACE)(tower())
    net.eval()
    save_student(tmp_path / "family", net, [record])
    again = load_student(tmp_path / "family", tower())
    arch = archs(SPACE, 1)[-1]
    assert again(X, arch=arch).equal(net(X, arch=arch))
    small, second = Extract(arch)(net)
    save_student(tmp_path / "one", small, [record, second])
    assert load_student(tmp_path / "one", tower())(X).equal(small(X))


def test_sorting_changes_no_function_and_orders_every_block():
    net = tower().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
    ordered, record = SortChannels()(net)
    torch.testing.assert_close(ordered.eval()(X), net(X), rtol=1e-5, atol=1e-5)
    tensors = dict(ordered.named_parameters())
    for dim in structure(ordered).dims.values():
        assert (importance(dim, tensors).diff() <= 0).all()
    elastic, _ = SortChannels()(Elastic(net, SPACE))
    assert elastic.model[1][0].fc1.weight.equal(ordered[1][0].fc1.weight)
    assert record["kind"].endswith("sort_channels")


def test_recalibration_is_the_mean_and_variance_of_the_data_and_stays_outside():
    net = Elastic(tower(), SPACE).train()
    net(X)
    before = copy.deepcopy(net.state_dict())
    small = recalibrate(net.extract(SPACE.smallest()), [X])
    inner = small[1][0].fc1(small[0](X))
    torch.testing.assert_close(small[1][0].bn.running_mean, inner.mean(0))
    torch.testing.assert_close(small[1][0].bn.running_var, inner.var(0))
    assert small[1][0].bn.momentum == 0.1
    assert not small.training
    assert all(net.state_dict()[k].equal(v) for k, v in before.items())
    halves = recalibrate(net.extract(SPACE.smallest()), [X[:8], X[8:]])
    mean = torch.stack([small[1][0].fc1(small[0](x)).mean(0) for x in (X[:8], X[8:])]).mean(0)
    torch.testing.assert_close(halves[1][0].bn.running_mean, mean)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Elastic(tower(), Space({"2.0.ffn": (1, 2)})), "no such dimension"),
        (lambda: Elastic(tower(), Space({"1.0.ffn": (3, 13)})), "cannot be kept"),
        (lambda: Elastic(tower(), SPACE)(X, arch={"1": 3}), "no sub-network"),
        (lambda: Elastic(tower(), SPACE)(X, arch={"depth": 3}), "no sub-network"),
        (lambda: SortChannels(("x*",))(tower()), "nothing to sort"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(UsageError, match=words):
        call()
