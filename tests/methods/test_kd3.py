"""KD^3: the loss in closed form, the choice of images, the borrowed classifier, a whole run, and what it refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.data import Data, TensorSource
from limbeck.data.mix import mix_distribution
from limbeck.engine.run import execute
from limbeck.losses import nt_xent
from limbeck.methods.kd3.method import KD3, Pool
from limbeck.methods.kd3.student import BorrowClassifier, Ending, borrow_classifier, find_ending
from limbeck.nn.mlp import mlp


def generator(seed):
    return torch.Generator().manual_seed(seed)


def conv(width, classes=4, stride=2, seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, width, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


IMAGES = torch.rand(6, 1, 8, 8, generator=generator(0))
BATCH = Batch(x=IMAGES, id=torch.arange(6))


def borrowed(embed=0, **student):
    m = Roles(teacher=conv(6), student=conv(3, seed=1, **student))
    torch.manual_seed(2)
    m.convert("student", BorrowClassifier.between(m.teacher, m.student, BATCH, embed))
    return m


def update_of(method, m, batch=BATCH):
    m.freeze("teacher")
    (update,) = method.step(m, batch)
    assert update.role == "student"
    return update


# The loss

ALONE = KD3(contrastive_weight=0.0)


def parts(m):
    """Projected features, the teacher's features, and both logits, by hand."""
    teacher, student = m.teacher.module, m.student.module
    above = teacher[1](teacher[0](IMAGES))
    below = student.projector(student.backbone[1](student.backbone[0](IMAGES)))
    return below, above, F.linear(below.mean((2, 3)), teacher[4].weight, teacher[4].bias), teacher(IMAGES)


def test_the_loss_is_the_weighted_squared_error_of_features():
    m = borrowed()
    update = update_of(ALONE, m)
    below, above, own, theirs = parts(m)
    weight = (own - theirs).norm(dim=1).sigmoid().detach()
    torch.testing.assert_close(update.loss, (weight[:, None, None, None] * (below - above) ** 2).mean())
    torch.testing.assert_close(m.student(BATCH), own)  # the teacher's classifier
    assert update.logs["disagreement"].item() == pytest.approx(weight.mean().item())


def test_with_weights_of_one_it_is_the_plain_squared_error():
    m = borrowed()
    below, above, *_ = parts(m)
    update = update_of(KD3(contrastive_weight=0.0, weighted=False), m)
    torch.testing.assert_close(update.loss, F.mse_loss(below, above))


def test_no_gradient_reaches_the_weight_the_teacher_or_the_classifier():
    m = borrowed()
    below, above, own, theirs = parts(m)
    weight = (own - theirs).norm(dim=1).sigmoid().detach()
    expected = torch.autograd.grad(
        (weight[:, None, None, None] * (below - above.detach()) ** 2).mean(), list(m.student.projector.parameters())
    )
    update_of(ALONE, m).loss.backward()
    for p, gradient in zip(m.student.projector.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in m.teacher.parameters())
    assert all(p.grad is None for p in m.student.classifier.parameters())


def test_features_that_agree_give_no_loss_equal_logits_and_weights_of_a_half():
    m = borrowed()
    m.student.backbone[0], m.student.module.projector = copy.deepcopy(m.teacher.module[0]), nn.Identity()
    update = update_of(ALONE, m)
    assert update.loss.item() == 0
    torch.testing.assert_close(m.student(BATCH), m.teacher(BATCH))
    assert update.logs["disagreement"].item() == pytest.approx(0.5)


@pytest.mark.parametrize(("stride", "size"), [(1, [4, 4]), (4, None)])
def test_the_larger_map_is_averaged_to_the_smaller(stride, size):
    m = borrowed(stride=stride)
    assert m.student(IMAGES).shape == (6, 4)
    assert m.lineage["student"]["records"][0]["size"] == size
    student, teacher = m.student.module, m.teacher.module
    maps = student.backbone[1](student.backbone[0](IMAGES))
    maps = maps if size is None else F.adaptive_avg_pool2d(maps, size)
    target = F.adaptive_avg_pool2d(teacher[1](teacher[0](IMAGES)), maps.shape[2:])
    projected = student.projector(maps)
    update = update_of(KD3(contrastive_weight=0.0, weighted=False), m)
    torch.testing.assert_close(update.loss, F.mse_loss(projected, target))


def test_the_contrast_is_that_of_images_and_their_mixed_twins():
    m = borrowed(embed=5)
    method = KD3(contrastive_weight=2.0, weighted=False)
    update = update_of(method, m)
    mixed = mix_distribution(IMAGES, alpha=0.1, generator=Roles().rng("mix"))
    pooled = nn.Sequential(*list(m.student.backbone)[:4])
    one, other = (m.student.embed["student"](pooled(x)) for x in (IMAGES, mixed))
    below, above, *_ = parts(m)
    expected = F.mse_loss(below, above) + 2 * nt_xent(one, other, temperature=0.3)
    torch.testing.assert_close(update.loss, expected)


