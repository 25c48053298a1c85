"""One table over all losses: what holds for each of them, whatever its formula."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import losses
from limbeck.core.errors import UsageError

B, C = 5, 7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 6, 3, 3, 1])
LOGITS = (2 * normal(B, C, seed=0), 2 * normal(B, C, seed=1))
TOKENS = (2 * normal(2, 3, C, seed=2), 2 * normal(2, 3, C, seed=3))
MAPS = (normal(B, 3, 6, 6, seed=4), normal(B, 3, 6, 6, seed=5))
UNEQUAL_MAPS = (normal(B, 3, 6, 4, seed=6), normal(B, 2, 4, 4, seed=7))
VECTORS = (normal(B, 4, seed=8), normal(B, 4, seed=9))
UNEQUAL_VECTORS = (normal(B, 4, seed=10), normal(B, 3, seed=11))
BANK = normal(6, 4, seed=12)


@dataclass
class Case:
    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    zero: bool = True  # at student == teacher
    samples: tuple[int, ...] = (B,)
    teacher_gradient: bool = True

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.loss(*(inputs or self.inputs), **(self.options | options))


RANKING = {"zero": False, "teacher_gradient": False}
SCALES = {"student_scale": 3.0, "teacher_scale": 3.0}
CASES = {
    "kl": Case(losses.kl, LOGITS),
    "kl-warm": Case(losses.kl, LOGITS, {"temperature": 3.0}),
    "kl-reverse": Case(losses.kl, LOGITS, {"temperature": 2.0, "direction": "reverse"}),
    "kl-tokens": Case(losses.kl, TOKENS, samples=(2, 3)),
    "symmetric-kl": Case(losses.symmetric_kl, LOGITS, {"temperature": 2.0}),
    "js": Case(losses.jensen_shannon, LOGITS, {"temperature": 2.0}),
    "js-0.1": Case(losses.jensen_shannon, LOGITS, {"beta": 0.1, "continuous": True}),
    "js-0": Case(losses.jensen_shannon, LOGITS, {"beta": 0}),
    "js-1": Case(losses.jensen_shannon, LOGITS, {"beta": 1, "continuous": True}),
    "soft_cross_entropy": Case(losses.soft_cross_entropy, (LOGITS[0], LOGITS[1].softmax(-1)), zero=False),
    "logit_mse": Case(losses.logit_mse, TOKENS, samples=(2, 3)),
    "dkd": Case(losses.dkd, (*LOGITS, LABELS)),
    "dist": Case(
        losses.dist, LOGITS, {"beta": 2.0, "gamma": 0.5, "temperature": 2.0}, zero=False
    ),  # the code's epsilon
    "dist-paper": Case(losses.dist, LOGITS, {"variant": "paper"}),
    "plackett_luce": Case(losses.plackett_luce, (*LOGITS, LABELS), {"temperature": 2.0}, **RANKING),
    "plackett_luce-top": Case(losses.plackett_luce, (*LOGITS, LABELS), {"top_k": 3}, **RANKING),
    "plackett_luce-tokens": Case(
        losses.plackett_luce, (*TOKENS, torch.tensor([[1, 2, 3], [4, 5, 6]])), samples=(2, 3), **RANKING
    ),
    "list_mle": Case(losses.list_mle, (*LOGITS, LABELS), **RANKING),
    "list_mle-free": Case(losses.list_mle, LOGITS, **RANKING),
    "p_list_mle": Case(losses.p_list_mle, (*LOGITS, LABELS), **RANKING),
    "hint": Case(losses.hint, MAPS),
    "simkd": Case(losses.simkd, MAPS),
    "attention": Case(losses.attention_transfer, UNEQUAL_MAPS),
    "attention-paper": Case(losses.attention_transfer, MAPS, {"variant": "paper", "power": 3.0}),
    "similarity_preserving": Case(losses.similarity_preserving, (MAPS[0], UNEQUAL_VECTORS[1])),
    "hcl": Case(losses.hcl, MAPS),
    "vid": Case(losses.vid, (*MAPS, normal(3, seed=13)), zero=False),
    "pkt": Case(losses.pkt, UNEQUAL_VECTORS),
    "pkt-paper": Case(losses.pkt, UNEQUAL_VECTORS, {"variant": "paper"}),
    "rkd_distance": Case(losses.rkd_distance, UNEQUAL_VECTORS),
    "rkd_angle": Case(losses.rkd_angle, UNEQUAL_VECTORS),
    "crd-batch": Case(losses.crd, VECTORS, {"dataset_size": 100, "temperature": 0.5}, zero=False),
    "crd-bank": Case(
        losses.crd, (*VECTORS, BANK), {"dataset_size": 100, "temperature": 0.5, "log_normaliser": 2.0}, zero=False
    ),
    "crd-own-bank": Case(
        losses.crd, (*VECTORS, normal(B, 3, 4, seed=14)), {"dataset_size": 9, "temperature": 0.5}, zero=False
    ),
    "cosine_distance": Case(losses.cosine_distance, VECTORS),
    "embedding_mse": Case(losses.embedding_mse, VECTORS),
    "similarity_kl": Case(losses.similarity_kl, UNEQUAL_VECTORS, {"temperature": 0.2}),
    "info_nce": Case(losses.info_nce, VECTORS, {"temperature": 0.3}, zero=False),
    "nt_xent": Case(losses.nt_xent, VECTORS, {"temperature": 0.3}, zero=False),
    "clip_loss": Case(losses.clip_loss, VECTORS, {"scale": 3.0}, zero=False),
    "affinity_mimicking": Case(
        losses.affinity_mimicking, (*VECTORS, *UNEQUAL_VECTORS[1:], normal(B, 3, seed=15)), SCALES, **RANKING
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def chosen(*names: str) -> pytest.MarkDecorator:
    picked = {key: case for key, case in CASES.items() if key.split("-")[0] in names or key in names}
    return pytest.mark.parametrize("case", picked.values(), ids=picked.keys())


def cast(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in case.inputs]


def test_the_table_covers_every_public_loss():
    assert {case.loss.__name__ for case in CASES.values()} == set(losses.__all__) - {"standardise"}


@every_case
def test_gradient_is_exact(case: Case):
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in case.inputs]
    if not case.teacher_gradient:
        inputs[1:] = [x.detach() for x in inputs[1:]]
    assert torch.autograd.gradcheck(case, inputs, eps=1e-6, atol=1e-6)


@every_case
def test_reductions_agree(case: Case):
    single = case(reduction="none")
    assert single.shape == case.samples
    torch.testing.assert_close(case(reduction="sum"), single.sum())
    torch.testing.assert_close(case(reduction="mean"), single.mean())
    torch.testing.assert_close(case(), single.mean())


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(case: Case, dtype: torch.dtype):
    half = cast(case, dtype)
    loss = case(*half)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, case(*(x.float() if x.is_floating_point() else x for x in half)))
    torch.testing.assert_close(loss.double(), case(), rtol=0.1, atol=0.05)


@every_case
def test_autocast_changes_nothing(case: Case):
    inputs = cast(case, torch.float32)
    inputs[0].requires_grad_()
    (plain,) = torch.autograd.grad(case(*inputs), inputs[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case(*inputs)
    assert torch.equal(loss, case(*inputs))
    assert torch.equal(torch.autograd.grad(loss, inputs[0])[0], plain)


@every_case
def test_mixed_dtypes_meet_in_the_wider_one(case: Case):
    inputs = list(case.inputs)
    inputs[0] = inputs[0].float()
    assert case(*inputs).dtype == torch.float64


@every_case
def test_inputs_are_left_alone(case: Case):
    before = [x.clone() for x in case.inputs]
    case()
    assert all(torch.equal(x, y) for x, y in zip(case.inputs, before, strict=True))


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.zero], ids=[key for key, case in CASES.items() if case.zero]
)
def test_zero_and_flat_at_the_teacher(case: Case):
    student = case.inputs[0].clone().requires_grad_()
    loss = case(student, case.inputs[0], *case.inputs[2:])
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    assert case() > 1e-4
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-6


@every_case
def test_order_of_samples_does_not_matter(case: Case):
    order = torch.randperm(case.samples[0], generator=torch.Generator().manual_seed(20))
    count = len(order)
    shared = BANK, CASES["vid"].inputs[2]
    moved = [x if any(x is y for y in shared) or len(x) != count else x[order] for x in case.inputs]
    torch.testing.assert_close(case(*moved, reduction="none"), case(reduction="none")[order])


@every_case
def test_fake_tensors_pass_through(case: Case):
    with torch._subclasses.FakeTensorMode() as mode:
        loss = case(*(mode.from_tensor(x) for x in case.inputs))
    assert loss.shape == ()


@chosen("kl", "js", "soft_cross_entropy", "dkd", "dist", "plackett_luce", "list_mle", "p_list_mle")
def test_shift_of_logits_does_not_matter(case: Case):
    student, *rest = case.inputs
    shift = normal(*case.samples, 1, seed=21)
    torch.testing.assert_close(case(student + 5 * shift, *rest), case())
    if case.loss is not losses.soft_cross_entropy:
        torch.testing.assert_close(case(student, rest[0] - 3 * shift, *rest[1:]), case())


@chosen("kl", "js", "soft_cross_entropy", "logit_mse", "dkd", "dist", "plackett_luce", "list_mle", "p_list_mle")
def test_names_of_classes_do_not_matter(case: Case):
    order = torch.randperm(C, generator=torch.Generator().manual_seed(22))
    student, teacher, *labels = case.inputs
    renamed = [order.argsort()[x] for x in labels]
    torch.testing.assert_close(case(student[..., order], teacher[..., order], *renamed), case())


@chosen("attention", "similarity_preserving", "pkt", "rkd_distance", "rkd_angle", "crd", "cosine_distance",
        "similarity_kl", "info_nce", "nt_xent", "clip_loss", "affinity_mimicking")  # fmt: skip
def test_scale_of_features_does_not_matter(case: Case):
    student, teacher, *rest = case.inputs
    torch.testing.assert_close(case(4 * student, 0.3 * teacher, *rest), case())


@chosen("pkt", "rkd_distance", "rkd_angle", "similarity_kl")
def test_rotation_does_not_matter(case: Case):
    turn = torch.linalg.qr(normal(4, 4, seed=23))[0]
    torch.testing.assert_close(case(case.inputs[0] @ turn, case.inputs[1]), case())


@chosen("rkd_distance", "rkd_angle")
def test_translation_does_not_matter(case: Case):
    torch.testing.assert_close(case(case.inputs[0] + normal(4, seed=24), case.inputs[1]), case())


@chosen("attention", "similarity_preserving", "pkt", "rkd_distance", "rkd_angle", "crd", "cosine_distance",
        "similarity_kl", "info_nce", "nt_xent", "clip_loss", "affinity_mimicking")  # fmt: skip
@pytest.mark.parametrize("collapsed", [0.0, 1.0])
def test_collapsed_student_has_finite_gradients(case: Case, collapsed: float):
    inputs = cast(case, torch.float32)
    inputs[0] = torch.full_like(inputs[0], collapsed, requires_grad=True)
    loss = case(*inputs)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e4


LOGIT_CASES = chosen("kl", "js", "soft_cross_entropy", "dkd", "dist", "plackett_luce", "list_mle", "p_list_mle")


@LOGIT_CASES
def test_extreme_logits_give_finite_losses_and_gradients(case: Case):
    extreme = [1e4 * x.sign() if x.is_floating_point() else x for x in cast(case, torch.float32)]
    extreme[0] = -extreme[0]  # sure, and wrong
    if case.loss is losses.soft_cross_entropy:
        extreme[1] = torch.nn.functional.one_hot(case.inputs[1].argmax(-1), C).float()
    extreme[0].requires_grad_()
    loss = case(*extreme)
    (gradient,) = torch.autograd.grad(loss, extreme[0])
    assert loss.isfinite()
    assert gradient.isfinite().all()


@chosen("kl", "js", "soft_cross_entropy", "dkd", "plackett_luce", "plackett_luce-top")
def test_masked_class_drops_out(case: Case):
    """-inf on both sides equals a smaller list of classes."""
    student, teacher, *labels = case.inputs
    soft = case.loss is losses.soft_cross_entropy
    pad = partial(torch.nn.functional.pad, pad=(0, 2))
    masked = pad(student, value=-torch.inf).requires_grad_()
    loss = case(masked, pad(teacher, value=0.0 if soft else -torch.inf), *labels)
    torch.testing.assert_close(loss, case())
    bare = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(case(bare, teacher, *labels), bare)
    (gradient,) = torch.autograd.grad(loss, masked)
    torch.testing.assert_close(gradient, pad(expected))


@every_case
def test_unknown_reduction_is_refused(case: Case):
    with pytest.raises(UsageError, match=r"unknown reduction\n  found: 'batchmean'\n  expected: mean \| sum \| none"):
        case(reduction="batchmean")


@every_case
def test_different_batches_are_refused(case: Case):
    with pytest.raises(UsageError, match="found: .*" + str(case.samples[0])):
        case(case.inputs[0][1:], *case.inputs[1:])


@every_case
def test_integers_are_refused(case: Case):
    with pytest.raises(UsageError, match="floating-point"):
        case(*(x.long() for x in case.inputs))


LONG = torch.zeros(B, dtype=torch.long)


@pytest.mark.parametrize(
    ("loss", "inputs", "options", "message"),
    [
        (losses.kl, LOGITS, {"temperature": 0.0}, "temperature must be positive\n  where: kl\n  found: 0.0"),
        (losses.kl, LOGITS, {"temperature": float("nan")}, "temperature must be positive"),
        (losses.kl, LOGITS, {"direction": "backward"}, "unknown direction"),
        (losses.kl, (LOGITS[0], LOGITS[1][:, :3]), {}, r"differ in shape\n  where: kl\n  found: student \[5, 7\]"),
        (losses.jensen_shannon, LOGITS, {"beta": 1.5}, "beta must lie"),
        (losses.standardise, LOGITS[:1], {"variant": "book"}, "unknown variant"),
        (losses.dkd, (*LOGITS, LABELS + 1), {}, r"label out of range\n  where: dkd\n  found: 7\n  expected: 0 .. 6"),
        (losses.dkd, (LOGITS[0][:, :1], LOGITS[1][:, :1], LONG), {}, "at least two classes"),
        (losses.dist, TOKENS, {}, "2 dimensions"),
        (losses.dist, LOGITS, {"variant": "book"}, "unknown variant"),
        (losses.plackett_luce, (*LOGITS, LABELS - 100), {}, "found: -100"),
        (losses.plackett_luce, (*LOGITS, LABELS[:2]), {}, r"index per sample\n.*\n  found: torch.int64 \[2\]"),
        (losses.plackett_luce, (*LOGITS, LOGITS[1].softmax(-1)), {}, "soft_cross_entropy"),
        (losses.plackett_luce, (*LOGITS, LABELS), {"temperature": -1.0}, "temperature must be positive"),
        (losses.plackett_luce, (*LOGITS, LABELS), {"top_k": 8}, "top_k out of range"),
        (losses.plackett_luce, (*LOGITS, LABELS), {"top_k": 0}, "top_k out of range"),
        (losses.p_list_mle, (LOGITS[0][:, :1], LOGITS[1][:, :1]), {}, "at least two classes"),
        (losses.hint, (LABELS.double(), LABELS.double()), {}, "two dimensions or more"),
        (losses.attention_transfer, VECTORS, {}, "4 dimensions"),
        (losses.attention_transfer, MAPS, {"power": 0.0}, "power must be positive"),
        (losses.hcl, (MAPS[0][0], MAPS[1][0]), {}, "4 dimensions"),
        (losses.vid, (*MAPS, torch.zeros(4)), {}, r"vid, scale\n  found: \[4\]\n  expected: \[3\]"),
        (losses.pkt, (VECTORS[0][:1], VECTORS[1][:1]), {}, "at least 2"),
        (losses.rkd_distance, MAPS, {}, "2 dimensions"),
        (losses.crd, (*VECTORS, BANK[:, :3]), {"dataset_size": 10}, r"expected: \[K, 4\] or \[5, K, 4\]"),
        (losses.crd, (*VECTORS, BANK[:0]), {"dataset_size": 10}, "negatives do not fit"),
        (losses.crd, VECTORS, {"dataset_size": 0}, "dataset_size must be positive"),
        (losses.info_nce, UNEQUAL_VECTORS, {}, "differ in shape"),
    ],
)  # fmt: skip
def test_wrong_use_is_explained(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        loss(*inputs, **options)
