"""TinyCLIP: the checks of its losses, its inheritance and its masks; a run of two stages; what it refuses."""

import math

import pytest
import torch

from limbeck import Engine, Optim, Roles
from limbeck.convert.masks import AddMasks, PruneMasked
from limbeck.core.errors import UsageError
from limbeck.data import TensorSource
from limbeck.data.image_text import ImageText, captioned
from limbeck.data.procedural import shapes, words
from limbeck.data.text import TextSource
from limbeck.engine.run import execute
from limbeck.evaluate.tasks import ZeroShot, evaluator
from limbeck.losses import affinity_mimicking, clip_loss
from limbeck.losses.affinity import affinities
from limbeck.methods.tinyclip.method import Inherit, TinyCLIP
from limbeck.methods.tinyclip.proof import clip
from limbeck.nn.hard_concrete import Budget, HardConcrete, ramp
from limbeck.prove import seeded

DATA = shapes(count=96, held_out=36)
BATCH = DATA.train.batch(torch.arange(24), 0)


def embedded(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2)]


def model(seed=0):
    return seeded(seed, clip).eval()


def test_a_student_that_is_the_teacher_has_its_entropy_and_no_gradient():
    images, texts = embedded(0)
    logits = affinities(images, texts, 5.0).requires_grad_()
    p = logits.detach().softmax(1)
    entropy = (
        -(p * p.log()).sum(1).mean() - (logits.detach().softmax(0) * logits.detach().log_softmax(0)).sum(0).mean()
    ) / 2
    images.requires_grad_()
    loss = affinity_mimicking(images, texts, images.detach(), texts, student_scale=5.0, teacher_scale=5.0)
    torch.testing.assert_close(loss, entropy)
    (gradient,) = torch.autograd.grad(loss, images)
    assert gradient.abs().max() < 1e-12


def test_limits_of_the_teachers_scale():
    (images, texts), (own, _) = embedded(0), embedded(1)
    sharp = affinity_mimicking(images, texts, own, own, student_scale=3.0, teacher_scale=1e6)
    torch.testing.assert_close(sharp, clip_loss(images, texts, scale=3.0))  # one-hot on the diagonal
    logits = affinities(images, texts, 3.0)
    uniform = -(logits.log_softmax(1).mean(1).mean() + logits.log_softmax(0).mean(0).mean()) / 2
    flat = affinity_mimicking(images, texts, own, own, student_scale=3.0, teacher_scale=0.0)
    torch.testing.assert_close(flat, uniform)


def test_order_of_pairs_and_rotations_do_not_matter():
    (images, texts), (a, b) = embedded(0), embedded(1)
    loss = affinity_mimicking(images, texts, a, b)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    moved = affinity_mimicking(images[order] @ turn, texts[order] @ turn, a[order], b[order])
    torch.testing.assert_close(moved, loss)


@pytest.mark.parametrize(("alpha", "open_"), [(0.0, 0.83182), (math.log(100), 0.99798), (math.log(0.01), 0.04713)])
def test_probabilities_of_gates(alpha, open_):
    gate = HardConcrete(1, initial=alpha)
    assert gate.open_probability().item() == pytest.approx(open_, abs=1e-5)
    # P(z = 1) = sigmoid(alpha - (2/3) ln 11), by drawing
    drawn = HardConcrete(200_000, initial=alpha).sample(torch.Generator().manual_seed(0))
    full = 1 / (1 + math.exp(-(alpha - 2 / 3 * math.log(11))))
    assert (drawn == 1).double().mean().item() == pytest.approx(full, abs=0.005)
    assert (drawn > 0).double().mean().item() == pytest.approx(open_, abs=0.005)


def test_inheriting_all_changes_no_bit():
    whole = model()
    full = {"vision_model.width": 64, "vision_model.*.heads": 4, "text_model.encoder.layers": 4}
    one, other = Inherit(full)(whole)[0](**BATCH.x), whole(**BATCH.x)
    assert one.image_embeds.equal(other.image_embeds)
    assert one.text_embeds.equal(other.text_embeds)