def test_the_contrast_of_the_teacher_cannot_reach_the_student():
    gradients = []
    for variant in ("paper", "code"):
        m = borrowed(embed=5)
        update_of(KD3(variant=variant), m).loss.backward()
        gradients.append({name: p.grad for name, p in m.student.module.named_parameters()})
    paper, code = gradients
    own = [name for name in paper if not name.startswith("embed.teacher")]
    assert all((paper[n] is None and code[n] is None) or torch.equal(paper[n], code[n]) for n in own)
    assert all(code[n].abs().sum() > 0 and paper[n] is None for n in paper if n == "embed.teacher.weight")


# The choice of images


def test_the_teachers_share_has_the_papers_values():
    def share(e):
        return KD3().teacher_share((e + 1) / 240)

    assert [round(share(e), 3) for e in (1, 40, 80, 119, 120, 239)] == [0.992, 0.937, 0.704, 0.268, 0, 0]


class Fixed(nn.Module):
    """Logits that are the input's first numbers."""

    def forward(self, x):
        return x.flatten(1)[:, :3]


def selected(method, teacher, student, step=0, total=100):
    source = TensorSource(student, ids=torch.arange(len(student)) + 50)
    m = Roles(student=Fixed(), pool=Pool(source, teacher))
    m.step, m.total = step, total
    return method.select(m, 0)


STUDENT = 6 * torch.randn(40, 3, generator=generator(3))
TEACHER = 6 * torch.randn(40, 3, generator=generator(4))


def kept_by_hand(logits, cutoff=0.95):
    sure, label = logits.softmax(1).max(1)
    share = label.bincount(minlength=3) / label.bincount(minlength=3).max()
    return set(((sure > (cutoff * share / (2 - share))[label]).nonzero().flatten() + 50).tolist())


@pytest.mark.parametrize("step", [0, 20, 40, 60, 99])
def test_an_epoch_is_filled_with_what_teacher_and_student_are_sure_about(step):
    share = KD3().teacher_share(step / 100)
    ids = selected(KD3(), TEACHER, STUDENT, step)
    kept = kept_by_hand(share * TEACHER + (1 - share) * STUDENT)
    assert set(ids.tolist()) == kept
    counts = ids.unique(return_counts=True)[1]
    assert len(ids) == 40
    assert counts.max() - counts.min() <= 1


def test_a_constant_on_all_logits_changes_nothing():
    shift = torch.randn(40, 1, generator=generator(5))
    assert torch.equal(selected(KD3(), TEACHER + shift, STUDENT - shift), selected(KD3(), TEACHER, STUDENT))


def test_cutoff_zero_keeps_everything():
    assert sorted(selected(KD3(cutoff=0.0), TEACHER, STUDENT).tolist()) == list(range(50, 90))


def test_where_nothing_is_sure_a_tenth_is_taken():
    flat = torch.tensor([0.1, 0.0, 0.0]) * torch.arange(1, 41)[:, None] / 40
    assert set(selected(KD3(), flat, flat).tolist()) == {86, 87, 88, 89}


# The borrowed classifier


