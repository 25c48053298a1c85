"""SSLD: the loss, labels that are never read, what is taken from the pool, both stages, and what it refuses."""

import pytest
import torch

import limbeck
from limbeck import Batch, Engine, Optim, Roles
from limbeck.core.errors import UsageError
from limbeck.core.stages import Collect, Train
from limbeck.data import Data, TensorSource
from limbeck.engine.run import execute
from limbeck.losses import jensen_shannon, kl, soft_cross_entropy, symmetric_kl
from limbeck.methods.ssld.method import SSLD
from limbeck.nn.mlp import mlp
from limbeck.prove import seeded

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def roles():
    return Roles(teacher=seeded(0, lambda: mlp(6, 16, 4)), student=seeded(1, lambda: mlp(6, 8, 4)))


def gradient(method, batch, m=None):
    m = m or roles()
    m.freeze("teacher")
    method.step(m, batch).backward(m)
    return torch.cat([p.grad.flatten() for p in m.student.parameters()])


@pytest.mark.parametrize(("variant", "loss"), [("code", symmetric_kl), ("paper", jensen_shannon), ("kl", kl)])
def test_the_loss_is_that_of_the_variant(variant, loss):
    m = roles()
    torch.testing.assert_close(
        SSLD(variant=variant).step(m, Batch(x=X)).loss, loss(m.student(X), m.teacher(X).detach())
    )


def test_kl_has_the_gradient_of_the_soft_cross_entropy():
    m = roles()
    soft_cross_entropy(m.student(X), m.teacher(X).softmax(-1).detach()).backward()
    expected = torch.cat([p.grad.flatten() for p in m.student.parameters()])
    torch.testing.assert_close(gradient(SSLD(variant="kl"), Batch(x=X)), expected)


def test_labels_may_be_anything():
    garbage = Batch(x=X, y=torch.full((8,), -7))
    assert torch.equal(gradient(SSLD(), garbage), gradient(SSLD(), Batch(x=X)))


def test_the_teacher_gets_no_gradient():
    m = roles()  # not frozen: the step itself must not differentiate through the teacher
    SSLD().step(m, Batch(x=X)).loss.backward()
    assert all(p.grad is None for p in m.teacher.parameters())


# The pool


def images(count, seed, labels=False):
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorSource(x, torch.arange(count) % 4) if labels else TensorSource(x)


class Fixed(torch.nn.Module):
    """Logits that are the first four pixels."""

    def forward(self, x):
        return 9 * x.flatten(1)[:, :4]


def test_the_best_of_each_class_are_taken_and_no_copy_of_a_judged_image(tmp_path):
    pool = images(30, 0)
    test = TensorSource(0.5 * pool.batch(torch.tensor([4, 9]), 0).x + 0.2, torch.tensor([0, 1]))
    data = Data(train=images(4, 1, labels=True), test=test, unlabelled=pool)
    m = Roles(teacher=Fixed(), student=Fixed())
    assert SSLD().choose(m, data).tolist() == [i for i in range(30) if i not in (4, 9)]
    assert len(SSLD(duplicates=1.0).choose(m, data)) == 30
    chosen = SSLD(images_per_class=2).choose(m, data, tmp_path)
    p = Fixed()(pool.batch(torch.arange(30), 0).x).softmax(-1)
    p[[4, 9]] = -1
    assert chosen.tolist() == p.topk(2, dim=0).indices.unique().tolist()
    assert "2 are in the validation or test data too" in (tmp_path / "pool.txt").read_text()


def test_a_pool_of_copies_alone_is_refused():
    pool = images(3, 0)
    test = TensorSource(pool.batch(torch.arange(3), 0).x, torch.arange(3))
    data = Data(train=images(4, 1, labels=True), test=test, unlabelled=pool)
    with pytest.raises(UsageError, match="nothing is left"):
        SSLD().choose(Roles(teacher=Fixed(), student=Fixed()), data)


# The stages


def program(method, data):
    """The stages, with a collection's example as its answer."""
    found, answer, stages = [], None, method.stages(roles(), data)
    while True:
        try:
            stage = stages.send(answer)
        except StopIteration:
            return found
        found.append(stage)
        answer = type("Answer", (), {"value": stage.example}) if isinstance(stage, Collect) else None


def test_the_second_stage_is_on_the_training_data_at_a_hundredth_of_the_rate():
    data = Data(train=TensorSource(X), unlabelled=TensorSource(X + 1))
    pool, train, finetune = program(SSLD(finetune_epochs=3), data)
    assert isinstance(pool, Collect)
    assert (len(train.data), len(finetune.data)) == (16, 8)
    assert (train.lr_factor, finetune.lr_factor, finetune.epochs) == (1.0, 0.01, 3)
    assert len(program(SSLD(finetune_epochs=0), data)) == 2
    (only,) = program(SSLD(), Data(train=TensorSource(X)))
    assert isinstance(only, Train)


def test_the_rate_of_the_second_stage_is_what_the_optimizer_does():
    """One step of plain gradient descent, so that the weights say what the rate was."""
    before, after = roles(), roles()
    data = Data(train=TensorSource(X))
    engine = Engine(steps=1, batch_size=8, device="cpu", evaluate_every=0)

    class Twice(SSLD):
        def stages(self, m, data):
            yield Train(self.step, {"student": None}, ["teacher"], data.train, lr_factor=0.25)

    execute(Twice(), after, data, engine, optim={"student": Optim("sgd", lr=0.4)})
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(before.student.parameters(), after.student.parameters(), strict=True)]
    )
    torch.testing.assert_close(moved.detach(), 0.1 * gradient(SSLD(), Batch(x=X), before))


def test_it_learns_from_the_pool():
    torch.manual_seed(0)
    teacher = mlp(6, 16, 4)
    pool, test = torch.randn(400, 6), torch.randn(200, 6)
    data = Data(train=TensorSource(torch.randn(10, 6)), unlabelled=TensorSource(pool))
    m = Roles(teacher=teacher, student=mlp(6, 16, 4))

    def agreement():
        return (m.student(test).argmax(-1) == m.teacher(test).argmax(-1)).float().mean().item()

    start = agreement()
    engine = Engine(epochs=30, batch_size=50, device="cpu", evaluate_every=0)
    execute(SSLD(), m, data, engine, optim={"student": Optim("adam", lr=0.01)})
    assert agreement() > max(0.8, start + 0.2)


def test_bad_input_is_refused(tmp_path):
    data = (torch.randn(80, 6), torch.arange(80) % 4)
    with pytest.raises(UsageError, match=r"data\.unlabelled"):
        limbeck.distill(mlp(6, 16, 4), mlp(6, 8, 4), data, "ssld", images_per_class=5, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for field in (
        {"images_per_class": 0},
        {"finetune_epochs": -1},
        {"finetune_lr": 0},
        {"duplicates": 0},
        {"variant": "js"},
    ):
        with pytest.raises(UsageError, match=next(iter(field))):
            SSLD(**field)
    with pytest.raises(UsageError, match="same classes"):
        SSLD().check(Roles(teacher=mlp(6, 4), student=mlp(6, 3)), Batch(x=X))