def test_layers_come_from_the_whole_depth_and_heads_stay_whole():
    whole = model()
    small, record = Inherit({"text_model.encoder.layers": 2, "vision_model.*.heads": 2})(whole)
    assert record["keep"]["text_model.encoder.layers"] == [0, 2]
    big, cut = whole.vision_model.encoder.layers[1].self_attn, small.vision_model.encoder.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        assert getattr(cut, name).weight.equal(getattr(big, name).weight[:32])
    assert cut.out_proj.weight.equal(big.out_proj.weight[:, :32])
    uneven = seeded(0, clip)
    assert Inherit({"text_model.encoder.layers": 3})(uneven)[1]["keep"]["text_model.encoder.layers"] == [0, 1, 2]


def test_masked_is_pruned_and_what_is_left_is_what_was_counted():
    gated, _ = AddMasks(("*width", "*.heads", "*.ffn"))(model())
    g = torch.Generator().manual_seed(0)
    for gate in gated.gates:
        gate.alpha.data.copy_(2 * torch.randn(gate.alpha.shape, generator=g))
    pruned, _ = PruneMasked()(gated.eval())
    one, other = gated(**BATCH.x), pruned(**BATCH.x)
    torch.testing.assert_close(one.image_embeds, other.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.text_embeds, other.text_embeds, rtol=1e-4, atol=1e-5)
    for gate in gated.gates:  # quite open or quite shut: what is expected is what is left
        gate.alpha.data.copy_(torch.where(~gate.shut(), 60.0, -60.0))
    left = dict(PruneMasked()(gated)[0].named_parameters())
    count = sum(left[name].numel() for name in gated.gates.sizes)
    assert gated.gates.sparsity().item() == pytest.approx(1 - count / gated.gates.total, abs=1e-6)


def test_the_budget_pushes_until_it_is_met():
    budget = Budget()
    p = torch.tensor(0.2, requires_grad=True)
    budget(p, 0.5).backward()
    assert budget.linear.grad.item() == pytest.approx(0.3)
    assert budget.quadratic.grad.item() == pytest.approx(0.09)
    assert p.grad.item() == pytest.approx(-(10 + 20 * 0.3), abs=1e-5)
    p = torch.tensor(0.6, requires_grad=True)
    loss = budget(p, 0.5)
    loss.backward()
    assert loss.item() == 0
    assert p.grad.item() == 0
    assert [ramp(0.25, 0.5, step, 10) for step in (0, 10, 99)] == [0.25, 0.5, 0.5]


ENGINE = Engine(steps=8, batch_size=24, device="cpu", evaluate_every=0, log_every=1)


def run(method, student=None, out=None, lr=1e-3):
    teacher = model()
    m = Roles(teacher=teacher, student=student or Inherit({})(teacher)[0])
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    result = execute(method, m, DATA, ENGINE, optim={"student": Optim(lr=lr)}, out=out)
    assert all(before[name].equal(p) for name, p in m.teacher.module.state_dict().items())
    return result, m


def test_two_stages_by_masks(tmp_path):
    method = TinyCLIP(sparsity=(0.2, 0.4), mask_lr=3.0, mask_share=0.75, ramp=0.3)
    _, m = run(method, out=tmp_path / "run")
    small = m.student.module
    assert not hasattr(small, "gates")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in m.teacher.module.parameters())
    assert small.logit_scale.item() == pytest.approx(math.log(50.0))
    assert m.student(BATCH).shape == (24, 2, 32)


def test_masks_that_do_not_arrive_are_told():
    with pytest.warns(UserWarning, match="the masks ended at"):
        _, m = run(TinyCLIP(sparsity=(0.5,), mask_lr=0.01))
    assert m.budget_0.module.linear.item() > 10  # it ascends


def test_two_stages_by_rule():
    keep = ({"text_model.encoder.layers": 3}, {"text_model.encoder.layers": 2, "vision_model.width": 48})
    result, m = run(TinyCLIP(keep=keep, label_weight=0.5, scale=None))
    assert m.student.module.config.text_config.num_hidden_layers == 2
    assert 0 <= m.student.module.logit_scale.item() <= math.log(100.0)
    assert {"affinity", "contrastive"} <= {name.split("/")[-1] for row in result.history for name in row}