class Normed(nn.Module):
    """A norm with parameters lies between the maps and the classifier."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(1, 6, 3, 2), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(x).mean((2, 3))))


class Largest(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 6, 3, 2), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(x).amax((2, 3)))


@pytest.mark.parametrize(
    ("model", "head", "maps"),
    [
        (conv(6), "4", "1"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1)), nn.Flatten(), nn.Linear(6, 4)),
         "2", "0.0"),
        (nn.Sequential(nn.Flatten(), *mlp(64, 6, 4)), "3", None),
        (Normed(), "head", None),
        (Largest(), "head", None),
        (nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), None, "1"),
    ],
    ids=["pooled", "nested", "vectors", "normed", "largest", "headless"],
)  # fmt: skip
def test_where_features_are_read(model, head, maps):
    assert find_ending(Roles(student=model).student, BATCH) == Ending(head, maps)


@pytest.mark.parametrize("teacher", [Normed(), nn.Sequential(nn.Flatten(), *mlp(64, 6, 4))], ids=["normed", "mlp"])
def test_a_teacher_without_maps_is_matched_in_vectors(teacher):
    m = Roles(teacher=teacher, student=conv(3))
    ALONE.check(m, BATCH)
    m.convert("student", BorrowClassifier.between(m.teacher, m.student, BATCH))
    update = update_of(ALONE, m)
    vectors = m.student.projector(m.student.backbone(IMAGES))
    seen = []
    head = teacher.head if isinstance(teacher, Normed) else teacher[3]
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weight = (m.student(BATCH) - m.teacher(BATCH)).norm(dim=1).sigmoid()
    hook.remove()
    torch.testing.assert_close(update.loss, (weight[:, None] * (vectors - seen[0]) ** 2).mean())


def test_models_of_libraries():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    teacher, student = (timm.create_model(n, num_classes=5).eval() for n in ("resnet10t", "test_resnet"))
    m = Roles(teacher=teacher, student=student)
    batch = Batch(x=torch.rand(2, 3, 64, 64))
    assert find_ending(m.teacher, batch) == Ending("fc", "layer4")
    vit = timm.create_model("test_vit", num_classes=5).eval()
    images = Batch(x=torch.rand(2, 3, 160, 160))
    assert find_ending(Roles(teacher=vit).teacher, images) == Ending("head")
    m.convert("student", BorrowClassifier.between(m.teacher, m.student, batch))
    update_of(ALONE, m, batch).loss.backward()
    assert m.student(batch).shape == (2, 5)


def test_the_student_is_rebuilt_from_its_record():
    m = borrowed()
    again = borrow_classifier(conv(3, seed=1), m.lineage["student"]["records"][0])
    again.load_state_dict(m.student.state_dict())
    torch.testing.assert_close(again.eval()(IMAGES), m.student.module.eval()(IMAGES))
    assert not again.classifier.weight.requires_grad


# A whole run


def pool(labelled=False):
    y = torch.arange(96) % 4
    x = torch.rand(96, 1, 8, 8, generator=generator(6)) * 0.2
    x[torch.arange(96), :, 2 * (y // 2) + 1, 2 * (y % 2) + 1] += 2.0
    return TensorSource(x, y if labelled else None)


def test_a_run_ends_in_one_module_with_the_teachers_classifier(tmp_path):
    teacher, test = conv(6), pool(labelled=True)
    before = copy.deepcopy(teacher.state_dict())
    data = Data(train=test, unlabelled=pool(), test=test)
    result = limbeck.distill(
        teacher, conv(3, seed=1), data, "kd3", out=tmp_path, progress="off", optim={"student": {"lr": 0.01}},
        engine={"epochs": 3, "batch_size": 16},
    )  # fmt: skip
    student = result.roles.student
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(student.classifier.weight, teacher[4].weight)
    assert student.embed is None
    assert result.history[-1]["step"] == 18  # each epoch is as long as the pool
    loaded = limbeck.load(tmp_path, conv(3, seed=9), trust=True)
    x = test.x
    torch.testing.assert_close(loaded(x), student.module.eval()(x))


def test_without_an_unlabelled_pool_the_training_data_are_it_and_labels_are_not_read():
    ends = []
    for labelled in (True, False):
        roles = Roles(teacher=conv(6), student=conv(3, seed=1))
        data = Data(train=pool(labelled))
        result = execute(KD3(), roles, data, Engine(epochs=1, batch_size=16), optim={"student": Optim(lr=0.01)})
        ends.append(result.roles.student.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_the_student_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    from limbeck.export.onnx import to_onnx

    report = to_onnx(borrowed().student.module.eval(), (IMAGES,), tmp_path / "student.onnx")
    assert report.max_abs_error < 1e-5


# What it refuses


@pytest.mark.parametrize(
    "fields",
    [
        {"cutoff": 1.1},
        {"cutoff": -0.1},
        {"horizon": 0.0},
        {"alone_after": 1.5},
        {"contrastive_weight": -1.0},
        {"temperature": 0.0},
        {"mix_alpha": 0.0},
        {"embed_dim": 0},
    ],
)
def test_hyper_parameters_out_of_range(fields):
    with pytest.raises(UsageError) as error:
        KD3(**fields)
    assert error.value.where == f"method.{next(iter(fields))}"


def test_a_teacher_without_a_classifier_is_refused():
    with pytest.raises(UsageError, match="no classifier that a student could borrow"):
        KD3().check(Roles(teacher=nn.Flatten(), student=conv(3)), BATCH)
    two = limbeck.teachers.Ensemble([conv(6), conv(6, seed=1)])
    with pytest.raises(UsageError, match="no classifier that a student could borrow") as error:
        KD3().check(Roles(teacher=two, student=conv(3)), BATCH)
    assert "one model" in error.value.expected


def test_styles_need_images():
    m, batch = Roles(teacher=mlp(4, 8, 3), student=mlp(4, 6, 3)), Batch(x=torch.rand(2, 4))
    with pytest.raises(UsageError, match="images only") as error:
        KD3().check(m, batch)
    assert "contrastive_weight=0" in error.value.fix
    ALONE.check(m, batch)


def test_the_share_never_leaves_0_to_1():
    assert all(0 <= KD3(alone_after=1.0).teacher_share(i / 50) <= 1 for i in range(51))
    assert math.isclose(KD3().teacher_share(0.0), 1 - math.exp(-5))