def test_gates_have_a_rate_of_their_own():
    method = TinyCLIP(sparsity=(0.3,), mask_lr=0.5)
    m = Roles(teacher=model(), student=AddMasks(("*.heads",))(model())[0])
    groups = method.optimizer(m, "student", Optim(lr=1e-3)).param_groups
    gates = {id(p) for p in m.student.module.gates.parameters()}
    assert {g["lr"] for g in groups for p in g["params"] if id(p) in gates} == {0.5}
    assert {g["lr"] for g in groups for p in g["params"] if id(p) not in gates} == {1e-3}


def test_gradients_reach_the_student_and_the_gates_alone():
    m = Roles(teacher=model(), student=AddMasks(("*.heads",))(model(1))[0])
    m.budget_0 = Budget()
    m.freeze("teacher")
    m.student.module.train()
    first, second = TinyCLIP(sparsity=(0.5,)).masked(replace_total(m), BATCH, "budget_0", 0.0, 0.5)
    first.backward(m)
    assert all(gate.alpha.grad.ne(0).any() for gate in m.student.module.gates)
    assert m.budget_0.module.linear.grad is None
    second.backward(m)
    assert m.budget_0.module.linear.grad is not None
    assert all(p.grad is None for p in m.teacher.module.parameters())


def replace_total(m):
    m.total, m.step = 10, 10
    return m


def test_zero_shot_names_classes_by_prompts():
    m = Roles(student=model(), teacher=model(1))
    found = evaluator(DATA.test, m.student.module)
    assert isinstance(found, ZeroShot)
    assert found.primary == "zero_shot_top1"
    numbers = found(m)
    with torch.no_grad():
        x = DATA.test.batch(torch.arange(36), 0).x
        images = m.student.module.get_image_features(pixel_values=x["pixel_values"])
        texts = m.student.module.get_text_features(**DATA.test.prompts.batch(torch.arange(18), 0).x)
    images, texts = (getattr(e, "pooler_output", e) for e in (images, texts))
    scores = torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T
    right = (scores.argmax(1) == DATA.test.labels).double().mean().item()
    assert numbers["zero_shot_top1"] == pytest.approx(right, abs=1e-6)
    assert 0 <= numbers["agreement"] <= 1


def test_captioned_classes_and_subsets():
    images = TensorSource(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))
    pairs = captioned(images, "a {} circle on the left", ["red", "blue"], words)
    part = pairs.subset([2, 0])
    assert part.captions.texts == ["a blue circle on the left", "a red circle on the left"]
    assert part.batch(torch.arange(2), 0).y.tolist() == [1, 0]
    assert part.fingerprint() != pairs.fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": (0.5, 0.4)}, "sparsity"),
        ({"sparsity": (1.0,)}, "sparsity"),
        ({"sparsity": (0.5,), "keep": ({"*.heads": 1},)}, "keep"),
        ({"label_weight": 2.0}, "label_weight"),
        ({"scale": 0.0}, "scale"),
        ({"mask_share": 1.0}, "mask_share"),
        ({"mask_lr": 0.0}, "mask_lr"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(UsageError, match=message):
        TinyCLIP(**fields)


def test_what_cannot_be_is_said_before_any_work():
    m = Roles(teacher=model(), student=model())
    with pytest.raises(UsageError, match="more than this leaves"):
        TinyCLIP(sparsity=(0.999,)).check(m, BATCH)
    with pytest.raises(UsageError, match="no such dimension"):
        TinyCLIP(keep=({"vision_model.widht": 2},)).check(m, BATCH)
    flat = Roles(teacher=torch.nn.Linear(3, 2), student=torch.nn.Linear(3, 2))
    with pytest.raises(UsageError, match="does not embed images and texts"):
        TinyCLIP().check(flat, BATCH.replace(x=torch.ones(24, 3)))
    with pytest.raises(UsageError, match="no pairs"):
        ImageText(TensorSource(torch.rand(3, 3, 8, 8)), TextSource(["a"], words))
    with pytest.raises(UsageError, match="no place for the class"):
        captioned(TensorSource(torch.rand(2, 3, 8, 8), torch.tensor([0, 1])), "a", ["a", "b"], words)
    with pytest.raises(UsageError, match="labelled"):
        captioned(TensorSource(torch.rand(2, 3, 8, 8)), "a {}", ["a", "b"], words)
